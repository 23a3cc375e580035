"""Equinox models: their arrays are a pytree of parameters like any other."""

import functools

import equinox as eqx
import jax
import numpy as np
import optax

import jaxsparse as js

X = jax.random.normal(jax.random.key(1), (8, 16))
PARAMS, STATIC = eqx.partition(eqx.nn.MLP(16, 4, 8, depth=2, key=jax.random.key(0)), eqx.is_array)


def forward(params, x):
    return jax.vmap(eqx.combine(params, STATIC))(x)


PLAN = js.plan(PARAMS, {"layers/*/weight": js.anywhere("2:4")}, forward, X)


def test_the_plan_groups_along_the_inputs():
    assert {path: (leaf.pattern.axis, len(leaf.summed)) for path, leaf in PLAN.sparse.items()} == {
        f"layers/{i}/weight": (-1, 1) for i in range(3)
    }


def test_training_moves_masks_and_the_result_runs_compressed():
    tx = js.recipes.explore_exploit(optax.adam(0.1), PLAN, reset_every=3)

    @eqx.filter_jit
    def step(model, opt_state, x):
        params, static = eqx.partition(model, eqx.is_array)

        def loss(params):
            return (
                jax.vmap(eqx.combine(js.effective_params(params, opt_state), static))(x) ** 2
            ).mean()

        grads = eqx.filter_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, grads

    model, opt_state = eqx.combine(PARAMS, STATIC), jax.jit(tx.init)(PARAMS)
    before = jax.jit(js.masks)(opt_state)
    for _ in range(5):
        model, opt_state, grads = step(model, opt_state, X)
    masks = jax.jit(js.masks)(opt_state)
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(before), strict=True)
    )
    assert np.any(np.asarray(grads.layers[0].weight)[~np.asarray(masks.layers[0].weight)])

    params = eqx.filter(model, eqx.is_array)
    packed = jax.jit(js.compress)(params, opt_state)
    assert all(isinstance(layer.weight, js.Sparse24) for layer in packed.layers)

    def loss(run, params, x):
        y = run(params, x)
        return (y**2).sum(), y

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(run, params, x):
        return jax.grad(loss, argnums=(1, 2), has_aux=True, allow_int=True)(run, params, x)

    (dense_grads, x_grad), y = gradients(forward, js.effective_params(params, opt_state), X)
    expected = jax.jit(js.compress)(dense_grads, opt_state)
    run = js.sparsify(forward)
    (packed_grads, packed_x_grad), packed_y = gradients(run, packed, X)
    np.testing.assert_allclose(packed_y, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed_x_grad, x_grad, rtol=1e-5, atol=1e-5)
    for layer, like in zip(packed_grads.layers, expected.layers, strict=True):
        np.testing.assert_allclose(layer.weight.values, like.weight.values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.bias, like.bias, rtol=1e-5, atol=1e-5)
    assert [(use.path, use.reason) for use in run.report(packed, X).products] == [
        (f"layers/{i}/weight", "") for i in range(3)
    ]
