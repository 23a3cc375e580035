"""Plans, masks, compressed runs and gradients of whole models against what is known of each by hand; see `zoo`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import LINEN, MODELS

import jaxsparse as js

FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
compiled = functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)


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
def prepared(name):
    fn, params, args, *_ = built(name)
    plan = js.plan(params, MODELS[name].rules, fn, *args)
    masks = js.magnitude_masks(params, plan)
    return Prepared(fn, params, args, plan, masks, js.compress(params, masks, plan))


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


def as_tables_say(plan):
    return {leaf.path: (leaf.pattern.axis, leaf.stack, leaf.summed) for leaf in plan.leaves if leaf.pattern}


@pytest.mark.parametrize("name", MODELS)
def test_just_the_weights_that_a_product_sums_over_are_planned_and_along_the_axis_it_sums_over(name):
    model, (fn, params, args, *_) = MODELS[name], built(name)
    plan = js.plan(params, model.rules, fn, *args)
    assert as_tables_say(plan) == hand_written(name), str(plan)
    assert [leaf.path for leaf in plan.leaves] == list(by_path(params))
    assert all(leaf.reason for leaf in plan.leaves if not leaf.pattern)


@pytest.mark.parametrize("name", LINEN)
def test_a_plan_of_the_module_says_the_same(name):
    _, _, _, module, init_args = built(name)
    assert as_tables_say(js.flax.plan(module, MODELS[name].rules, *init_args)) == hand_written(name)


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


@pytest.mark.parametrize("name", ["Gemma, scan of remat", "GPT-2"])
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


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), (_, b) in zip(*(jax.tree.leaves_with_path(tree) for tree in (found, expected)), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_compressed_weights_and_of_inputs_are_the_dense_ones(name):
    fn, _, args, plan, masks, packed = prepared(name)
    inputs = [i for i, arg in enumerate(args) if isinstance(arg, jax.Array) and jnp.issubdtype(arg.dtype, jnp.floating)]
    gradient = functools.partial(jax.grad, argnums=(0, *(1 + i for i in inputs)), allow_int=True)

    def loss_of(fn):
        return lambda *args: jnp.square(fn(*args)).mean()

    dense, *of_inputs = compiled(gradient(loss_of(fn)))(masked_by_numpy(name), *args)
    found, *found_of_inputs = compiled(gradient(loss_of(js.sparsify(fn))))(packed, *args)
    assert_close(found_of_inputs, of_inputs)
    kept = js.compress(dense, masks, plan)
    found, kept = (
        by_path(jax.tree.map(lambda leaf: leaf.values if is_packed(leaf) else leaf, tree, is_leaf=is_packed)) for tree in (found, kept)
    )
    assert_close(found, kept)
    assert all(np.abs(found[path]).max() > 0 for path in MODELS[name].planned)
