"""Plans, masks, compressed runs and gradients of whole models, against tables by hand.

The tables are in `zoo`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import LINEN, MODELS, moe
from zoo.functions import WEIGHTS

import jaxsparse as js

pytestmark = pytest.mark.promotes("models are written as their originals are")

# for programs that take long to compile
ONE_OF_EACH_KIND = [
    "Gemma, scan of remat",
    "lm1b, boxed, under a mesh",
    "T5, scan along axis 1, tied",
    "MoE, dispatch and combine",
    "MoE, gathered experts",
    "LSTM translator",
    "ResNet",
    "GPT-2",
    "NNX Gemma, scan",
    "Equinox, scan",
    "dictionary, fused q, k and v",
    "dictionary, weight normalisation",
]

WITH_GRADIENTS = [
    name
    for name in ONE_OF_EACH_KIND
    if name not in ("lm1b, boxed, under a mesh", "MoE, gathered experts", "NNX Gemma, scan")
]

# compiling takes nearly all of the time
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@functools.cache
def built(name):
    return MODELS[name].build()


@functools.cache
def plan(name):
    fn, params, args, *_ = built(name)
    return js.plan(params, MODELS[name].rules, fn, *args)


def is_packed(leaf):
    return isinstance(leaf, js.Sparse24)


def by_path(tree):
    """The leaves by their paths, as the tables of the zoo name them."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_packed)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {
        path.removeprefix("params/").removesuffix("/value"): leaf for path, leaf in named.items()
    }


def largest_two_of_four(w, axis):
    moved = np.moveaxis(np.abs(w), axis, -1)
    ranks = (-moved).reshape(-1, 4).argsort(axis=-1).argsort(axis=-1)
    return np.moveaxis((ranks < 2).reshape(moved.shape), -1, axis)


@functools.cache
def masks_by_hand(name):
    """The masks along the axes of the tables; True for a leaf that stays dense."""
    params, planned = built(name).params, MODELS[name].planned
    weights = by_path(params).items()
    masks = [
        jnp.asarray(
            largest_two_of_four(np.asarray(w), planned[path].axis) if path in planned else True
        )
        for path, w in weights
    ]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


@functools.cache
def masked_by_hand(name):
    return jax.tree.map(
        lambda w, mask: jnp.asarray(np.where(mask, w, 0)), built(name).params, masks_by_hand(name)
    )


@functools.cache
def packed(name):
    return js.compress(built(name).params, masks_by_hand(name), plan(name))


def gradients(name, fn):
    """The compiled function that returns the gradients and the output.

    The gradients are those by the parameters and by all floating inputs.
    """
    inputs = [
        1 + i
        for i, arg in enumerate(built(name).args)
        if isinstance(arg, jax.Array) and jnp.issubdtype(arg.dtype, jnp.floating)
    ]

    def loss(*args):
        y = fn(*args)
        return jnp.square(y).mean(), y

    return compiled(jax.grad(loss, argnums=(0, *inputs), allow_int=True, has_aux=True))


def model(name, fn):
    """The compiled model, which returns its gradients, where they are tested, and its output."""
    return (
        gradients(name, fn) if name in WITH_GRADIENTS else compiled(lambda *args: (None, fn(*args)))
    )


@functools.cache
def dense_model(name):
    return model(name, built(name).fn)


@functools.cache
def expected(name):
    """The result of the model from masked weights."""
    return dense_model(name)(masked_by_hand(name), *built(name).args)


@functools.cache
def compressed(name):
    """The result of the model from compressed weights."""
    return model(name, js.sparsify(built(name).fn))(packed(name), *built(name).args)


def hand_written(name):
    planned = MODELS[name].planned
    return {
        path: (axis, stack, (axis,) if summed is None else summed)
        for path, (axis, stack, summed) in planned.items()
    }


def as_hand_written(plan):
    return {
        leaf.path: (leaf.pattern.axis, leaf.stack, leaf.summed)
        for leaf in plan.leaves
        if leaf.pattern
    }


@pytest.mark.parametrize("name", MODELS)
def test_just_the_weights_that_a_product_sums_over_are_planned_and_along_the_axis_it_sums_over(
    name,
):
    planned = plan(name)
    assert as_hand_written(planned) == hand_written(name), str(planned)
    assert [leaf.path for leaf in planned.leaves] == list(by_path(built(name).params))
    assert all(leaf.reason for leaf in planned.leaves if not leaf.pattern)


@pytest.mark.parametrize("name", LINEN)
def test_a_plan_of_the_module_says_the_same(name):
    _, _, _, module, init_args = built(name)
    assert as_hand_written(js.flax.plan(module, MODELS[name].rules, *init_args)) == hand_written(
        name
    )


def test_a_weight_to_which_another_is_added_stays_dense_unless_its_rule_names_the_axis():
    fn, params, args, *_ = built("dictionary, merged LoRA")
    leaves = {
        leaf.path: leaf for leaf in js.plan(params, {"*/w": js.anywhere("2:4")}, fn, *args).leaves
    }
    assert [leaves[path].pattern for path in WEIGHTS] == [None] * len(WEIGHTS)
    assert leaves["head/w"].pattern is not None


def test_a_mesh_constrains_the_sharding_of_boxed_parameters():
    fn, params, args, *_ = built("lm1b, boxed, under a mesh")
    assert str(jax.make_jaxpr(fn)(params, *args)).count("sharding_constraint[") > len(
        jax.tree.leaves(params)
    )


WITH_STACKS = [
    name for name in ONE_OF_EACH_KIND if any(along.stack for along in MODELS[name].planned.values())
]


@pytest.mark.parametrize("name", [*WITH_STACKS, "GPT-2"])
def test_masks_keep_the_largest_two_of_every_four_along_that_axis(name):
    masks = compiled(functools.partial(js.magnitude_masks, plan=plan(name)))(built(name).params)
    jax.tree.map(np.testing.assert_array_equal, masks, masks_by_hand(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_masked_forward_is_that_of_weights_masked_by_hand(name):
    _, params, args, *_ = built(name)
    _, output = dense_model(name)(js.effective_params(params, masks_by_hand(name)), *args)
    np.testing.assert_array_equal(output, expected(name)[1])
    assert not np.allclose(output, dense_model(name)(params, *args)[1], rtol=1e-3, atol=1e-3)


def test_the_ways_to_run_experts_agree():
    outputs = [expected(name)[1] for name in moe.MODELS]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH_KIND if name in LINEN])
def test_the_masked_forward_under_intercept_is_that_of_weights_masked_by_hand(name):
    fn, params, args, *_ = built(name)

    def intercepted(params, masks, *args):
        with js.flax.intercept(masks):
            return fn(params, *args)

    output = compiled(intercepted)(params, masks_by_hand(name), *args)
    np.testing.assert_allclose(output, expected(name)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_compressed_forward_is_the_masked_one(name):
    assert {path for path, leaf in by_path(packed(name)).items() if is_packed(leaf)} == set(
        MODELS[name].planned
    )
    _, output = compressed(name)
    assert output.dtype == expected(name)[1].dtype
    np.testing.assert_allclose(output, expected(name)[1], rtol=1e-5, atol=1e-5)


def test_the_compressed_forward_outside_of_jit_is_the_masked_one():
    name = "dictionary, fused q, k and v"
    fn, _, args, *_ = built(name)
    np.testing.assert_allclose(
        js.sparsify(fn)(packed(name), *args), expected(name)[1], rtol=1e-5, atol=1e-5
    )


def sparse_products(jaxpr):
    """The number of products with compressed weights in a program and the programs inside it."""
    values = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns], is_leaf=is_program)
    inner = [getattr(value, "jaxpr", value) for value in values if is_program(value)]
    return sum(eqn.primitive.name == "sparse_matmul" for eqn in jaxpr.eqns) + sum(
        map(sparse_products, inner)
    )


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("name", MODELS)
def test_every_product_runs_compressed_that_can_and_the_report_says_why_others_do_not(name):
    entry, (fn, _, args, *_) = MODELS[name], built(name)
    sparse = js.sparsify(fn)
    assert sparse_products(jax.make_jaxpr(sparse)(packed(name), *args).jaxpr) == entry.products
    report = sparse.report(packed(name), *args)
    assert sum(not row.reason for row in report.products) == entry.products, str(report)
    assert {
        path for row in report.products if row.reason for path in row.path.split(", ")
    } == entry.decompressed, str(report)
    assert {path for row in report.products for path in row.path.split(", ")} == set(
        entry.planned
    ), str(report)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    # some, such as those of a key's bias, are 0 up to rounding
    largest = max((np.abs(value).max() for value in expected.values()), default=0)
    for path, value in expected.items():
        np.testing.assert_allclose(
            actual[path], value, rtol=1e-3, atol=1e-5 * largest, err_msg=path
        )


def values_of(tree):
    """The leaves by path; for a compressed leaf its values."""
    return {path: leaf.values if is_packed(leaf) else leaf for path, leaf in by_path(tree).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_of_compressed_weights_and_of_inputs_are_the_dense_ones(name):
    (of_params, *of_inputs), _ = expected(name)
    (of_packed, *of_packed_inputs), _ = compressed(name)
    assert_close(
        values_of(of_packed), values_of(js.compress(of_params, masks_by_hand(name), plan(name)))
    )
    assert_close(by_path(of_packed_inputs), by_path(of_inputs))
    assert all(np.abs(values_of(of_packed)[path]).max() > 0 for path in MODELS[name].planned)
