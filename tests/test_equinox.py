"""Equinox models: their arrays are a pytree of parameters like any other."""

import equinox as eqx
import jax
import numpy as np
import optax

import jaxsparse as js

X = jax.random.normal(jax.random.key(1), (8, 16))
PARAMS, STATIC = eqx.partition(eqx.nn.MLP(16, 4, 8, depth=2, key=jax.random.key(0)), eqx.is_array)


def forward(params, x):
    return jax.vmap(eqx.combine(params, STATIC))(x)


PLAN = js.plan(PARAMS, {"layers/*/weight": "2:4"}, forward, X)


def test_the_plan_groups_along_the_inputs():
    assert {path: (leaf.pattern.axis, len(leaf.summed)) for path, leaf in PLAN.sparse.items()} == {
        f"layers/{i}/weight": (-1, 1) for i in range(3)
    }


def test_training_moves_masks_and_the_result_runs_compressed():
    tx = js.recipes.rewired(optax.adam(0.1), PLAN, reset_every=3)

    @eqx.filter_jit
    def step(model, opt_state, x):
        params, static = eqx.partition(model, eqx.is_array)

        def loss(params):
            return (jax.vmap(eqx.combine(js.sparse_params(params, opt_state), static))(x) ** 2).mean()

        grads = eqx.filter_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, grads

    model, opt_state = eqx.combine(PARAMS, STATIC), jax.jit(tx.init)(PARAMS)
    before = js.masks(opt_state)
    for _ in range(5):
        model, opt_state, grads = step(model, opt_state, X)
    masks = js.masks(opt_state)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(before), strict=True))
    assert np.any(np.asarray(grads.layers[0].weight)[~np.asarray(masks.layers[0].weight)])

    params = eqx.filter(model, eqx.is_array)
    packed = js.compress(params, opt_state)
    assert all(isinstance(layer.weight, js.Sparse24) for layer in packed.layers)
    sparse = js.sparse_params(params, opt_state)
    run = js.sparsify(forward)
    np.testing.assert_allclose(jax.jit(run)(packed, X), forward(sparse, X), rtol=1e-5, atol=1e-6)
    assert str(jax.make_jaxpr(run)(packed, X)).count("sparse_matmul[") == 3

    def loss(run, params, x):
        return (run(params, x) ** 2).sum()

    np.testing.assert_allclose(
        jax.grad(loss, argnums=2)(run, packed, X), jax.grad(loss, argnums=2)(forward, sparse, X), rtol=1e-5, atol=1e-5
    )
    found = jax.grad(loss, argnums=1, allow_int=True)(run, packed, X)
    expected = js.compress(jax.grad(loss, argnums=1)(forward, sparse, X), masks, PLAN)
    for layer, like in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_allclose(layer.weight.values, like.weight.values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.bias, like.bias, rtol=1e-5, atol=1e-5)
