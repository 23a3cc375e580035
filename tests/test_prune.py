"""One-shot pruning of traced programs, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jaxsparse as js


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def inputs(rows, k, seed=1):
    """Rows whose columns are correlated and of different sizes."""
    mix = np.random.default_rng(seed).normal(size=(k, k)) / np.sqrt(k)
    sizes = np.exp(np.random.default_rng(seed + 1).normal(size=k))
    rows = np.random.default_rng(seed + 2).normal(size=(rows, k)) @ (np.eye(k) + mix) * sizes
    return jnp.asarray(rows, jnp.float32)


def groups_kept(scores, n, m):
    """True for the n highest of every m along the last axis; among equal ones the first."""
    mask = np.zeros(scores.shape, bool)
    for row, group in np.ndindex(scores.shape[0], scores.shape[1] // m):
        part = scores[row, group * m : (group + 1) * m]
        for i in sorted(range(m), key=lambda i: (-part[i], i))[:n]:
            mask[row, group * m + i] = True
    return mask


def wanda(w, x, n, m):
    """`w` is `[M, K]` and x `[R, K]`."""
    return groups_kept(np.abs(w) * np.sqrt((x**2).mean(0)), n, m)


def sparsegpt(w, x, n, m, damping=0.01, block=128):
    """Algorithm 1 of the paper in float64; returns the weights and the mask."""
    w, x = np.array(w, np.float64), np.asarray(x, np.float64)
    hessian = x.T @ x
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    k = w.shape[1]
    hessian += damping * np.mean(np.diag(x.T @ x)) * np.eye(k)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    mask = np.zeros(w.shape, bool)
    for first in range(0, k, block):
        last = min(first + block, k)
        errors = np.zeros((len(w), last - first))
        for i in range(first, last):
            if i % m == 0:
                here = slice(i, i + m)
                scores = w[:, here] ** 2 / np.diag(factor)[here] ** 2
                mask[:, here] = groups_kept(scores, n, m)
            error = np.where(mask[:, i], 0, w[:, i]) / factor[i, i]
            w[:, i:last] -= np.outer(error, factor[i, i:last])
            errors[:, i - first] = error
        w[:, last:] -= errors @ factor[first:last, last:]
    return np.where(mask, w, 0), mask


def product(params, x):
    return x @ params["w"]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
@pytest.mark.parametrize("block", [128, 32])
def test_sparsegpt_equals_numpy(n, m, block):
    x, params = inputs(512, 160), {"w": normal(160, 48)}
    plan = js.plan(params, {"w": js.NM(n, m)}, product, x)
    pruned, masks = js.prune(product, params, plan, x, block=block)
    w, mask = sparsegpt(params["w"].T, x, n, m, block=block)
    np.testing.assert_array_equal(masks["w"].T, mask)
    np.testing.assert_allclose(pruned["w"].T, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_wanda_and_magnitude_equal_numpy(method):
    x, params = inputs(64, 32), {"w": normal(32, 48), "b": jnp.ones(48)}
    plan = js.plan(params, {"w": "2:4"}, product, x)
    pruned, masks = js.prune(product, params, plan, x, method=method)
    mask = wanda(params["w"].T, x if method == "wanda" else np.ones((1, 32)), 2, 4)
    np.testing.assert_array_equal(masks["w"].T, mask)
    np.testing.assert_array_equal(pruned["w"], np.where(mask.T, params["w"], 0))
    assert masks["b"] and pruned["b"] is params["b"]


def test_an_input_that_is_always_0_has_weights_of_0():
    x, params = inputs(64, 32).at[:, 5:8].set(0), {"w": normal(32, 16)}
    plan = js.plan(params, {"w": "2:4"}, product, x)
    pruned, masks = js.prune(product, params, plan, x)
    w, mask = sparsegpt(params["w"].T, x, 2, 4)
    np.testing.assert_allclose(pruned["w"].T, w, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(masks["w"].T, mask)
    assert not pruned["w"][5:8].any()


def unrolled(params, x):
    for up, down in zip(params["up"], params["down"], strict=True):
        x = jnp.tanh(x @ up) @ down + x
    return x


def scanned(params, x):
    def layer(x, p):
        return jnp.tanh(x @ p["up"]) @ p["down"] + x, None

    return lax.scan(jax.checkpoint(layer), x, params)[0]


LAYERS = {"up": normal(3, 16, 32, scale=0.3), "down": normal(3, 32, 16, seed=4, scale=0.3)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("fn", [unrolled, scanned])
def test_each_layer_is_pruned_on_what_the_pruned_layers_before_it_give(fn, method):
    x = inputs(200, 16)
    plan = js.plan(LAYERS, {"*": js.anywhere("2:4")}, fn, x)
    pruned, masks = js.prune(fn, LAYERS, plan, x, method=method)
    values = np.asarray(x)
    for i in range(3):
        hidden = values
        for name in ("up", "down"):
            dense = LAYERS[name][i].T
            if method == "wanda":
                mask = wanda(dense, hidden, 2, 4)
                w = np.where(mask, dense, 0)
            else:
                w, mask = sparsegpt(dense, hidden, 2, 4)
            np.testing.assert_array_equal(masks[name][i].T, mask)
            np.testing.assert_allclose(pruned[name][i].T, w, rtol=1e-3, atol=1e-3)
            hidden = hidden @ w.T
            hidden = np.tanh(hidden) if name == "up" else hidden
        values = hidden + values
    js.compress(pruned, masks, plan)


@pytest.mark.slow
def test_batches_are_as_good_as_one():
    x = inputs(120, 16)
    plan = js.plan(LAYERS, {"*": js.anywhere("2:4")}, scanned, x[:40])
    batches = [(part,) for part in jnp.split(x, 3)]
    for method in ("wanda", "sparsegpt"):
        apart = js.prune(scanned, LAYERS, plan, batches=batches, method=method)
        whole = js.prune(scanned, LAYERS, plan, x, method=method)
        jax.tree.map(np.testing.assert_array_equal, apart.masks, whole.masks)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            apart.params,
            whole.params,
        )


def test_weights_that_share_an_input_share_its_moments(monkeypatch):
    from jaxsparse._pruning import methods

    calls = []
    monkeypatch.setattr(methods, "_outer", lambda x, f=methods._outer: calls.append(1) or f(x))
    params = {name: normal(16, 8, seed=i) for i, name in enumerate("qkv")}

    def fn(params, x):
        return (x @ params["q"]) * (x @ params["k"]) + x @ params["v"]

    x, order = inputs(64, 16), []
    plan = js.plan(params, {"*": js.anywhere("2:4")}, fn, x)
    js.prune(fn, params, plan, x, progress=order.append)
    assert len(calls) == 1 and order == ["q", "k", "v"]


def recurrent(params, xs):
    return lax.scan(lambda h, x: (jnp.tanh(x @ params["x"] + h @ params["h"]), h), xs[0], xs)[1]


def test_a_weight_that_a_loop_uses_is_pruned_on_the_inputs_of_all_steps():
    params = {"x": normal(16, 16, scale=0.3), "h": normal(16, 16, seed=2, scale=0.3)}
    xs = inputs(20 * 8, 16).reshape(20, 8, 16)
    plan = js.plan(params, {"*": js.anywhere("2:4")}, recurrent, xs)
    _, masks = js.prune(recurrent, params, plan, xs, method="wanda")
    states = np.asarray(recurrent(params, xs)).reshape(-1, 16)
    np.testing.assert_array_equal(masks["x"].T, wanda(params["x"].T, xs.reshape(-1, 16), 2, 4))
    np.testing.assert_array_equal(masks["h"].T, wanda(params["h"].T, states, 2, 4))


def looped(params, x):
    def body(carry):
        i, x = carry
        return i + 1, jnp.tanh(x @ params["w"])

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def branched(params, x):
    return lax.cond(x.sum() > 0, lambda x: x @ params["w"], lambda x: -x @ params["w"], x)


@pytest.mark.slow
@pytest.mark.parametrize("fn", [looped, branched])
def test_weights_in_loops_and_branches(fn):
    params, x = {"w": normal(16, 16, scale=0.3)}, inputs(32, 16)
    plan = js.plan(params, {"w": "2:4"}, fn, x)
    _, masks = js.prune(fn, params, plan, batches=[(x,), (x - 1,)], method="wanda")
    rows = [x, x - 1]
    for _ in range(2 if fn is looped else 0):
        rows += [jnp.tanh(one @ params["w"]) for one in rows[-2:]]
    np.testing.assert_array_equal(masks["w"].T, wanda(params["w"].T, np.concatenate(rows), 2, 4))


@jax.custom_jvp
def custom(w, x):
    return x @ w


custom.defjvp(lambda primals, tangents: jax.jvp(lambda w, x: x @ w, primals, tangents))
# the weight as `[M, K]` and the rows of its input as `[R, K]`, from the parameter and the input
SHAPES = {
    "outputs cut apart": (
        (16, 12),
        lambda w, x: [x @ part for part in jnp.split(w, 3, 1)],
        lambda w, x: (w.T, x),
        (32, 16),
    ),
    "transposed": ((8, 16), lambda w, x: x @ w.T, lambda w, x: (w, x), (32, 16)),
    "heads": (
        (16, 2, 4),
        lambda w, x: jnp.einsum("ri,ihd->rhd", x, w),
        lambda w, x: (w.reshape(16, 8).T, x),
        (32, 16),
    ),
    "heads summed": (
        (2, 8, 6),
        lambda w, x: jnp.einsum("rhd,hdo->ro", x.reshape(-1, 2, 8), w),
        lambda w, x: (w.reshape(16, 6).T, x),
        (32, 16),
    ),
    "heads merged": (
        (2, 8, 6),
        lambda w, x: x @ w.reshape(16, 6),
        lambda w, x: (w.reshape(16, 6).T, x),
        (32, 16),
    ),
    "scaled": (
        (16, 6),
        lambda w, x: x @ (w * jnp.arange(1.0, 7)[None]),
        lambda w, x: (w.T, x),
        (32, 16),
    ),
    "through a custom derivative": (
        (16, 6),
        lambda w, x: custom(w, x),
        lambda w, x: (w.T, x),
        (32, 16),
    ),
    "1x1 convolution": (
        (1, 1, 8, 6),
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        lambda w, x: (w.reshape(8, 6).T, x.reshape(-1, 8)),
        (2, 4, 4, 8),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_any_shape(name):
    shape, fn, matrices, of_x = SHAPES[name]
    params, x = {"w": normal(*shape)}, inputs(np.prod(of_x[:-1]), of_x[-1]).reshape(of_x)
    run = lambda params, x: fn(params["w"], x)  # noqa: E731
    plan = js.plan(params, {"w": "2:4"}, run, x)
    _, masks = js.prune(run, params, plan, x, method="wanda")
    w, rows = matrices(params["w"], x)
    kept, _ = matrices(masks["w"], x)
    np.testing.assert_array_equal(kept, wanda(w, rows, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_pruned_on_its_patches(stride):
    params, x = {"w": normal(3, 2, 8, 6)}, normal(2, 5, 6, 8, seed=3)

    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return lax.conv_general_dilated(x, params["w"], strides, "SAME", dimension_numbers=numbers)

    plan = js.plan(params, {"w": "2:4"}, fn, x)
    pruned, masks = js.prune(fn, params, plan, x)
    # SAME pads 3 by 1 on each side, and 2 by 1 after; for a stride of 2 along 6 by none
    after = {1: ((1, 1), (0, 1)), 2: ((1, 1), (0, 0))}[stride]
    padded = np.pad(x, ((0, 0), *after, (0, 0)))
    rows = [
        padded[b, i : i + 3, j : j + 2].reshape(-1)
        for b in range(2)
        for i in range(0, 5, stride)
        for j in range(0, 6, stride)
    ]
    w, mask = sparsegpt(params["w"].reshape(48, 6).T, np.array(rows), 2, 4)
    np.testing.assert_array_equal(masks["w"].reshape(48, 6).T, mask)
    np.testing.assert_allclose(pruned["w"].reshape(48, 6).T, w, rtol=1e-3, atol=1e-3)


def experts(params, x):
    return jnp.einsum("ecd,edf->ecf", x.reshape(4, -1, 16), params["w"])


def ragged(params, x):
    return lax.ragged_dot(x, params["w"], jnp.array([10, 20, 30, 4]))


def mapped(params, x):
    return jax.vmap(lambda w, x: x @ w)(params["w"], x.reshape(4, -1, 16))


def indexed(params, x):
    return [part @ params["w"][i] for i, part in enumerate(jnp.split(x, 4))]


@pytest.mark.parametrize("fn", [experts, ragged, mapped, indexed])
def test_each_weight_of_a_stack_is_pruned_on_its_own_inputs(fn):
    params, x = {"w": normal(4, 16, 8)}, inputs(64, 16)
    plan = js.plan(params, {"w": "2:4"}, fn, x)
    pruned, masks = js.prune(fn, params, plan, x)
    ends = [0, 10, 30, 60, 64] if fn is ragged else [0, 16, 32, 48, 64]
    for i in range(4):
        w, mask = sparsegpt(params["w"][i].T, x[ends[i] : ends[i + 1]], 2, 4)
        np.testing.assert_array_equal(masks["w"][i].T, mask)
        np.testing.assert_allclose(pruned["w"][i].T, w, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "method"),
    [
        (js.TransposableNM(2, 4), "wanda"),
        (js.TransposableNM(2, 4), "sparsegpt"),
        (js.Unstructured(0.3), "wanda"),
        (js.Unstructured(0.3), "sparsegpt"),
        (js.Block((4, 4), 0.5), "wanda"),
    ],
    ids=str,
)
def test_other_patterns(pattern, method):
    params, x = {"w": normal(32, 16)}, inputs(128, 32)
    plan = js.plan(params, {"w": pattern}, product, x)
    pruned, masks = js.prune(product, params, plan, x, method=method)
    assert masks["w"].mean() == pytest.approx(pattern.density, abs=0.01)
    assert not jnp.where(masks["w"], 0, pruned["w"]).any()
    if isinstance(pattern, js.TransposableNM):
        for mask in (masks["w"], masks["w"].T):
            np.testing.assert_array_equal(mask.reshape(-1, 4, mask.shape[1]).sum(1), 2)

    def error(params):
        return jnp.square(product(params, x) - product(plain, x)).mean()

    plain = params
    magnitude = js.prune(product, params, plan, method="magnitude").params
    assert error(pruned) < error(magnitude)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_stay(dtype):
    params = {"w": normal(16, 8).astype(dtype)}
    x = inputs(64, 16).astype(dtype)
    plan = js.plan(params, {"w": "2:4"}, product, x)
    pruned, masks = js.prune(product, params, plan, x)
    assert pruned["w"].dtype == dtype and masks["w"].dtype == bool
    w, mask = sparsegpt(np.asarray(params["w"].T, np.float64), np.asarray(x, np.float64), 2, 4)
    np.testing.assert_array_equal(masks["w"].T, mask)
    np.testing.assert_allclose(np.asarray(pruned["w"].T, np.float64), w, rtol=1e-2, atol=1e-2)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        x = nn.MultiHeadDotProductAttention(2, qkv_features=16, name="attention")(x)
        x = nn.relu(nn.Dense(32, kernel_init=init, name="up")(x))
        return nn.Dense(16, name="down")(x)


def test_a_flax_model_with_boxes_trains_on():
    x = inputs(60, 16).reshape(4, 15, 16)
    model = Model()
    params = model.init(jax.random.key(0), x)
    plan = js.flax.plan(model, {"*/kernel": js.anywhere("2:4")}, x)
    pruned, masks = js.prune(model.apply, params, plan, x)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    tx = js.recipes.static(optax.sgd(0.1), plan, masks=masks)
    grads = jax.tree.map(jnp.ones_like, pruned)
    updates, state = tx.update(grads, tx.init(pruned), pruned)
    kept = js.effective_params(optax.apply_updates(pruned, updates), state)
    jax.tree.map(
        lambda w, mask: np.testing.assert_array_equal(np.where(mask, 0, w), 0), kept, masks
    )
    packed = js.compress(pruned, masks, plan)
    np.testing.assert_allclose(
        js.sparsify(model.apply)(packed, x), model.apply(pruned, x), rtol=1e-4, atol=1e-5
    )


def test_an_nnx_model():
    model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), inputs(64, 16)
    graph, params = nnx.split(model)
    plan = js.nnx.plan(model, {"kernel": "2:4"}, x)
    pruned, masks = js.prune(lambda params, x: nnx.merge(graph, params)(x), params, plan, x)
    w, mask = sparsegpt(model.kernel[...].T, x, 2, 4)
    np.testing.assert_array_equal(masks["kernel"].get_value().T, mask)
    np.testing.assert_allclose(pruned["kernel"].get_value().T, w, rtol=1e-4, atol=1e-4)


PARAMS, X = {"w": normal(16, 8), "v": normal(16, 8)}, inputs(8, 16)
PLAN = js.plan(PARAMS, {"w": js.NM(2, 4, axis=0)})
BOTH = js.plan(PARAMS, {"*": js.NM(2, 4, axis=0)})
BAD = {
    "no function": (
        TypeError,
        "`fn` is a dict, not a function",
        lambda: js.prune(PARAMS, PARAMS, PLAN, X),
    ),
    "no such method": (
        ValueError,
        "method='obs' is not one of",
        lambda: js.prune(product, PARAMS, PLAN, X, method="obs"),
    ),
    "no data": (ValueError, "there are neither", lambda: js.prune(product, PARAMS, PLAN)),
    "data twice": (
        ValueError,
        "there are both",
        lambda: js.prune(product, PARAMS, PLAN, X, batches=[(X,)]),
    ),
    "no batches": (
        ValueError,
        "`batches` is empty",
        lambda: js.prune(product, PARAMS, PLAN, batches=[]),
    ),
    "batches of other shapes": (
        ValueError,
        "Pass batches of equal shapes",
        lambda: js.prune(product, PARAMS, PLAN, batches=[(X,), (X[:4],)]),
    ),
    "an empty batch": (
        ValueError,
        r"calibration argument \[0\] of batch 0 has shape \(0, 16\), which is empty",
        lambda: js.prune(product, PARAMS, PLAN, X[:0]),
    ),
    "abstract data": (
        ValueError,
        "the data are abstract",
        lambda: js.prune(product, PARAMS, PLAN, jax.ShapeDtypeStruct((8, 16), "float32")),
    ),
    "outputs cut apart and multiplied by different inputs": (
        ValueError,
        "the inputs of w cannot be seen, since its outputs are cut apart",
        lambda: js.prune(
            lambda params, x: (x @ params["w"][:, :4]) + (jnp.tanh(x) @ params["w"][:, 4:]),
            PARAMS,
            PLAN,
            X,
        ),
    ),
    "outputs cut apart in a loop": (
        ValueError,
        "the inputs of w cannot be seen, since its outputs are cut apart",
        lambda: js.prune(
            lambda params, xs: lax.scan(lambda c, x: (c, x @ params["w"][:, :4]), 0.0, xs)[1],
            PARAMS,
            PLAN,
            X[None],
        ),
    ),
    "blocks by SparseGPT": (
        ValueError,
        r"w is planned as block 4x4 0\.5, for which SparseGPT is not defined",
        lambda: js.prune(
            product, PARAMS, js.plan(PARAMS, {"w": js.Block((4, 4), 0.5, axes=(0, 1))}), X
        ),
    ),
    "under jit": (
        ValueError,
        'the data are abstract, and "sparsegpt" takes concrete ones',
        lambda: jax.jit(lambda x: js.prune(product, PARAMS, PLAN, x).masks)(X),
    ),
    "text as data": (
        TypeError,
        r"calibration argument \[0\] is a str, not an array",
        lambda: js.prune(product, PARAMS, PLAN, "text"),
    ),
    "a weight that nothing uses": (
        ValueError,
        "v is not used by a matrix product",
        lambda: js.prune(product, PARAMS, BOTH, X),
    ),
    "a part of a stack that nothing uses": (
        ValueError,
        "w is a stack of 3 weights, of which products of `fn` use 1",
        lambda: js.prune(
            lambda params, x: x @ params["w"][1],
            {"w": normal(3, 16, 8)},
            js.plan({"w": normal(3, 16, 8)}, {"w": js.NM(2, 4, axis=1)}),
            X,
        ),
    ),
    "another axis": (
        ValueError,
        r"its product sums over \[0\], but its pattern runs along axis 1",
        lambda: js.prune(product, PARAMS, js.plan(PARAMS, {"w": js.NM(2, 4, axis=1)}), X),
    ),
    "a global density": (
        ValueError,
        "w is planned as unstructured 0.5 global, but",
        lambda: js.prune(
            product, PARAMS, js.plan(PARAMS, {"w": js.Unstructured(0.5, "global")}), X
        ),
    ),
    "a singular Hessian": (
        ValueError,
        "the second moments of the inputs of w are singular",
        lambda: js.prune(product, PARAMS, PLAN, X[:2], damping=0.0),
    ),
    "inputs that are not finite": (
        ValueError,
        "the inputs of w are not finite",
        lambda: js.prune(product, PARAMS, PLAN, X.at[0, 0].set(jnp.nan), method="wanda"),
    ),
    "no columns": (
        ValueError,
        "block=0 must be at least 1",
        lambda: js.prune(product, PARAMS, PLAN, X, block=0),
    ),
    "other parameters": (
        ValueError,
        "prune: .*w",
        lambda: js.prune(product, {"v": normal(16, 8)}, PLAN, X),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_numpy_data_of_64_bits():
    params, tokens = {"e": normal(8, 16), "w": normal(16, 8)}, np.arange(24) % 8
    fn = lambda params, tokens: params["e"][tokens] @ params["w"]  # noqa: E731
    plan = js.plan(params, {"w": "2:4"}, fn, tokens)
    _, masks = js.prune(fn, params, plan, tokens, method="wanda")
    np.testing.assert_array_equal(masks["w"].T, wanda(params["w"].T, params["e"][tokens], 2, 4))


def test_an_error_of_the_function_says_whose_it_is():
    with pytest.raises(TypeError) as caught:
        js.prune(product, PARAMS, PLAN, X[:, :8])
    assert any("prune: this is the error of `fn`" in note for note in caught.value.__notes__)
