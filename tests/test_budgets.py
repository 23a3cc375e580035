"""Layer budgets against values computed by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

U = js.Unstructured(0.3)


def budget(shapes, density, method, pattern=U, stack=()):
    plan = js.plan({name: jnp.zeros(shape) for name, shape in shapes.items()}, {"*": pattern})
    leaves = tuple(dataclasses.replace(leaf, stack=stack) for leaf in plan.leaves)
    return js.layer_budget(js.Plan(leaves), density, method)


def densities(plan):
    return [leaf.density for leaf in plan.leaves]


def test_uniform_is_the_same_everywhere():
    assert densities(budget({"a": (10, 10), "b": (3, 3, 8, 8)}, 0.25, "uniform")) == pytest.approx(
        [0.25, 0.25]
    )


def test_er():
    # r = 20/100, 100/900; r * size = 20, 100; 0.1 of 1000 weights are 100; c = 100/120
    assert densities(budget({"a": (10, 10), "b": (10, 90)}, 0.1, "er")) == pytest.approx(
        [1 / 6, 5 / 54]
    )


def test_er_counts_the_channels_and_erk_every_size():
    # sizes 288 and 64. er: r = 12/32, 16/64; r * size = 108, 16; 0.25 of 352 are 88; c = 88/124
    shapes = {"conv": (3, 3, 4, 8), "dense": (8, 8)}
    assert densities(budget(shapes, 0.25, "er")) == pytest.approx(
        [12 / 32 * 88 / 124, 16 / 64 * 88 / 124]
    )
    # erk: r = 18/288, 16/64; r * size = 18, 16; 0.25 of 352 are 88; c = 88/34, which raises neither
    # above 1
    assert densities(budget(shapes, 0.25, "erk")) == pytest.approx(
        [18 / 288 * 88 / 34, 16 / 64 * 88 / 34]
    )


def test_layers_over_one_are_dense_and_the_rest_is_solved_again():
    # r = 4/4, 110/1000; c = 502/114 raises the first above 1; then 502 - 4 = 498 of the second's
    # 1000 are left
    assert densities(budget({"a": (2, 2), "b": (10, 100)}, 0.5, "er")) == pytest.approx([1, 0.498])
    # repeated: r = 1, 1/5, 110/1000 and r * size = 4, 20, 110 with sizes 4, 100, 1000; 0.9 of 1104
    # are 993.6; c = 993.6/134 raises a above 1 and b too: 7.4/5; then 889.6 of 1000
    assert densities(
        budget({"a": (2, 2), "b": (10, 10), "c": (10, 100)}, 0.9, "er")
    ) == pytest.approx([1, 1, 0.8896])
    # at 0.66, c = 728.64/134 = 5.44 raises a above 1, and b to 1.09; at 0.6, c = 4.943 raises b to
    # 0.989, and then c = (662.4 - 4)/130 = 5.065 raises b above 1: 558.4 of 1000
    assert densities(
        budget({"a": (2, 2), "b": (10, 10), "c": (10, 100)}, 0.6, "er")
    ) == pytest.approx([1, 1, 0.5584])


@pytest.mark.parametrize("method", ["uniform", "er", "erk"])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_the_total_is_what_was_asked(method, density):
    rng = np.random.default_rng(0)
    shapes = {f"{i}": tuple(rng.integers(1, 40, rng.integers(1, 5))) for i in range(12)}
    plan = budget(shapes, density, method)
    assert max(densities(plan)) <= 1
    assert plan.density == pytest.approx(density)


def test_the_axes_of_a_stack_are_left_out():
    shapes = {"a": (5, 10, 10), "b": (5, 10, 90)}
    assert densities(budget(shapes, 0.1, "er", stack=(-3,))) == pytest.approx([1 / 6, 5 / 54])
    assert densities(budget(shapes, 0.1, "erk", stack=(-3,))) == pytest.approx([1 / 6, 5 / 54])
    sizes = [math.prod(shape) for shape in shapes.values()]
    # if stacks were ignored: r = 25/500, 105/4500; r * size = 25, 105; 0.1 of 5000 are 500; c =
    # 500/130
    assert densities(budget(shapes, 0.1, "erk")) == pytest.approx(
        [25 / sizes[0] * 500 / 130, 105 / sizes[1] * 500 / 130]
    )


def test_global_is_one_threshold():
    plan = budget({"a": (2, 2), "b": (4, 2)}, 0.5, "global")
    params = {"a": jnp.zeros((2, 2)), "b": jnp.arange(1.0, 9.0).reshape(4, 2)}
    masks = js.magnitude_masks(params, plan)
    assert masks["a"].sum() == 0 and masks["b"].sum() == 6


def test_other_leaves_and_the_rest_of_a_pattern_stay():
    params = {
        "a": jnp.zeros((8, 8)),
        "b": jnp.zeros((8, 8)),
        "c": jnp.zeros(3),
        "d": jnp.zeros((8, 8)),
    }
    block = js.Block((2, 4), 0.3, axes=(1, 0), pool="l2", scope="global")
    plan = js.plan(params, {"a": js.NM(2, 4, axis=0), "b": block, "d": js.Unstructured(0.9)})
    a, b, c, d = js.layer_budget(plan, 0.5, "erk").leaves
    assert (a, c) == (plan.leaves[0], plan.leaves[2])
    assert b.pattern == js.Block(
        (2, 4), 0.5, axes=(-1, -2), pool="l2"
    ) and d.pattern == js.Unstructured(0.5)
