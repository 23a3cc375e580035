"""Plans, masks, compressed runs and gradients of whole models against what is known of each by hand; see `zoo`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import LINEN, MODELS

import jaxsparse as js

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


class Prepared(NamedTuple):
    """A model with its plan, masks and compressed weights."""

    fn: Any
    params: Any
    args: tuple
    plan: js.Plan
    masks: Any
    packed: Any


@functools.cache
def built(name):
    return MODELS[name].build()


@functools.cache
def plan(name):
    fn, params, args, *_ = built(name)
    return js.plan(params, MODELS[name].rules, fn, *args)


@functools.cache
def prepared(name):
    fn, params, args, *_ = built(name)
    masks = compiled(functools.partial(js.magnitude_masks, plan=plan(name)))(params)
    return Prepared(fn, params, args, plan(name), masks, js.compress(params, masks, plan(name)))


def by_path(tree):
    """The leaves by their paths, as the tables of the zoo name them."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_packed)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {path.removeprefix("params/").removesuffix("/value"): leaf for path, leaf in named.items()}


def is_packed(leaf):
    return isinstance(leaf, js.Sparse24)


def largest_two_of_four(w, axis):
    moved = np.moveaxis(np.abs(w), axis, -1)
    ranks = (-moved).reshape(-1, 4).argsort(axis=-1).argsort(axis=-1)
    return np.moveaxis((ranks < 2).reshape(moved.shape), -1, axis)


@functools.cache
def masked_by_numpy(name):
    params, planned = built(name).params, MODELS[name].planned
    weights = {path: np.asarray(w) for path, w in by_path(params).items()}
    masked = [
        jnp.asarray(np.where(largest_two_of_four(w, planned[path].axis), w, 0)) if path in planned else w for path, w in weights.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), masked)


@functools.cache
def forward(name):
    return compiled(built(name).fn)


@functools.cache
def expected(name):
    return forward(name)(masked_by_numpy(name), *built(name).args)


def hand_written(name):
    return {path: (along.axis, along.stack, along.summed or (along.axis,)) for path, along in MODELS[name].planned.items()}


def as_hand_written(plan):
    return {leaf.path: (leaf.pattern.axis, leaf.stack, leaf.summed) for leaf in plan.leaves if leaf.pattern}


@pytest.mark.parametrize("name", MODELS)
def test_just_the_weights_that_a_product_sums_over_are_planned_and_along_the_axis_it_sums_over(name):
    found = plan(name)
    assert as_hand_written(found) == hand_written(name), str(found)
    assert [leaf.path for leaf in found.leaves] == list(by_path(built(name).params))
    assert all(leaf.reason for leaf in found.leaves if not leaf.pattern)


@pytest.mark.parametrize("name", LINEN)
def test_a_plan_of_the_module_says_the_same(name):
    _, _, _, module, init_args = built(name)
    assert as_hand_written(js.flax.plan(module, MODELS[name].rules, *init_args)) == hand_written(name)


@pytest.mark.parametrize("name", MODELS)
def test_masks_keep_the_largest_two_of_every_four_along_that_axis(name):
    planned, weights = MODELS[name].planned, by_path(built(name).params)
    for path, mask in by_path(prepared(name).masks).items():
        if path in planned:
            np.testing.assert_array_equal(mask, largest_two_of_four(np.asarray(weights[path]), planned[path].axis), err_msg=path)
        else:
            assert mask.shape == (), path


@pytest.mark.parametrize("name", MODELS)
def test_the_masked_forward_is_that_of_weights_masked_by_hand(name):
    _, params, args, _, masks, _ = prepared(name)
    found = forward(name)(js.sparse_params(params, masks), *args)
    np.testing.assert_array_equal(found, expected(name))
    assert not np.allclose(found, forward(name)(params, *args), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LINEN)
def test_the_masked_forward_under_intercept_is_that_of_weights_masked_by_hand(name):
    fn, params, args, _, masks, _ = prepared(name)

    def intercepted(params, masks, *args):
        with js.flax.intercept(masks):
            return fn(params, *args)

    np.testing.assert_allclose(compiled(intercepted)(params, masks, *args), expected(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_compressed_forward_is_the_masked_one(name):
    fn, _, args, _, _, packed = prepared(name)
    assert {path for path, leaf in by_path(packed).items() if is_packed(leaf)} == set(MODELS[name].planned)
    found = compiled(js.sparsify(fn))(packed, *args)
    assert found.dtype == expected(name).dtype
    np.testing.assert_allclose(found, expected(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT-2"])
def test_the_compressed_forward_outside_of_jit_is_the_masked_one(name):
    fn, _, args, _, _, packed = prepared(name)
    np.testing.assert_allclose(js.sparsify(fn)(packed, *args), expected(name), rtol=1e-5, atol=1e-5)


def sparse_products(jaxpr):
    """How many products of compressed weights a program holds, those of the programs inside it among them."""
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)]
    own = sum(eqn.primitive.name == "sparse_matmul" for eqn in jaxpr.eqns)
    return own + sum(sparse_products(getattr(value, "jaxpr", value)) for value in inner if is_program(value))


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("name", MODELS)
def test_every_product_runs_compressed_that_can_and_the_report_says_why_others_do_not(name):
    model, (fn, _, args, _, _, packed) = MODELS[name], prepared(name)
    sparse = js.sparsify(fn)
    assert sparse_products(jax.make_jaxpr(sparse)(packed, *args).jaxpr) == model.products
    report = sparse.report(packed, *args)
    assert {row.path for row in report.products if row.reason} == model.decompressed, str(report)
    assert {row.path for row in report.products} == set(model.planned), str(report)


# one of each kind: two programs to compile for each take most of the time
WITH_GRADIENTS = [
    "Gemma, scan of remat",
    "lm1b, boxed, under a mesh",
    "T5, scan along axis 1, tied",
    "MoE, dispatch and combine",
    "MoE, ragged products",
    "MoE, gathered experts",
    "LSTM translator",
    "ViT over latents, convolutional head",
    "ResNet",
    "GPT-2",
    "NNX Gemma, scan",
    "Equinox, scan",
    "dictionary, fused q, k and v",
    "dictionary, merged LoRA",
    "dictionary, muP",
    "dictionary, weight normalisation",
]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    largest = max((np.abs(value).max() for value in expected.values()), default=0)  # some are 0 but for rounding, as those of a key's bias
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-3, atol=1e-5 * largest, err_msg=path)


def values_of(tree):
    """The leaves by path, of a compressed one its values."""
    return {path: leaf.values if is_packed(leaf) else leaf for path, leaf in by_path(tree).items()}


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_of_compressed_weights_and_of_inputs_are_the_dense_ones(name):
    fn, _, args, plan, masks, packed = prepared(name)
    inputs = [1 + i for i, arg in enumerate(args) if isinstance(arg, jax.Array) and jnp.issubdtype(arg.dtype, jnp.floating)]

    def gradients(fn, *args):
        def loss(*args):
            return jnp.square(fn(*args)).mean()

        return compiled(jax.grad(loss, argnums=(0, *inputs), allow_int=True))(*args)

    dense, *of_inputs = gradients(fn, masked_by_numpy(name), *args)
    found, *found_of_inputs = gradients(js.sparsify(fn), packed, *args)
    assert_close(values_of(found), values_of(js.compress(dense, masks, plan)))
    assert_close(by_path(found_of_inputs), by_path(of_inputs))
    assert all(np.abs(values_of(found)[path]).max() > 0 for path in MODELS[name].planned)
