"""`sparsify` runs functions from compressed weights, tested against the masked function.

Covers every kind of product, call and transformation.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from promotion import promoting

import jaxsparse as js

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(6, 8)), jnp.float32)


def weight(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def scanned(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def of_two(w, x):
    return x @ w[0] * jax.nn.gelu(x @ w[1])


@jax.custom_vjp
def doubled_gradient(x, w):
    return x @ w


doubled_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (2 * g @ kept[1].T, 2 * kept[0].T @ g)
)


@jax.custom_jvp
def tripled_tangent(x, w):
    return x @ w


@tripled_tangent.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 3 * (dx @ w + x @ dw)


def index(x):
    return (x.sum() > 1e9).astype(int)


# name: shape of the weight, function of (weight, x), number of sparse products in its program
FUNCTIONS = {
    "x @ w": ((8, 12), lambda w, x: x @ w, 1),
    "x @ w.T": ((12, 8), lambda w, x: x @ w.T, 1),
    "w @ x.T": ((12, 8), lambda w, x: (w @ x.T).T, 1),
    "one row": ((8, 12), lambda w, x: x[0] @ w, 1),
    "a vector": ((8,), lambda w, x: x @ w, 1),
    "twice": ((8, 8), lambda w, x: jnp.sin(x @ w) @ w, 2),
    "in two programs": ((8, 8), lambda w, x: jax.jit(jnp.matmul)(jax.jit(jnp.matmul)(x, w), w), 2),
    "outputs around the sum": ((3, 8, 5), lambda w, x: jnp.einsum("bi,nih->bnh", x, w), 1),
    "outputs turned": ((3, 8, 5), lambda w, x: jnp.einsum("bi,nih->hbn", x, w), 1),
    "two summed axes": (
        (2, 4, 5),
        lambda w, x: jnp.einsum("bhd,hdm->bm", x.reshape(-1, 2, 4), w),
        1,
    ),
    "two summed axes, apart": (
        (2, 5, 4),
        lambda w, x: jnp.einsum("bhd,hmd->bm", x.reshape(-1, 2, 4), w),
        1,
    ),
    "summed axes in another order": (
        (2, 4, 8),
        lambda w, x: jnp.einsum("bij,jim->bm", x.reshape(-1, 4, 2), w),
        1,
    ),
    "split by a reshape": (
        (8, 12),
        lambda w, x: jnp.einsum("bhd,hdm->bm", x.reshape(-1, 2, 4), w.reshape(2, 4, 12)),
        1,
    ),
    "merged by a reshape": ((8, 3, 4), lambda w, x: x @ w.reshape(8, 12), 1),
    "outputs merged and split": (
        (8, 3, 4),
        lambda w, x: jnp.einsum("bi,ijk->bkj", x, w.reshape(8, 12).reshape(8, 6, 2)),
        1,
    ),
    "outputs split unevenly": (
        (8, 3, 4),
        lambda w, x: jnp.einsum("bi,ijk->bkj", x, w.reshape(8, 2, 6)),
        0,
    ),
    "cast": (
        (8, 12),
        lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
        1,
    ),
    "sums kept wide": (
        (8, 12),
        lambda w, x: jnp.matmul(*map(half, (x, w)), preferred_element_type=jnp.float32),
        1,
    ),
    "scaled by a number": ((8, 12), lambda w, x: x @ (w * 0.5), 1),
    "scaled by output": ((8, 12), lambda w, x: x @ (w / (1 + jnp.arange(12.0))), 1),
    "scaled by output, turned": (
        (3, 8, 4),
        lambda w, x: jnp.einsum("bi,nih->bnh", x, w * jnp.arange(12.0).reshape(3, 1, 4)),
        1,
    ),
    "scaled by a value": ((8, 12), lambda w, x: x @ (w * x.sum()), 1),
    "weight norm": ((8, 12), lambda w, x: x @ (w / jnp.sqrt((w * w).sum(0, keepdims=True))), 1),
    "standardised": ((8, 12), lambda w, x: x @ ((w - w.mean(0)) / w.std(0)), 0),
    "scaled along the sum": ((8, 12), lambda w, x: x @ (w * jnp.arange(8.0)[:, None]), 0),
    "a part of the outputs": ((8, 12), lambda w, x: x @ w[:, 2:7], 1),
    "every other output": ((8, 12), lambda w, x: x @ w[:, ::2], 1),
    "outputs split": ((8, 12), lambda w, x: sum(x @ part for part in jnp.split(w, 3, 1)), 3),
    "a part of the sum": ((8, 12), lambda w, x: x[:, :4] @ w[:4], 0),
    "one of two": ((2, 8, 12), of_two, 2),
    "each of three": (
        (3, 8, 8),
        lambda w, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), w, x),
        3,
    ),
    "each of three along another axis": (
        (8, 3, 8),
        lambda w, x: sum(x @ one for one in jnp.unstack(w, axis=1)),
        3,
    ),
    "a dynamic one": (
        (3, 8, 12),
        lambda w, x: x @ lax.dynamic_index_in_dim(w, (x[0, 0] > 9).astype(int), keepdims=False),
        1,
    ),
    "concatenated with itself": ((8, 12), lambda w, x: x @ jnp.concatenate([w, w], 1), 1),
    "concatenated along the sum": (
        (8, 12),
        lambda w, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([w, w], 0),
        0,
    ),
    "reversed": ((8, 12), lambda w, x: x @ w[:, ::-1], 0),
    "scan": ((3, 8, 8), scanned, 1),
    "scan along another axis": ((8, 3, 8), lambda w, x: scanned(jnp.moveaxis(w, 1, 0), x), 1),
    "scan of scan": (
        (2, 3, 8, 8),
        lambda w, x: lax.scan(lambda x, w: (scanned(w, x), None), x, w)[0],
        1,
    ),
    "scan of the other order": (
        (2, 3, 8, 8),
        lambda w, x: lax.scan(lambda x, w: (scanned(w, x), None), x, w.swapaxes(0, 1))[0],
        1,
    ),
    "scan over the outputs": (
        (3, 8, 4),
        lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0.0, w)[1].swapaxes(0, 1),
        1,
    ),
    "constant of a scan": (
        (8, 8),
        lambda w, x: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0],
        1,
    ),
    "carried by a scan": (
        (8, 8),
        lambda w, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), length=3)[
            0
        ][0],
        1,
    ),
    "changed by a scan": (
        (8, 8),
        lambda w, x: lax.scan(lambda c, _: (c * 0.5, x @ c), w, length=3)[1].sum(0),
        0,
    ),
    "passed through a scan of remat": (
        (3, 8, 8),
        lambda w, x: lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w)), x, w)[0],
        1,
    ),
    "passed through and returned": (
        (3, 8, 8),
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, w),
        1,
    ),
    "stop_gradient": ((8, 12), lambda w, x: x @ lax.stop_gradient(w), 1),
    "a negative dynamic start": (
        (8, 12),
        lambda w, x: x @ lax.dynamic_slice_in_dim(w, index(x) - 20, 4, 1),
        1,
    ),
    "a dynamic start": (
        (8, 12),
        lambda w, x: x @ lax.dynamic_slice_in_dim(w, index(x) - 5, 4, 1),
        1,
    ),
    "scaled by what was shifted": (
        (8, 8),
        lambda w, x: x @ (w * lax.pad(jnp.full((8, 8), 2.0), 0.5, ((-1, 1, 0), (0, 0, 0)))),
        0,
    ),
    "no outputs": ((8, 12), lambda w, x: x @ w[:, :0], 0),
    "a stack of one": ((1, 8, 8), scanned, 1),
    "remat": ((8, 8), lambda w, x: jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, w), 1),
    "scan of remat": (
        (3, 8, 8),
        lambda w, x: lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0],
        1,
    ),
    "vmap": ((3, 8, 5), lambda w, x: jax.vmap(jnp.matmul)(x.reshape(3, 2, 8), w), 1),
    "vmap along another axis": (
        (8, 3, 5),
        lambda w, x: jax.vmap(jnp.matmul, (0, 1))(x.reshape(3, 2, 8), w),
        1,
    ),
    "two batched axes": (
        (2, 3, 8, 4),
        lambda w, x: jnp.einsum("aci,caio->aco", x.reshape(3, 2, 8), w),
        1,
    ),
    "experts": ((3, 8, 5), lambda w, x: jnp.einsum("ecd,edf->ecf", x.reshape(3, 2, 8), w), 1),
    "jit": ((8, 12), lambda w, x: jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w) + 1)(x, w), 1),
    "cond": ((8, 8), lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: jnp.sin(x) @ w), 2),
    "custom_jvp": ((8, 12), lambda w, x: tripled_tangent(x, w), 1),
    "custom_vjp": ((8, 12), lambda w, x: doubled_gradient(x, w), 1),
    "optimization_barrier": ((8, 12), lambda w, x: x @ lax.optimization_barrier((w, x))[0], 1),
    "checkpoint_name": ((8, 12), lambda w, x: x @ checkpoint_name(w, "w"), 1),
    "1x1 convolution": ((1, 1, 8, 5), lambda w, x: conv(x.reshape(1, 2, 3, 8), w), 1),
    "1x1 convolution with strides": (
        (1, 1, 8, 5),
        lambda w, x: conv(x.reshape(1, 2, 3, 8), w, strides=(1, 2)),
        1,
    ),
    "1x1 convolution, channels first": (
        (5, 8, 1, 1),
        lambda w, x: conv(x.reshape(1, 8, 2, 3), w, numbers=("NCHW", "OIHW", "NCHW")),
        1,
    ),
    "1x1 convolution, padded": (
        (1, 1, 8, 5),
        lambda w, x: conv(x.reshape(1, 2, 3, 8), w, padding=((1, 1), (0, 0))),
        1,
    ),
    "convolution over neighbouring windows": (
        (2, 3, 8, 5),
        lambda w, x: conv(x.reshape(1, 2, 3, 8), w, strides=(2, 3), padding="VALID"),
        1,
    ),
    "convolution over windows apart, cut off": (
        (1, 2, 8, 5),
        lambda w, x: conv(x.reshape(1, 1, 6, 8), w, strides=(1, 4), padding="VALID"),
        1,
    ),
    "3x1 convolution": ((3, 1, 8, 5), lambda w, x: conv(x.reshape(1, 2, 3, 8), w), 0),
    "ragged_dot": ((3, 8, 5), lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2, 3])), 0),
    "gathered": (
        (3, 8, 5),
        lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.array([0, 0, 1, 2, 1, 0])]),
        0,
    ),
    "also regularised": ((8, 12), lambda w, x: x @ w + 0.1 * (w**2).sum(), 1),
    "returned too": ((8, 12), lambda w, x: (x @ w, w), 1),
}


def half(a):
    return a.astype(jnp.bfloat16)


def conv(x, w, strides=(1, 1), padding="SAME", numbers=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers)


@functools.cache
def prepared(name):
    shape, _, _ = FUNCTIONS[name]
    params = {"w": weight(*shape)}
    plan = js.plan(params, {"w": "2:4"}, call(name), X)
    if not plan.sparse:  # the program does not determine the axis
        plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
    masks = js.magnitude_masks(params, plan)
    return js.compress(params, masks, plan), js.effective_params(params, masks), masks, plan


def call(name):
    return promoting(lambda params, x: FUNCTIONS[name][1](params["w"], x))


def products(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("sparse_matmul[")


def close(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = max(1.0, float(jnp.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            np.asarray(a, np.float32) / scale, np.asarray(b, np.float32) / scale, atol=tolerance
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_and_gradients_equal_those_of_the_masked_weights(name):
    packed, masked, masks, plan = prepared(name)
    fn, sparse = call(name), js.sparsify(call(name))
    tolerance = 2e-2 if name == "cast" else 2e-5

    def loss(fn, params, x):
        outputs = fn(params, x)
        return sum((y.astype(jnp.float32) ** 2).sum() for y in jax.tree.leaves(outputs)), outputs

    assert products(sparse, packed, X) == FUNCTIONS[name][2]
    gradients, outputs = jax.jit(
        jax.grad(functools.partial(loss, sparse), (0, 1), has_aux=True, allow_int=True)
    )(packed, X)
    expected, masked_outputs = jax.jit(jax.grad(functools.partial(loss, fn), (0, 1), has_aux=True))(
        masked, X
    )
    close(outputs, masked_outputs, tolerance)
    close(gradients[1], expected[1], tolerance)
    close(gradients[0]["w"].values, js.compress(expected[0], masks, plan)["w"].values, tolerance)


@pytest.mark.parametrize(
    "name",
    ["x @ w", "outputs around the sum", "scan of remat", "cond", "custom_vjp", "1x1 convolution"],
)
def test_eager_calls_agree_and_trace_once_a_shape(name):
    packed, masked, _, _ = prepared(name)
    sparse = js.sparsify(chex.assert_max_traces(n=1)(call(name)))
    for _ in range(3):
        close(sparse(packed, X), call(name)(masked, X))
    doubled = js.sparsify(call(name))(packed, 2 * X)
    close(doubled, call(name)(masked, 2 * X))


def test_under_jit_it_is_traced_once():
    packed, _, _, _ = prepared("x @ w")
    fn = chex.assert_max_traces(n=1)(call("x @ w"))
    step = jax.jit(js.sparsify(fn))
    for scale in range(3):
        step(packed, scale * X)


@pytest.mark.parametrize("name", ["x @ w", "outputs around the sum", "scan", "twice"])
def test_vmap_over_rows_and_over_weights(name):
    packed, masked, _, _ = prepared(name)
    fn, sparse = call(name), js.sparsify(call(name))
    xs = jnp.stack([X, 2 * X, -X])
    close(jax.vmap(sparse, (None, 0))(packed, xs), jax.vmap(fn, (None, 0))(masked, xs))
    both = [jax.tree.map(lambda a: jnp.stack([a, a]), tree) for tree in (packed, masked)]
    close(jax.vmap(sparse, (0, None))(both[0], X), jax.vmap(fn, (0, None))(both[1], X))


def test_inside_a_scan_and_remat():
    packed, masked, _, _ = prepared("remat")

    def run(fn, params):
        return lax.scan(jax.checkpoint(lambda x, _: (fn(params, x), None)), X, length=3)[0].sum()

    results = jax.jit(
        jax.value_and_grad(functools.partial(run, js.sparsify(call("remat"))), allow_int=True)
    )(packed)
    expected = jax.value_and_grad(functools.partial(run, call("remat")))(masked)
    close(results[0], expected[0])
    assert products(functools.partial(run, js.sparsify(call("remat"))), packed) == 1


@pytest.mark.parametrize("name", ["x @ w", "scan", "custom_jvp"])
def test_inside_shard_map(name):
    packed, masked, _, _ = prepared(name)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(
        js.sparsify(call(name)), mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows")
    )
    close(jax.jit(inside)(packed, X), call(name)(masked, X))
    grads = jax.jit(jax.grad(lambda params, x: (inside(params, x) ** 2).sum(), 1))(packed, X)
    close(grads, jax.grad(lambda params, x: (call(name)(params, x) ** 2).sum(), 1)(masked, X))


def test_around_shard_map_it_decompresses_and_says_so():
    packed, masked, _, _ = prepared("x @ w")
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(call("x @ w"), mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))
    close(jax.jit(js.sparsify(fn))(packed, X), call("x @ w")(masked, X))
    (row,) = js.sparsify(fn).report(packed, X).products
    assert row.reason == "passed to shard_map"


def test_export_for_every_platform_and_back():
    packed, masked, _, _ = prepared("scan of remat")
    leaves, treedef = jax.tree.flatten(packed)  # a Sparse24 itself is not serialised

    def fn(leaves, x):
        return js.sparsify(call("scan of remat"))(jax.tree.unflatten(treedef, leaves), x)

    blob = jax.export.export(jax.jit(fn), platforms=["cpu", "cuda", "tpu"])(leaves, X).serialize()
    close(jax.export.deserialize(blob).call(leaves, X), call("scan of remat")(masked, X))


def test_weights_anywhere_in_the_arguments():
    packed, masked, _, _ = prepared("x @ w")

    def fn(x, *, extra):
        return x @ extra["inner"][0]["w"]

    close(js.sparsify(fn)(X, extra={"inner": [packed]}), fn(X, extra={"inner": [masked]}))
    assert [row.path for row in js.sparsify(fn).report(X, extra={"inner": [packed]}).products] == [
        "extra/inner/0/w"
    ]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("wide", ["int32", "float32"])
def test_integers_are_summed_as_wide_as_the_result(dtype, wide):
    random = np.random.default_rng(0)
    x, w = (
        jnp.asarray(random.integers(0 if dtype == "uint8" else -100, 100, shape), dtype)
        for shape in ((6, 64), (64, 8))
    )
    params = {"w": w}
    plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
    masks = js.magnitude_masks(params, plan)
    sparse = js.sparsify(lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=wide))
    expected = np.asarray(x, np.int64) @ np.where(masks["w"], w, 0).astype(np.int64)
    np.testing.assert_array_equal(
        np.asarray(sparse(js.compress(params, masks, plan), x), np.int64), expected
    )


EIGHT_BITS = [
    ("float8_e4m3fn",) * 2,
    ("float8_e5m2", "float8_e4m3fn"),
    ("bfloat16", "float8_e4m3fn"),
    ("float8_e5m2", "float32"),
]


@pytest.mark.parametrize("dtypes", EIGHT_BITS, ids=" ".join)
def test_floats_of_8_bits(dtypes):
    x, w = (
        jnp.asarray(weight(*shape), dtype)
        for shape, dtype in zip(((6, 8), (8, 12)), dtypes, strict=True)
    )
    params = {"w": w}
    plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
    masks = js.magnitude_masks(params, plan)

    def fn(params, x):
        return lax.dot_general(
            x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    expected = np.asarray(x, np.float32) @ np.where(masks["w"], np.asarray(w, np.float32), 0)
    packed = js.compress(params, masks, plan)
    np.testing.assert_allclose(js.sparsify(fn)(packed, x), expected, rtol=1e-5, atol=1e-5)
    assert products(js.sparsify(fn), packed, x) == 1


def test_weights_for_tensor_cores_that_are_cast_and_cut():
    params = {"w": weight(8, 12, dtype=jnp.bfloat16)}

    def fn(params, x):
        return x @ params["w"].astype(jnp.float32)[:, :4]

    plan = js.plan(params, {"w": "2:4"}, fn, X)
    masks = js.magnitude_masks(params, plan)
    packed = js.compress(params, masks, plan, layout="mma16")
    close(js.sparsify(fn)(packed, X), fn(js.effective_params(params, masks), X))
    assert products(js.sparsify(fn), packed, X) == 1


def test_a_weight_may_be_an_argument_itself():
    packed, masked, _, _ = prepared("x @ w")
    close(js.sparsify(jnp.matmul)(X, packed["w"]), X @ masked["w"])
    assert [row.path for row in js.sparsify(jnp.matmul).report(X, packed["w"]).products] == [
        "argument 1"
    ]


def test_kernels_that_are_concatenated_and_two_weights_in_one_product():
    params = {name: weight(8, n) for name, n in (("q", 8), ("k", 4), ("v", 8))}

    def fn(params, x):
        return (
            x @ jnp.concatenate([params["q"], params["k"]], 1),
            x @ params["q"] @ params["v"],
            params["q"] @ params["v"],
        )

    plan = js.plan(params, {"*": js.NM(2, 4, axis=0)})
    masks = js.magnitude_masks(params, plan)
    packed, masked = js.compress(params, masks, plan), js.effective_params(params, masks)
    close(js.sparsify(fn)(packed, X), fn(masked, X))
    report = js.sparsify(fn).report(packed, X)
    assert [(row.path, row.reason) for row in report.products] == [
        ("q, k", ""),
        ("q", ""),
        ("v", ""),
        ("v", "multiplied by another compressed weight"),
        ("q", "the product does not sum over exactly the axes that the weight is compressed along"),
    ]
    assert "3 of 5 uses run compressed" in str(report)


def test_a_stack_that_a_loop_passes_through_is_not_decompressed():
    packed, _, _, _ = prepared("passed through a scan of remat")
    (row,) = js.sparsify(call("passed through a scan of remat")).report(packed, X).products
    assert row.reason == ""


def test_the_report_says_what_runs_where_and_why_not_without_running_anything():
    packed, _, _, _ = prepared("scaled along the sum")
    sparse = js.sparsify(call("scaled along the sum"))
    abstract = jax.eval_shape(lambda: (packed, X))
    reason = "scaled by values that vary along the axis that the product sums over"
    rule = ["-" * length for length in (6, 18, len(reason), 16)]
    assert str(sparse.report(*abstract)).splitlines() == [
        f"leaf    product             {'runs':<{len(reason)}}  implementation",
        "  ".join(rule),
        f"w       mul (8, 12) (8, 1)  {reason}",
        "0 of 1 uses run compressed.",
    ]
    one = js.sparsify(call("x @ w"), implementation="dense").report(prepared("x @ w")[0], X)
    assert one.products == (("w", "dot_general (6, 8) (8, 12)", "", "dense"),)


def test_without_compressed_leaves_it_is_the_function_itself():
    def fn(params, x, flag):
        return x @ params["w"] if flag == "yes" else x

    np.testing.assert_array_equal(js.sparsify(fn)({"w": weight(8, 4)}, X, "yes"), X @ weight(8, 4))


def test_what_is_no_array_is_refused_and_what_is_branched_on_explained():
    packed, masked, _, _ = prepared("x @ w")

    def fn(params, x, *, train):
        return x @ params["w"] if train else x

    with pytest.raises(
        TypeError, match=r"sparsify: train is a str, not an array.*functools.partial"
    ):
        js.sparsify(fn)(packed, X, train="no")
    with pytest.raises(TypeError, match=r"sparsify: argument 2 is a PjitFunction, not an array"):
        js.sparsify(fn).report(packed, X, jnp.sin)
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        js.sparsify(fn)(packed, X, train=True)
    assert any("functools.partial" in note for note in caught.value.__notes__)
    close(js.sparsify(functools.partial(fn, train=True))(packed, X), fn(masked, X, train=True))
    with pytest.raises(TypeError, match="sparsify: `fn` is a dict"):
        js.sparsify({})
    with pytest.raises(ValueError, match="sparsify: there is no implementation 'fast'"):
        js.sparsify(fn, implementation="fast")


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", None])
@pytest.mark.parametrize("first", [False, True])
def test_bias_and_activation_go_into_the_product_where_a_kernel_may_run(activation, first):
    act = getattr(jax.nn, activation) if activation else lambda y: y
    shape = (5, 3, 8) if first else (8, 5, 3)
    params = {"w": weight(*shape, dtype=jnp.bfloat16), "b": weight(5, 3, dtype=jnp.bfloat16)}
    x = X.astype(jnp.bfloat16)

    @promoting
    def fn(params, x):
        y = jnp.einsum("bi,aci->bac" if first else "bi,iac->bac", x, params["w"]) + params["b"]
        return act(y) * 2

    plan = js.plan(params, {"w": "2:4"}, fn, x)
    masks = js.magnitude_masks(params, plan)
    masked = js.effective_params(params, masks)
    for layout, fused in (("mma16", True), ("canonical", False)):
        packed = js.compress(params, masks, plan, layout=layout)
        program = str(jax.make_jaxpr(js.sparsify(fn))(packed, x))
        assert (f"activation={activation}" in program) == (fused or activation is None)
        assert ("add" in program) != fused
        close(jax.jit(js.sparsify(fn))(packed, x), jax.jit(fn)(masked, x), 2e-2)


def test_what_else_is_read_of_a_product_is_not_lost_in_a_fused_activation():
    params = {"w": weight(8, 4, dtype=jnp.bfloat16)}
    x = X.astype(jnp.bfloat16)

    def fn(params, x):
        y = x @ params["w"]
        return jax.nn.gelu(y), y

    plan = js.plan(params, {"w": "2:4"}, fn, x)
    masks = js.magnitude_masks(params, plan)
    packed = js.compress(params, masks, plan, layout="mma16")
    assert "activation=gelu" not in str(jax.make_jaxpr(js.sparsify(fn))(packed, x))
    close(js.sparsify(fn)(packed, x), fn(js.effective_params(params, masks), x), 2e-2)


def test_layers_of_a_stack_are_decompressed_one_at_a_time():
    params = {"w": weight(8, 256, 256)}

    def fn(params, x):  # decompressed at its product, inside the loop
        return lax.scan(
            lambda x, w: (jnp.tanh(x @ (w - w.mean(0, keepdims=True))), None), x, params["w"]
        )[0]

    x = jnp.ones((4, 256))
    plan = js.plan(params, {"w": "2:4"}, fn, x)
    packed = js.compress(params, js.magnitude_masks(params, plan), plan)
    temporaries = (
        jax.jit(js.sparsify(fn)).lower(packed, x).compile().memory_analysis().temp_size_in_bytes
    )
    assert temporaries < 3 * params["w"][0].nbytes, temporaries
