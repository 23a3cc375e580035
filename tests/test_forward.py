"""Effective weights and their gradients against NumPy."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

W = np.array([1.0, 2.0, 3.0, 4.0], "float32")
MASK = np.array([False, False, True, True])
G = np.array([10.0, -20.0, 30.0, -40.0], "float32")
DECAYS = [0.0, 0, 0.25, 0.75, 1.0]


def effective(w, mask, decay):
    return np.array(
        [x if keep else (decay * x if decay else 0) for x, keep in zip(w, mask, strict=True)],
        "float32",
    )


def gradient_of(w, mask, decay, gradient, g=G):
    return jax.grad(lambda w: (js.effective_weight(w, mask, decay, gradient=gradient) * g).sum())(w)


def test_worked_values_of_progressive_gradient_flow():
    np.testing.assert_array_equal(
        js.effective_weight(W, MASK, js.linear_decay(0.01)(25)), [0.75, 1.5, 3, 4]
    )
    np.testing.assert_allclose(
        js.effective_weight(W, MASK, js.exponential_decay(0.01)(25)),
        [0.7788, 1.5576, 3, 4],
        atol=5e-5,
    )


@pytest.mark.parametrize("gradient", ["dense", "masked"])
@pytest.mark.parametrize("decay", DECAYS)
def test_value_is_the_formula(decay, gradient):
    expected = effective(W, MASK, decay)
    for d in (decay, jnp.asarray(decay, jnp.float32)):
        np.testing.assert_array_equal(js.effective_weight(W, MASK, d, gradient=gradient), expected)
        np.testing.assert_array_equal(
            jax.jit(js.effective_weight, static_argnames="gradient")(W, MASK, d, gradient=gradient),
            expected,
        )


@pytest.mark.parametrize("decay", DECAYS)
def test_dense_gradient_reaches_every_weight_unscaled(decay):
    np.testing.assert_array_equal(gradient_of(W, MASK, decay, "dense"), G)
    np.testing.assert_array_equal(
        jax.jit(gradient_of, static_argnums=3)(W, MASK, decay, "dense"), G
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_masked_gradient_is_scaled_as_the_weight_is(decay):
    expected = effective(G, MASK, decay)
    np.testing.assert_array_equal(gradient_of(W, MASK, decay, "masked"), expected)
    np.testing.assert_array_equal(
        jax.jit(gradient_of, static_argnums=3)(W, MASK, decay, "masked"), expected
    )


@pytest.mark.parametrize("gradient", ["dense", "masked"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_inf_and_nan_in_dropped_weights_stay_out(gradient, bad):
    w = np.array([bad, bad, 3.0, 4.0], "float32")
    square = lambda w, d: (js.effective_weight(w, MASK, d, gradient=gradient) ** 2).sum()  # noqa: E731
    for decay in (0.0, jnp.float32(0), js.linear_decay(0.1)(10)):
        for value_and_grad in (jax.value_and_grad(square), jax.jit(jax.value_and_grad(square))):
            value, grad = value_and_grad(w, decay)
            assert value == 25
            np.testing.assert_array_equal(grad, [0, 0, 6, 8])


def test_nan_in_participating_weights_is_seen():
    assert np.isnan(
        js.effective_weight(np.array([1, np.nan], "float32"), np.array([False, True]))
    ).tolist() == [False, True]


def test_gradients_with_respect_to_the_rest_see_the_effective_weight():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    w = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    mask = w > 0
    for gradient, w_scale in (("dense", np.ones_like(w)), ("masked", np.where(mask, 1, 0.5))):

        def loss(w, x, gradient=gradient):
            return ((x @ js.effective_weight(w, mask, 0.5, gradient=gradient)) ** 2).sum() / 2

        w_grad, x_grad = jax.grad(loss, (0, 1))(w, x)
        used = np.where(mask, w, 0.5 * w)
        np.testing.assert_allclose(x_grad, (x @ used) @ used.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(w_grad, x.T @ (x @ used) * w_scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_transformations_give_the_same(gradient):
    rng = np.random.default_rng(2)
    w, mask = (
        jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        jnp.asarray(rng.random((3, 4)) < 0.5),
    )
    decay = jnp.array([0.0, 0.5, 1.0])
    f = lambda w, mask, d: js.effective_weight(w, mask, d, gradient=gradient)  # noqa: E731
    loss = lambda w, mask, d: jnp.sin(f(w, mask, d)).sum()  # noqa: E731
    rows = list(zip(w, mask, decay, strict=True))
    values = np.stack([f(*row) for row in rows])
    grads = np.stack([jax.grad(loss)(*row) for row in rows])
    np.testing.assert_array_equal(jax.vmap(f)(w, mask, decay), values)
    np.testing.assert_array_equal(
        jax.vmap(f, (0, None, None))(w, mask[0], 0.5)[0], f(w[0], mask[0], 0.5)
    )
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(w, mask, decay), grads, rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda w: jax.vmap(loss)(w, mask, decay).sum())(w), grads, rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.vmap(jax.grad(jax.checkpoint(loss)))(w, mask, decay), grads, rtol=1e-6
    )

    def scanned(w):
        rows = w, mask, decay
        return jax.lax.scan(lambda total, row: (total + loss(*row), None), 0.0, rows)[0]

    np.testing.assert_allclose(jax.grad(scanned)(w), grads, rtol=1e-6)


@pytest.mark.parametrize(
    ("gradient", "decay"), [("dense", 0.25), ("masked", 0.25), ("dense", 0.0), ("masked", 0.0)]
)
def test_forward_mode_agrees_with_reverse_mode(gradient, decay):
    f = lambda w: js.effective_weight(w, MASK, decay, gradient=gradient)  # noqa: E731
    value, tangent = jax.jvp(f, (W,), (G,))
    np.testing.assert_array_equal(value, effective(W, MASK, decay))
    np.testing.assert_array_equal(tangent, jax.vjp(f, W)[1](G)[0])
    np.testing.assert_array_equal(jax.jacfwd(f)(W), jax.jacrev(f)(W))
    hessian = jax.hessian(lambda w: (f(w) ** 3).sum())(W)
    scale = np.ones(4) if gradient == "dense" else effective(np.ones(4), MASK, decay)
    np.testing.assert_allclose(
        hessian, np.diag(6 * effective(W, MASK, decay) * scale**2), rtol=1e-5
    )


def test_a_traced_decay_does_not_retrace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def f(step):
        return jax.grad(
            lambda w: js.effective_weight(
                w, MASK, js.linear_decay(0.25)(step), gradient="masked"
            ).sum()
        )(W)

    assert [f(step).tolist()[0] for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_narrow_dtypes_are_kept(dtype, gradient):
    w = jnp.asarray(W, dtype)
    for decay in (0.0, 0.5, jnp.float32(0.5)):
        value, vjp = jax.vjp(
            lambda w, d=decay: js.effective_weight(w, MASK, d, gradient=gradient), w
        )
        (grad,) = vjp(jnp.ones(4, dtype))
        assert value.dtype == grad.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(value.astype("float32"), effective(W, MASK, float(decay)))


def test_a_scalar_mask_covers_the_whole_leaf():
    np.testing.assert_array_equal(js.effective_weight(W, jnp.asarray(True)), W)
    np.testing.assert_array_equal(js.effective_weight(W, False, 0.5), W / 2)
    np.testing.assert_array_equal(gradient_of(W, True, 0.0, "masked"), G)


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array


def tree():
    w = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)), jnp.float32)
    return {
        "layers": [Layer(w, jnp.ones(4)), Layer(2 * w, jnp.ones(4))],
        "head": (w + 1, jnp.zeros(())),
    }


RULES = {"layers/*/w": js.NM(2, 4, axis=0)}


def sources():
    params = tree()
    plan = js.plan(params, RULES)
    for tx in (
        js.rewire(optax.sgd(0.1), plan),
        js.recipes.explore_exploit(optax.adamw(1e-3), plan),
        optax.chain(optax.clip(1.0), js.rewire(optax.sgd(0.1), plan)),
        optax.MultiSteps(js.rewire(optax.adam(0.1), plan), 3),
    ):
        yield tx.init(params)
    yield js.magnitude_masks(params, plan)
    yield jax.tree.map(np.asarray, js.magnitude_masks(params, plan))


@pytest.mark.parametrize(
    "source", list(sources()), ids=["sgd", "recipe", "chain", "MultiSteps", "masks", "numpy masks"]
)
def test_sparse_params_masks_the_planned_leaves_only(source):
    params = tree()
    masks = js.magnitude_masks(params, js.plan(params, RULES))
    for masked in (
        js.effective_params(params, source),
        jax.jit(js.effective_params)(params, source),
    ):
        assert jax.tree.structure(masked) == jax.tree.structure(params)
        jax.tree.map(
            lambda f, w, mask: np.testing.assert_array_equal(f, np.where(mask, w, 0)),
            masked,
            params,
            masks,
        )


@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_sparse_params_has_either_gradient(gradient):
    params = tree()
    masks = js.magnitude_masks(params, js.plan(params, RULES))
    grads = jax.grad(
        lambda p: sum(
            w.sum() for w in jax.tree.leaves(js.effective_params(p, masks, gradient=gradient))
        )
    )(params)
    for layer, mask in zip(grads["layers"], masks["layers"], strict=True):
        np.testing.assert_array_equal(layer.w, np.ones((4, 4)) if gradient == "dense" else mask.w)
        np.testing.assert_array_equal(layer.b, 1)


def test_gradients_keep_less_than_one_masked_copy_of_a_kernel():
    params = {f"layer_{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(8)}
    plan = js.plan(params, {"*": js.NM(2, 4, axis=0)})
    masks = jax.eval_shape(lambda p: js.magnitude_masks(p, plan), params)

    def loss(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x.sum()

    def temporaries(f):
        x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
        return (
            jax.jit(jax.grad(f))
            .lower(params, masks, x)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    dense = temporaries(lambda params, masks, x: loss(params, x))
    sparse = temporaries(lambda params, masks, x: loss(js.effective_params(params, masks), x))
    assert sparse - dense < 4 * 1024 * 1024
