"""Transposable, unstructured and block patterns in plans, recipes, global scope, compression."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from planning import spec
from test_flax_plan_lifted import Stack, scanned

import jaxsparse as js

T24 = js.TransposableNM(2, 4)
BLOCK = js.Block((4, 2), 0.25)
HALF = js.Unstructured(0.5)


@pytest.mark.parametrize(
    ("model", "x", "axes", "stack"),
    [
        (nn.Dense(12), spec(2, 8), (-2, -1), ()),
        (nn.DenseGeneral((3, 4)), spec(2, 8), (-3, -1), ()),
        (nn.DenseGeneral(4, axis=(-2, -1)), spec(2, 3, 8), (-2, -1), ()),
        (nn.Conv(4, (3, 3)), spec(1, 8, 8, 8), (-2, -1), ()),
        (nn.Einsum((12, 8), "bi,ji->bj"), spec(2, 8), (-1, -2), ()),
        (Stack(scanned(0, 3)), spec(2, 8), (-2, -1), (-3,)),
        (Stack(scanned(1, 3)), spec(2, 8), (-3, -1), (-2,)),
        (Stack(scanned(-1, 3)), spec(2, 8), (-3, -2), (-1,)),
    ],
)
def test_flax_plans_learn_both_axes(model, x, axes, stack):
    for pattern, expected in ((T24, axes), (BLOCK, axes), (HALF, ())):
        (leaf,) = js.flax.plan(model, {"*kernel": js.anywhere(pattern)}, x).sparse.values()
        assert (
            leaf.pattern == pattern.along(expected)
            and leaf.pattern.axes == expected
            and leaf.stack == stack
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "patterns"),
    [(0, (T24, HALF, BLOCK)), (1, (T24, js.Block((3, 3), 0.5, pool="l2"))), (-1, (HALF, BLOCK))],
)
def test_each_weight_of_a_stack_is_masked_for_itself(axis, patterns):
    model, rng = Stack(scanned(axis, 3)), np.random.default_rng(0)
    for pattern in patterns:
        plan = js.flax.plan(model, {"*": js.anywhere(pattern)}, spec(2, 8))
        (leaf,) = plan.leaves
        weights = rng.normal(size=leaf.shape).astype("float32") * np.moveaxis(
            np.array([[[1]], [[10]], [[100]]]), 0, axis
        )
        params = jax.tree.unflatten(
            jax.tree.structure(model.init(jax.random.key(0), jnp.zeros((2, 8)))), [weights]
        )
        (mask,) = jax.tree.leaves(jax.jit(js.magnitude_masks)(params, plan))
        for one, its in zip(
            np.moveaxis(weights, axis, 0), np.moveaxis(np.asarray(mask), axis, 0), strict=True
        ):
            alone = js.plan({"w": one}, {"w": pattern.along((0, 1))})
            np.testing.assert_array_equal(its, js.magnitude_masks({"w": one}, alone)["w"])


@pytest.mark.slow
def test_stacks_of_stacks():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Stack(scanned(-1, 2))(x), None

    model = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    plan = js.flax.plan(model, {"*": HALF}, spec(2, 8), None)
    (leaf,) = plan.leaves
    assert leaf.stack == (-4, -1)
    params = model.init(jax.random.key(0), jnp.zeros((2, 8)), None)
    (mask,) = jax.tree.leaves(js.magnitude_masks(params, plan))
    np.testing.assert_array_equal(mask.sum((1, 2)), np.full((3, 2), 32))


def test_reasons_why_a_leaf_stays_dense():
    class Vector(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.ones, (8,))

    (leaf,) = js.flax.plan(Vector(), {"w": T24}, spec(2, 8)).leaves
    assert leaf.reason == "the product has no output axis of its own"
    assert js.flax.plan(Vector(), {"w": HALF}, spec(2, 8)).sparse
    kernel = js.flax.plan(nn.Dense(6), {"kernel": T24}, spec(2, 8)).leaves[1]
    assert kernel.reason == "axis -1 has size 6, not a multiple of m=4"
    empty = js.plan(
        {"a": jnp.zeros((0, 4)), "b": jnp.ones(4)}, {"*": js.Unstructured(0.5, "global")}
    )
    assert [leaf.reason for leaf in empty.leaves] == ["it is empty", ""]


def test_the_report_shows_both_axes():
    params = {"a": jnp.zeros((8, 8)), "b": jnp.zeros((8, 8)), "c": jnp.zeros(8)}
    plan = js.plan(
        params,
        {
            "a": T24.along((0, 1)),
            "b": js.Block((2, 2), 0.25, axes=(1, 0)),
            "c": js.Unstructured(0.125, "global"),
        },
    )
    lines = [line.split() for line in str(plan).splitlines()[2:5]]
    assert lines == [
        ["a", "8x8", "-2,", "-1", "transposable", "2:4", "0.5", "112"],
        ["b", "8x8", "-1,", "-2", "block", "2x2", "0.25", "0.25"],
        ["c", "8", "unstructured", "0.125", "global", "0.125"],
    ]


def test_patterns_are_values():
    schedule = js.gradual_density(0.1, begin=0, end=10)
    for make in (
        lambda: T24.along((0, 1)),
        lambda: js.Unstructured(schedule, "global"),
        lambda: js.Block([4, 4], schedule, [0, 1]),
    ):
        assert make() == make() and hash(make()) == hash(make())
    assert js.Unstructured(schedule) != js.Unstructured(0.1)
    assert js.Unstructured(schedule).density == pytest.approx(0.1)
    assert str(js.Unstructured(schedule)) == "unstructured to 0.1"
    assert jax.jit(lambda: js.Unstructured(schedule).density * jnp.ones(()))() == pytest.approx(0.1)
    moved = js.Block((4, 4), schedule).along((0, 1))
    assert moved.schedule is schedule and moved.axes == (0, 1)


def test_global_scope_ranks_all_leaves_together():
    rng = np.random.default_rng(1)
    shapes = {
        "a": ((5, 7), "float32"),
        "b": ((3, 2, 4), "bfloat16"),
        "c": ((11,), "float16"),
        "d": ((4, 4), "float32"),
    }
    params = {
        name: jnp.asarray(rng.integers(-9, 10, shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }
    plan = js.plan(params, {"d": js.Unstructured(0.3), "*": js.Unstructured(0.3, "global")})
    masks = jax.jit(js.magnitude_masks)(params, plan)
    together = np.concatenate(
        [np.abs(np.asarray(params[name], "float32")).ravel() for name in "abc"]
    )
    all_masks = np.concatenate([np.asarray(masks[name]).ravel() for name in "abc"])
    np.testing.assert_array_equal(
        all_masks, reference.topk_mask(together, reference.half_up(0.3 * together.size))
    )
    np.testing.assert_array_equal(masks["d"], reference.topk_mask(np.abs(params["d"]), 5))


def test_global_ties_go_by_leaf_and_then_by_index():
    params = {"a": jnp.ones((2, 3)), "b": -jnp.ones((2, 3)), "c": jnp.ones(4)}
    for k, kept in ((3, [3, 0, 0]), (8, [6, 2, 0]), (12, [6, 6, 0]), (13, [6, 6, 1])):
        masks = js.magnitude_masks(
            params, js.plan(params, {"*": js.Unstructured(k / 16, "global")})
        )
        assert [mask.ravel().tolist() for mask in masks.values()] == [
            [place < n for place in range(mask.size)]
            for n, mask in zip(kept, masks.values(), strict=True)
        ]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["max", "mean", "l2"])
def test_global_blocks(score):
    params = {"a": jnp.full((4, 4), -1.0), "b": jnp.full((4, 6), 2.0), "c": jnp.full((4, 2), -3.0)}
    block = js.Block((2, 2), 0.5, axes=(0, 1), pool=score, scope="global")
    masks = js.magnitude_masks(params, js.plan(params, {"a": block.along((1, 0)), "*": block}))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 0, "b": 16, "c": 8}


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_density_schedule_does_not_recompile(scope, every):
    schedule = js.gradual_density(0.25, begin=0, end=6)
    params = {
        "u": jax.random.normal(jax.random.key(0), (8, 8)),
        "b": jax.random.normal(jax.random.key(1), (8, 8)),
    }
    plan = js.plan(
        params,
        {
            "u": js.Unstructured(schedule, scope),
            "b": js.Block((2, 2), schedule, (0, 1), scope=scope),
        },
    )
    tx = js.recipes.explore_exploit(optax.sgd(0.1), plan, every=every, reset_every=None)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(9):
        wanted = float(schedule(t - t % every))
        assert js.masks(state)["u"].sum() == reference.half_up(wanted * 64)
        assert js.masks(state)["b"].sum() == 4 * reference.half_up(wanted * 16)
        params, state = step(params, state)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [T24.along((0, 1)), HALF, BLOCK.along((0, 1))], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_recipes_train_under_every_pattern(pattern, dtype):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8), dtype)}
    plan = js.plan(params, {"w": pattern})
    tx = js.recipes.explore_exploit(optax.sgd(0.1), plan, reset_every=2, weight_decay=0.1)

    def body(carry, _):
        params, state = carry
        grads = jax.grad(
            lambda p: (js.effective_params(p, state)["w"].astype("float32") ** 2).sum()
        )(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), js.masks(state)["w"].sum()

    (params, state), kept = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, 4))(params)
    np.testing.assert_array_equal(kept, 64 * pattern.density)
    np.testing.assert_array_equal(js.masks(state)["w"], js.magnitude_masks(params, plan)["w"])


def test_magnitudes_of_integers_and_of_the_lowest_one():
    w = jnp.array([[-128, 127, 5, -6], [1, 1, -2, 1], [0, 0, 3, 0], [0, 4, 0, 0]], "int8")
    for pattern, expected in [
        (js.Unstructured(2 / 16), [0, 1]),
        (js.Block((1, 2), 2 / 8, (0, 1), "mean"), [0, 1, 2, 3]),
        (js.Block((1, 2), 1 / 8, (0, 1), "max"), [0, 1]),
        (js.TransposableNM(1, 4, (0, 1)), [0, 6, 11, 13]),
    ]:
        mask = js.magnitude_masks({"w": w}, js.plan({"w": w}, {"w": pattern}))["w"]
        if isinstance(pattern, js.TransposableNM):
            best = reference.best_transposable(np.abs(np.asarray(w, int)).tolist(), 1)
            np.testing.assert_array_equal(mask, best)
        else:
            assert np.flatnonzero(mask).tolist() == expected


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
def test_transposable_weights_compress_along_their_first_axis(axes):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 12))}
    plan = js.plan(params, {"w": T24.along(axes)})
    masks = js.magnitude_masks(params, plan)
    packed = js.compress(params, masks, plan)
    assert packed["w"].axis % 2 == axes[0]
    np.testing.assert_array_equal(js.decompress(packed)["w"], jnp.where(masks["w"], params["w"], 0))


@pytest.mark.parametrize(
    "pattern", [js.TransposableNM(1, 4, (0, 1)), HALF, BLOCK.along((0, 1))], ids=str
)
def test_other_patterns_do_not_compress(pattern):
    params = {"w": jnp.ones((8, 8))}
    plan = js.plan(params, {"w": pattern})
    with pytest.raises(
        ValueError, match=f"compress: w is planned as {pattern}, but the compressed format is 2:4"
    ):
        js.compress(params, js.magnitude_masks(params, plan), plan)


def test_masks_of_one_shape_are_traced_once(monkeypatch):
    calls = []
    module = importlib.import_module("jaxsparse._masks.nm")
    mask_groups = module.mask_groups
    monkeypatch.setattr(module, "mask_groups", lambda *args: calls.append(1) or mask_groups(*args))
    # a shape that no other test uses
    params = {str(i): jax.ShapeDtypeStruct((52, 11), "float32") for i in range(5)}
    plan = js.plan(params, {"*": js.NM(2, 4, axis=0)})
    jax.make_jaxpr(functools.partial(js.magnitude_masks, plan=plan))(params)
    assert len(calls) == 1
