"""Compressed weights of 8 bits, against NumPy."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import serialization
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import inspect

EVERY = pytest.mark.parametrize("activations", ["float", "token", "tensor"])
K, M = 32, 6


def dense_weight(shape=(K, M), seed=0):
    """A weight `[..., K, M]` of which 2 of every 4 neighbours along K are not 0."""
    random = np.random.default_rng(seed)
    keep = random.permuted(
        np.broadcast_to([1, 1, 0, 0], (*shape[:-2], shape[-1], K // 4, 4)), axis=-1
    )
    w = random.normal(size=shape) * keep.reshape(*shape[:-2], shape[-1], K).swapaxes(-1, -2)
    return w.astype(np.float32)


def packed(w, dtype=jnp.float32, axis=-2):
    params = {"w": jnp.asarray(w, dtype)}
    plan = js.plan(params, {"w": js.NM(2, 4, axis=axis)})
    return js.compress(params, js.magnitude_masks(params, plan), plan)


def quantized(w, activations="float", x=None, dtype=jnp.float32):
    """The weight in int8; `x` calibrates its static scale."""
    data = {"fn": product, "batches": [(x,)]} if activations == "tensor" else {}
    return js.quantize(packed(w, dtype), activations=activations, **data)["w"]


def product(params, x):
    return x @ params["w"]


def rounded(a, scale):
    """Integers in NumPy; ties go to the even ones."""
    return np.clip(np.rint(np.float64(a) / np.float64(scale)), -127, 127)


def make_x(shape=(5, K), dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def integers_of(w):
    """The integers of a quantized weight `[K, M]`, read by NumPy."""
    values, words = np.asarray(w.values, np.float64), np.asarray(w.metadata, np.int64)
    integers = np.zeros((values.shape[0], 2 * values.shape[1]))
    for row, group in np.ndindex(values.shape[0], values.shape[1] // 2):
        nibble = words[row, group // 4] >> 4 * (group % 4)
        for i, place in enumerate((nibble & 3, nibble >> 2 & 3)):
            integers[row, 4 * group + place] = values[row, 2 * group + i]
    return integers.T


# --- weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_weights_are_the_nearest_multiples_of_the_scale_of_their_output(dtype, size):
    exact = (size * dense_weight()).astype(jnp.dtype(dtype))
    original = packed(exact, dtype)["w"]
    w, exact = js.quantize(original), np.float64(exact)
    scale, integers = np.asarray(w.scale, np.float64), integers_of(w)
    assert w.values.dtype == jnp.int8 and w.dtype == w.scale.dtype == dtype
    np.testing.assert_array_equal(w.metadata, original.with_layout("canonical").metadata)
    np.testing.assert_array_equal(integers, rounded(exact, scale))
    assert (np.abs(integers * scale - exact) <= scale / 2 * (1 + 1e-6)).all()
    smallest = np.abs(exact).max(0) / 127
    spacing = float(jnp.finfo(dtype).smallest_subnormal) + smallest * float(jnp.finfo(dtype).eps)
    assert (scale >= smallest * (1 - 1e-6)).all() and (scale <= smallest + spacing).all()
    dense = js.decompress(w)
    assert dense.shape == (K, M) and dense.dtype == dtype
    np.testing.assert_array_equal(dense, (integers * scale).astype(dense.dtype))


def test_outputs_of_zeros_and_negative_zeros():
    w = dense_weight()
    w[:, 2], w[:, 4] = 0, -0.0
    small = quantized(w)
    np.testing.assert_array_equal(np.asarray(small.scale)[[2, 4]], 1)
    assert not np.asarray(js.decompress(small))[:, [2, 4]].any()
    product = js.sparse_matmul(make_x(), small)
    assert np.isfinite(product).all() and not np.asarray(product)[:, [2, 4]].any()


@pytest.mark.parametrize("k", [64, 1024])
def test_three_eighths_are_saved_against_dense_int8(k):
    w = js.quantize(packed(np.ones((k, 8), np.float32)))["w"]
    assert w.values.nbytes + w.metadata.nbytes == 0.625 * k * 8
    assert w.nbytes == 0.625 * k * 8 + 4 * 8


def test_dense_leaves_stay_and_other_layouts_become_canonical():
    params = {**packed(dense_weight(), jnp.bfloat16), "b": jnp.ones(3)}
    tiled = {**params, "w": params["w"].with_layout("mma16")}
    small, same = js.quantize(params), js.quantize(tiled)
    assert small["b"] is params["b"]
    assert small["w"].layout == same["w"].layout == "canonical"
    jax.tree.map(np.testing.assert_array_equal, small, same)
    again = jax.jit(js.quantize)(params)
    jax.tree.map(np.testing.assert_array_equal, small, again)


# --- products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@EVERY
def test_products_equal_those_in_numpy(activations, activation, dtype):
    x, w = make_x(dtype=dtype), dense_weight()
    small = quantized(w, activations, x, dtype=dtype)
    bias = jnp.arange(M, dtype=dtype)
    y = jax.jit(lambda x, w, b: js.sparse_matmul(x, w, bias=b, activation=activation))(
        x, small, bias
    )
    assert y.dtype == dtype
    wide = np.asarray(x, np.float32)
    if activations != "float":
        most = np.abs(wide).max(None if activations == "tensor" else -1, keepdims=True)
        x_scale = most / np.float32(127)
        wide = rounded(wide, x_scale) * x_scale
    expected = wide @ (integers_of(small) * np.asarray(small.scale, np.float64))
    expected = expected + np.asarray(bias, np.float64)
    reference = {None: lambda y: y, "gelu": jax.nn.gelu}.get(
        activation, getattr(jax.nn, activation or "relu")
    )
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        np.asarray(y, np.float64), reference(jnp.asarray(expected)), rtol=tolerance, atol=tolerance
    )


def test_sums_of_integers_are_exact():
    random = np.random.default_rng(3)
    k = 4096
    w = random.integers(-127, 128, (k, M)) * np.tile([1, 0, 0, 1], k // 4)[:, None]
    x = random.integers(-127, 128, (4, k))
    w[0], x[:, 0] = 127, 127  # so that scales are 1
    small = js.quantize(packed(w.astype(np.float32)), activations="token")["w"]
    np.testing.assert_array_equal(small.scale, 1)
    np.testing.assert_array_equal(js.sparse_matmul(jnp.asarray(x, jnp.float32), small), x @ w)
    largest = js.quantize(packed(np.ones((k, M), np.float32)), activations="token")["w"]
    assert (js.sparse_matmul(jnp.ones((1, k)), largest) == k // 2).all()


@EVERY
def test_the_error_of_a_product_is_bounded(activations):
    x, w = make_x((64, K)), dense_weight()
    small = quantized(w, activations, x)
    rows, weights = np.float64(x), np.float64(w)
    steps = np.asarray(small.scale, np.float64)
    bound = np.abs(rows).sum(-1, keepdims=True) * steps / 2
    if activations != "float":
        most = np.abs(rows).max(None if activations == "tensor" else -1, keepdims=True)
        bound += most / 127 / 2 * np.abs(integers_of(small) * steps).sum(0)
    error = np.abs(np.float64(js.sparse_matmul(x, small)) - rows @ weights)
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > bound.max() / 100  # the bound says something


def test_rows_of_zeros_and_rows_that_are_not_finite():
    w = quantized(dense_weight(), "token")
    x = make_x((4, K)).at[0].set(0).at[1, 3].set(jnp.nan).at[2, 3].set(jnp.inf)
    y = np.asarray(js.sparse_matmul(x, w))
    assert not y[0].any() and np.isnan(y[1:3]).all() and np.isfinite(y[3]).all()


def test_static_scales_clip():
    w, x = dense_weight(), make_x()
    small = quantized(w, "tensor", x)
    most = float(small.input_scale) * 127
    np.testing.assert_allclose(most, np.abs(x).max(), rtol=1e-6)
    np.testing.assert_array_equal(
        js.sparse_matmul(100 * jnp.sign(x) * most, small),
        js.sparse_matmul(jnp.sign(x) * most, small),
    )


@pytest.mark.parametrize("activations", ["float", "token"])
def test_batches_of_rows_and_of_weights(activations):
    x, w = make_x((3, 5, K)), dense_weight((3, K, M))
    many = quantized(w, activations)
    alone = [js.quantize(packed(one), activations=activations)["w"] for one in w]
    one = jax.vmap(lambda x: js.sparse_matmul(x, alone[0]))(x)
    np.testing.assert_allclose(one, js.sparse_matmul(x, alone[0]), rtol=1e-6)
    each = jnp.stack([js.sparse_matmul(*pair) for pair in zip(x, alone, strict=True)])
    np.testing.assert_allclose(js.sparse_matmul(x, many), each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(js.sparse_matmul)(x, many), each, rtol=1e-5, atol=1e-6)
    axes = jax.tree.map(lambda _: 0, many)
    assert jax.tree.structure(axes) == jax.tree.structure(many)
    _, scanned = jax.lax.scan(lambda _, pair: (None, js.sparse_matmul(*pair)), None, (x, many))
    np.testing.assert_allclose(scanned, each, rtol=1e-5, atol=1e-6)


def test_kernels_refuse_int8():
    x, w = make_x((64, K), jnp.bfloat16), quantized(dense_weight(), dtype=jnp.bfloat16)
    for kernel in ("hopper", "ampere", "decode"):
        with pytest.raises(ValueError, match=f'"{kernel}" cannot compute this: .* int8. Pass impl'):
            js.sparse_matmul(x, w, implementation=kernel)


# --- gradients


@EVERY
def test_gradients_ignore_the_rounding_of_activations(activations):
    x, bias = make_x(), jnp.zeros(M)
    small = quantized(dense_weight(), activations, x)
    dense = js.decompress(small)

    def loss(x, bias):
        return jnp.sin(js.sparse_matmul(x, small, bias=bias)).sum()

    ahead = jnp.cos(js.sparse_matmul(x, small))  # the derivative of the sine at what comes out
    by_x, by_bias = jax.jit(jax.grad(loss, (0, 1)))(x, bias)
    np.testing.assert_allclose(by_x, ahead @ dense.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_bias, ahead.sum(0), rtol=1e-5)
    _, tangent = jax.jvp(lambda x: js.sparse_matmul(x, small), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(tangent, jnp.ones_like(x) @ dense, rtol=1e-5, atol=1e-5)


def test_scales_have_a_gradient_and_integers_have_none():
    x, small = make_x(), quantized(dense_weight())
    gradient = jax.grad(lambda w: js.sparse_matmul(x, w).sum(), allow_int=True)(small)
    assert gradient.values.dtype == gradient.metadata.dtype == jax.dtypes.float0
    expected = (np.float64(x) @ integers_of(small)).sum(0)
    np.testing.assert_allclose(gradient.scale, expected, rtol=1e-4)


def test_the_gradient_of_relu_at_zero_is_that_of_jax():
    small = quantized(dense_weight())
    x = jnp.zeros((1, K))
    assert not jax.grad(lambda x: js.sparse_matmul(x, small, activation="relu").sum())(x).any()


# --- programs


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.relu(nn.Dense(2 * K, name="up")(x))
        return x + nn.Dense(K, name="down")(hidden), None


class Model(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return blocks(name="blocks")(x.astype(self.dtype), None)[0]


def scanned_model(dtype="float32"):
    model, x = Model(dtype), make_x((7, K))
    params = jax.tree.map(lambda a: a.astype(dtype), Model().init(jax.random.key(0), x))
    plan = js.plan(params, {"*kernel": "2:4"}, model.apply, x)
    return model, js.compress(params, js.magnitude_masks(params, plan), plan), x


def layers_in_numpy(params, x, activations):
    """The model layer by layer; also the largest inputs of each product, `[layers, 2]`."""
    blocks, seen = params["params"]["blocks"], []
    x = np.float64(x)

    def product(x, w, bias, i):
        seen.append(np.abs(x).max())
        if activations == "token":
            scale = np.abs(x).max(-1, keepdims=True) / 127
            x = rounded(x, scale) * scale
        if activations == "tensor":
            x = rounded(x, w.input_scale[i]) * np.float64(w.input_scale[i])
        return x @ np.float64(js.decompress(w)[i]) + np.float64(bias[i])

    for i in range(3):
        hidden = np.maximum(product(x, *blocks["up"].values(), i), 0)
        x = x + product(hidden, *blocks["down"].values(), i)
    return x, np.reshape(seen, (3, 2))


def by_name(blocks):
    return {name: {"kernel": part["kernel"], "bias": part["bias"]} for name, part in blocks.items()}


@EVERY
def test_a_scan_over_layers_runs_from_int8(activations):
    model, params, x = scanned_model()
    data = {"fn": model.apply, "batches": [(x,), (x / 2,)]} if activations == "tensor" else {}
    small = js.quantize(params, activations=activations, **data)
    small = {"params": {"blocks": by_name(small["params"]["blocks"])}}
    run = js.sparsify(model.apply)
    y = jax.jit(run)(small, x)
    expected, _ = layers_in_numpy(small, x, activations)
    if activations == "float":
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    else:  # a tie may be rounded either way
        assert np.linalg.norm(y - expected) < 1e-3 * np.linalg.norm(expected)
    np.testing.assert_allclose(run(small, x), y, rtol=1e-4, atol=1e-4)
    assert "2 of 2 uses run compressed" in str(run.report(small, x))
    if activations == "tensor":
        _, most = layers_in_numpy(small, x, "float")
        for j, name in enumerate(("up", "down")):
            scale = small["params"]["blocks"][name]["kernel"].input_scale
            np.testing.assert_allclose(scale, most[:, j] / 127, rtol=1e-5)


@pytest.mark.promotes("Flax adds")
def test_a_model_keeps_its_dtype():
    model, params, x = scanned_model("bfloat16")
    small = js.quantize(params, activations="token")
    y = jax.jit(js.sparsify(model.apply))(small, x)
    expected = js.sparsify(model.apply)(params, x).astype(jnp.float32)
    assert y.dtype == jnp.bfloat16
    assert jnp.linalg.norm(y.astype(jnp.float32) - expected) < 0.03 * jnp.linalg.norm(expected)


PROGRAMS = {
    "transposed": lambda w, x: (w.T @ x.T).T,
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "cut": lambda w, x: x @ w[:, 1:4],
    "concatenated": lambda w, x: x @ jnp.concatenate([w, w[:, :2]], 1),
    "heads": lambda w, x: jnp.einsum("nk,khd->hnd", x, w.reshape(K, 2, M // 2)),
    "scaled": lambda w, x: x @ (w * -3.0),
    "scaled by output": lambda w, x: x @ (w * jnp.arange(-2.0, 4.0)[None]),
    "divided": lambda w, x: x @ (w / -jnp.arange(1.0, 7.0)[None]),
    "a scan over outputs": lambda w, x: jax.lax.scan(lambda c, row: (c, x @ row), 0, w.T)[1],
    "a switch": lambda w, x: jax.lax.cond(x[0, 0] > 9, lambda: x @ w, lambda: x @ w * 2.0),
    "a loop": lambda w, x: jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + x @ w), (0, jnp.zeros((5, M)))
    )[1],
    "a barrier": lambda w, x: x @ jax.lax.optimization_barrier(w),
    "not a product": lambda w, x: jnp.tile(w + 1.0, 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
@EVERY
def test_programs_that_move_weights(activations, name):
    x, program = make_x(), PROGRAMS[name]
    small = quantized(dense_weight(), activations, x)
    run = js.sparsify(program)
    y, expected = (
        np.asarray(a, np.float64) for a in (run(small, x), program(js.decompress(small), x))
    )
    exact = activations == "float" or name == "not a product"
    tolerance = 0.01 if name == "cast" else 1e-5 if exact else 0.03
    assert np.linalg.norm(y - expected) <= tolerance * np.linalg.norm(expected)
    compressed = all(not one.reason for one in run.report(small, x).products)
    assert compressed == (name != "not a product")


def test_weights_that_are_rounded_differently_are_not_concatenated():
    x, w = make_x(), dense_weight()
    forms = [packed(w)["w"], quantized(w), quantized(w, "token")]
    run = js.sparsify(lambda a, b, x: x @ jnp.concatenate([a, b], 1))
    for a in forms:
        for b in forms:
            report = run.report(a, b, x)
            assert all(bool(one.reason) == (a is not b) for one in report.products)
            expected = x @ jnp.concatenate([js.decompress(a), js.decompress(b)], 1)
            assert jnp.linalg.norm(run(a, b, x) - expected) < 0.02 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("percentile", [None, 100, 90])
def test_calibration_over_batches(percentile):
    params = {"w": packed(dense_weight())["w"], "v": packed(dense_weight(seed=2).T, axis=-1)["w"]}

    def two(params, x):
        return (x @ params["w"], (2 * x[:, ::-1]) @ params["v"].T)

    batches = [(make_x(seed=5),), (3 * make_x((2, K), seed=6),)]
    small = js.quantize(
        params, activations="tensor", fn=two, batches=iter(batches), percentile=percentile
    )
    for name, factor in (("w", 1), ("v", 2)):
        tops = [np.percentile(np.abs(factor * x), percentile or 100) for (x,) in batches]
        np.testing.assert_allclose(small[name].input_scale, max(tops) / 127, rtol=1e-5)


def test_a_weight_that_several_products_use_gets_the_largest():
    def model(params, x):
        return x @ params["w"] + jax.lax.map(lambda row: (3 * row) @ params["w"], x)

    x = make_x()
    small = js.quantize(packed(dense_weight()), activations="tensor", fn=model, batches=[(x,)])
    np.testing.assert_allclose(small["w"].input_scale, 3 * np.abs(x).max() / 127, rtol=1e-6)


def placed(tree, mesh, spec):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)


def test_devices_receive_int8():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    w = js.quantize(packed(dense_weight((K, 16))), activations="token")["w"]
    rows = NamedSharding(mesh, P("a"))
    run = jax.jit(js.sparse_matmul, out_shardings=rows)
    program = run.lower(*placed((make_x((8, K)), w), mesh, P("a"))).compile().as_text()
    received = re.findall(r"= (\w+\[[\d,]*\])\S* all-", program)
    assert sorted(received) == ["f32[16]", "s8[16,16]", "u16[16,2]"]


def test_devices_share_a_product():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = make_x((8, K))
    w = js.quantize(packed(dense_weight((K, 16))), activations="token")["w"]
    expected = js.sparse_matmul(x, w)

    for x_spec, w_spec in ((P("a"), P("b")), (P("a", "b"), P()), (P(None, "b"), P("a"))):
        y = jax.jit(js.sparse_matmul)(placed(x, mesh, x_spec), placed(w, mesh, w_spec))
        np.testing.assert_allclose(y, expected, rtol=1e-6)
    mapped = jax.shard_map(js.sparse_matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    np.testing.assert_allclose(jax.jit(mapped)(x, w), expected, rtol=1e-6)


# --- files


def small_model(activations):
    x = make_x()
    return {"a": {"w": quantized(dense_weight(), activations, x)}, "b": jnp.ones(3)}


@EVERY
def test_small_models_come_back_bit_by_bit(tmp_path, activations):
    model, file = small_model(activations), tmp_path / "model.safetensors"
    js.save_safetensors(model, file)
    for again in (
        js.load_safetensors(file),
        js.load_safetensors(file, like=jax.eval_shape(lambda: model)),
        serialization.from_bytes(model, serialization.to_bytes(model)),
    ):
        assert jax.tree.structure(again) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, again, model)
        assert again["a"]["w"].scale.dtype == jnp.float32
    inspect.main([str(file)])


@EVERY
def test_small_models_are_exported(activations):
    model, x = small_model(activations), make_x()
    run = jax.jit(lambda model, x: js.sparse_matmul(x, model["a"]["w"]))
    again = export.deserialize(export.export(run)(model, x).serialize())
    np.testing.assert_allclose(again.call(model, x), run(model, x), rtol=1e-6)


def test_files_without_int8_are_as_before(tmp_path):
    js.save_safetensors(packed(dense_weight()), tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "numpy") as opened:
        saved = json.loads(opened.metadata()["jaxsparse"])["compressed"]["w"]
        assert sorted(opened.keys()) == ["w/metadata", "w/values"]
    assert sorted(saved) == ["axes", "contracting", "layout", "output", "transposable"]


def test_scales_are_those_of_the_kept_weights():
    w = np.random.default_rng(2).normal(size=(K, M)).astype(np.float32)
    w[1::4] = 1000  # pruned
    mask = np.zeros((K, M), bool)
    mask[0::4] = mask[2::4] = True
    weight = js.quantize(js.compress({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)}))["w"]
    np.testing.assert_allclose(weight.scale, np.abs(w * mask).max(0) / 127, rtol=1e-6)


def with_scale(change):
    return lambda arrays: arrays.update({"a/w/scale": change(arrays["a/w/scale"])})


DAMAGE = {
    "negative": (with_scale(lambda s: -s), r"`scale` is -0.0\d+ at \(0,\)"),
    "NaN": (with_scale(lambda s: s * np.nan), "`scale` is nan at"),
    "shape": (with_scale(lambda s: s[:2]), r"`scale` has shape \(2,\), but values .* \(6,\)"),
    "dtype": (with_scale(lambda s: s.astype(np.int32)), "`scale` is int32"),
    "values": (
        lambda arrays: arrays.update({"a/w/values": arrays["a/w/values"].astype(np.int16)}),
        "there is a `scale`, but `values` are int16",
    ),
    "input": (
        lambda arrays: arrays.update({"a/w/input_scale": np.full((), np.inf, np.float32)}),
        "`input_scale` is inf",
    ),
    "missing": (lambda arrays: arrays.pop("a/w/input_scale"), "has no tensor 'a/w/input_scale'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_scales_are_refused(tmp_path, name):
    change, message = DAMAGE[name]
    file = tmp_path / "model.safetensors"
    js.save_safetensors(small_model("tensor"), file)
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    arrays = safetensors.numpy.load_file(file)
    change(arrays)
    safetensors.numpy.save_file(arrays, file, metadata=header)
    where = "" if name == "missing" else r"a/w in .*model.safetensors is damaged\. Sparse24: "
    with pytest.raises(ValueError, match=where + message):
        js.load_safetensors(file)


def test_the_form_of_a_file_is_compared(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    js.save_safetensors(small_model("token"), file)
    with pytest.raises(ValueError, match="as int8 for activations='token' 32x6 float32, not comp"):
        js.load_safetensors(file, like={"a": packed(dense_weight()), "b": jnp.ones(3)})
    inspect.main([str(file)])
    assert "32x6     float32  2:4 int8, canonical  KO" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only one has a scale"):
        serialization.from_bytes(
            {"a": packed(dense_weight()), "b": jnp.ones(3)},
            serialization.to_bytes(small_model("token")),
        )


# --- errors


REFUSED = {
    "no compressed weight": (
        {"packed": {"w": jnp.ones((4, 4))}},
        ValueError,
        "there is no compressed weight",
    ),
    "unknown activations": (
        {"activations": "row"},
        ValueError,
        "activations='row' is not one of 'float', 'token'",
    ),
    "percentile without calibration": (
        {"percentile": 99},
        ValueError,
        'are for activations="tensor"',
    ),
    "no data": (
        {"activations": "tensor"},
        ValueError,
        "is calibrated on data. Pass `fn` and `batches`",
    ),
    "no function": ({"activations": "tensor", "fn": 3, "batches": []}, TypeError, "`fn` is a int"),
    "no batches": ({"activations": "tensor", "batches": []}, ValueError, "`batches` is empty"),
    "batch not a tuple": (
        {"activations": "tensor", "batches": [np.ones(3)]},
        TypeError,
        "a batch is a ndarray",
    ),
    "empty batch": (
        {"activations": "tensor", "batches": [(jnp.ones((0, K)),)]},
        ValueError,
        "an argument in a batch is empty",
    ),
    "percentile of 0": (
        {"activations": "tensor", "batches": [(make_x(),)], "percentile": 0},
        ValueError,
        r"percentile=0 is not in \(0, 100\]",
    ),
    "infinite inputs": (
        {"activations": "tensor", "batches": [(make_x() * jnp.inf,)]},
        ValueError,
        "the inputs of w are not finite",
    ),
    "weight not used": (
        {"activations": "tensor", "batches": [(make_x(),)], "fn": lambda params, x: x},
        ValueError,
        "`fn` does not multiply by all of w",
    ),
    "quantized already": (
        {"packed": js.quantize(packed(dense_weight()))},
        ValueError,
        "w is quantized already",
    ),
    "infinite weights": (
        {"packed": packed(np.full((K, M), np.inf))},
        ValueError,
        "w has weights that are not fin",
    ),
    "integers": ({"packed": packed(np.ones((K, M)), jnp.int32)}, TypeError, "w holds int32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused(name):
    arguments, error, message = REFUSED[name]
    arguments = {"packed": packed(dense_weight()), **arguments}
    if arguments.get("activations") == "tensor" and "batches" in arguments:
        arguments.setdefault("fn", product)
    with pytest.raises(error, match=f"quantize: .*{message}"):
        js.quantize(**arguments)


@pytest.mark.usefixtures("unchecked_types")
def test_inconsistent_weights_are_refused():
    w = quantized(dense_weight())
    for changes, error, message in (
        ({"activations": None}, ValueError, "there is a `scale`, and activations=None"),
        ({"activations": "tensor"}, TypeError, "`input_scale` is a NoneType, not an array"),
        ({"activations": "row"}, ValueError, "activations='row' is not one of None, 'float'"),
        ({"input_scale": jnp.ones(())}, ValueError, "there is a `input_scale`, and activations='f"),
        ({"layout": "mma16"}, ValueError, "weights of 16 bits"),
        ({"scale": w.scale.astype("float8_e4m3fn")}, TypeError, "floats of at least 16 bits"),
    ):
        with pytest.raises(error, match=f"Sparse24: .*{message}"):
            dataclasses.replace(w, **changes)
    with pytest.raises(ValueError, match="to_cutlass: `w` has a scale"):
        js.to_cutlass(js.quantize(packed(np.ones((64, 16), np.float32)))["w"])


def test_assert_sparse_takes_int8():
    params = {"w": jnp.asarray(dense_weight())}
    plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
    small = js.quantize(js.compress(params, js.magnitude_masks(params, plan), plan))
    js.assert_sparse(small, plan)
    assert repr(jax.tree.map(lambda _: None, small)["w"]).count("None") >= 3
