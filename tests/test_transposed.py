"""Transposable weights: packed along either axis they are the same, and gradients use kernels."""

import dataclasses
import functools
import itertools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import serialization
from test_compress import DTYPES, bits, check_round_trip, optimized, packed_row, random_weights

import jaxsparse as js
from jaxsparse._kernels import decode, hopper
from jaxsparse._packed import layouts, matmul
from jaxsparse._packed.sparse24 import expand, transposed

ROWS = [row for row in itertools.product([False, True], repeat=4) if sum(row) == 2]
BLOCKS = np.array(
    [block for block in itertools.product(ROWS, repeat=4) if (np.sum(block, 0) == 2).all()]
)
T24 = js.TransposableNM(2, 4)


def both_ways(shape, axes, seed=0):
    """A mask that is one of the 90 transposable 2:4 blocks in every 4 by 4 along the axes."""
    random = np.random.default_rng(seed)
    a, b = (shape[axis] for axis in axes)
    rest = [size for i, size in enumerate(shape) if i not in [axis % len(shape) for axis in axes]]
    mask = (
        BLOCKS[random.integers(0, len(BLOCKS), (*rest, a // 4, b // 4))]
        .swapaxes(-3, -2)
        .reshape(*rest, a, b)
    )
    return np.moveaxis(mask, (-2, -1), axes)


def packed(shape, axes, *, dtype=jnp.float32, layout=None, integers=False, contracting=1, seed=0):
    """A transposable weight, and the dense masked weight in NumPy."""
    random = np.random.default_rng(seed)
    w = np.asarray(
        jnp.asarray(
            random.integers(-8, 9, shape) if integers else random.normal(size=shape)
        ).astype(dtype)
    )
    mask = both_ways(shape, axes, seed)
    plan = js.plan({"w": w}, {"w": T24.along(axes)})
    if contracting > 1:
        last = axes[0] - len(shape)
        plan = js.Plan(
            (
                dataclasses.replace(
                    plan.leaves[0], summed=tuple(range(last - contracting + 1, last + 1))
                ),
            )
        )
    return js.compress({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)}, plan, layout=layout)[
        "w"
    ], np.where(mask, w, 0)


PLANNED = {
    "Dense": (nn.Dense(8), (2, 16), T24, True),
    "Dense 2:4": (nn.Dense(8), (2, 16), js.NM(2, 4), False),
    "several output axes": (nn.DenseGeneral((3, 8)), (2, 16), T24, True),
    "several contracted axes": (nn.DenseGeneral((3, 8), axis=(-2, -1)), (2, 3, 16), T24, True),
    "Einsum with the output first": (nn.Einsum((8, 16), "...d,fd->...f"), (2, 16), T24, True),
    "Conv": (nn.Conv(8, (3,)), (1, 8, 16), T24, True),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2), (1, 4, 16), T24, True),
}


@pytest.mark.parametrize(
    ("model", "x", "pattern", "transposable"), PLANNED.values(), ids=PLANNED.keys()
)
def test_what_is_planned_transposable_is_packed_so(model, x, pattern, transposable):
    x = jnp.zeros(x)
    plan = js.flax.plan(model, {"*kernel": pattern}, x)

    def compressed():
        params = model.init(jax.random.key(0), x)
        return js.compress(params, js.magnitude_masks(params, plan), plan)

    leaves = jax.tree.leaves(
        jax.eval_shape(compressed), is_leaf=lambda leaf: isinstance(leaf, js.Sparse24)
    )
    flags = {leaf.transposable for leaf in leaves if isinstance(leaf, js.Sparse24)}
    assert flags == {transposable}


@pytest.mark.parametrize(
    ("shape", "axes", "transposable"),
    [
        ((8, 12), (0, 1), True),
        ((8, 12), (1, 0), True),
        ((3, 8, 12), (-1, -2), True),
        ((8, 12, 5), (0, 1), False),
        ((8, 3, 12), (2, 0), False),
    ],
)
def test_the_second_axis_is_the_innermost_output(shape, axes, transposable):
    w, dense = packed(shape, axes)
    assert w.transposable == transposable
    np.testing.assert_array_equal(js.decompress(w), dense)


def test_a_mask_that_holds_along_one_axis_only_is_refused():
    mask = jnp.asarray(np.arange(64).reshape(8, 8) // 8 % 4 < 2)
    plan = js.plan({"w": jnp.ones((8, 8))}, {"w": T24.along((0, 1))})
    with pytest.raises(
        ValueError, match=r"w does not keep exactly 2 of every 4 along axis -1 of shape \(8, 8\)"
    ):
        js.compress({"w": jnp.ones((8, 8))}, {"w": mask}, plan)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 36), (2, 8, 4)])
def test_turned_it_is_packed_along_the_other_axis_bit_by_bit(shape, dtype):
    w, mask = random_weights(shape, dtype, 0), both_ways(shape, (-2, -1))
    plan = js.plan({"w": w}, {"w": T24.along((-2, -1))})
    compressed = js.compress(
        {"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)}, plan, layout="canonical"
    )["w"]
    check_round_trip(w, mask, compressed)
    values, words = optimized(transposed)(compressed.values, compressed.metadata)
    expected = [
        packed_row(*row)
        for row in zip(w.reshape(-1, shape[-1]), mask.reshape(-1, shape[-1]), strict=True)
    ]
    np.testing.assert_array_equal(
        bits(values).reshape(len(expected), -1),
        bits(np.array([one[0] for one in expected], w.dtype)),
    )
    np.testing.assert_array_equal(
        np.asarray(words).reshape(len(expected), -1), [one[1] for one in expected]
    )


def test_it_stays_an_ordinary_pytree(tmp_path):
    assert js.flax  # registers what flax.serialization has to know
    w, dense = packed((128, 128), (0, 1), dtype=jnp.bfloat16, layout="mma16")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", {"w": w})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "packed", jax.eval_shape(lambda: {"w": w}))["w"]
    zeros = jax.tree.map(jnp.zeros_like, w)
    copies = [
        restored,
        serialization.from_bytes(zeros, serialization.to_bytes(w)),
        w.with_layout("canonical").with_layout("mma16"),
    ]
    copies += [
        jax.jit(lambda w: w)(w),
        jax.device_put(w, jax.devices()[0]),
        jax.tree.map(jnp.copy, w),
    ]
    copies.append(
        jax.jit(lambda w: jax.tree.map(lambda a: a + 0, w), donate_argnums=0)(
            jax.tree.map(jnp.copy, w)
        )
    )
    for copy in copies:
        assert copy.transposable and jax.tree.structure(copy) == jax.tree.structure(w)
        np.testing.assert_array_equal(js.decompress(copy), dense)
    assert len(jax.tree.leaves(w)) == 2 and w.nbytes == dense.nbytes * 9 // 16


def close(a, b, tolerance=1e-4):
    np.testing.assert_allclose(
        np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance
    )


def normal(*shape, dtype=jnp.float32, seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# shape and axes of the weight, how many axes are contracted, shape of x, the same product by einsum
PRODUCTS = {
    "rows": ((16, 8), (0, 1), 1, (5, 16), "nk,km->nm"),
    "one row": ((16, 8), (0, 1), 1, (16,), "k,km->m"),
    "batches": ((16, 8), (0, 1), 1, (2, 3, 16), "abk,km->abm"),
    "output first": ((8, 16), (1, 0), 1, (5, 16), "nk,mk->nm"),
    "several output axes": ((16, 3, 8), (0, 2), 1, (5, 16), "nk,kab->nab"),
    "several contracted axes": ((3, 16, 8), (1, 2), 2, (5, 3, 16), "nck,ckm->nm"),
    "a stack": ((2, 16, 8), (1, 2), 1, (2, 5, 16), "snk,skm->snm"),
}


HOW = ["plain", "jit", "remat", "bias and activation", "bfloat16"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "jit") for name in PRODUCTS if name not in ("rows", "a stack")),
        *itertools.product(["rows", "a stack"], HOW),
    ],
)
def test_gradients_equal_those_of_the_dense_product(name, how):
    shape, axes, contracting, x, sums = PRODUCTS[name]
    dtype = jnp.bfloat16 if how == "bfloat16" else jnp.float32
    w, dense = packed(shape, axes, dtype=dtype, contracting=contracting)
    x = normal(*x, dtype=dtype)
    bias = normal(*w.values.shape[:-2], *w.output) if how == "bias and activation" else None

    def sparse(x, w):
        y = js.sparse_matmul(x, w, bias=bias, activation=None if bias is None else "relu")
        return jnp.sin(y.astype(jnp.float32)).sum()

    def plain(x, dense):
        y = jnp.einsum(sums, x, dense, preferred_element_type=jnp.float32)
        y = (
            y
            if bias is None
            else jax.nn.relu(y + (bias[:, None] if sums.startswith("s") else bias[None]))
        )
        return jnp.sin(y.astype(dtype).astype(jnp.float32)).sum()

    gradients = jax.grad(jax.remat(sparse) if how == "remat" else sparse, (0, 1), allow_int=True)
    gradients = gradients if how == "plain" else jax.jit(gradients)
    x_grad, w_grad = gradients(x, w)
    x_expected, dense_expected = jax.grad(plain, (0, 1))(x, jnp.asarray(dense))
    close(x_grad, x_expected, 3e-2 if how == "bfloat16" else 1e-4)
    # the gradients of the values, at the kept places
    kept = dataclasses.replace(w, values=w_grad.values)
    close(
        js.decompress(kept),
        jnp.where(dense != 0, dense_expected, 0),
        3e-2 if how == "bfloat16" else 1e-4,
    )


def test_gradients_under_vmap_and_scan():
    w, dense = packed((3, 16, 16), (1, 2))
    x = normal(3, 5, 16)

    def loss(product, x, w):
        return jnp.sin(product(x, w)).sum()

    for axes in ((0, 0), (None, 0), (0, None)):
        arguments = [
            leaf if axis == 0 else leaf[0]
            for leaf, axis in zip((x, jnp.asarray(dense)), axes, strict=True)
        ]
        one = w if axes[1] == 0 else jax.tree.map(lambda leaf: leaf[0], w)
        gradients = jax.vmap(jax.grad(functools.partial(loss, js.sparse_matmul)), axes)(
            arguments[0], one
        )
        close(gradients, jax.vmap(jax.grad(functools.partial(loss, jnp.dot)), axes)(*arguments))

    def chained(product, x, ws):
        return jnp.sin(jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, ws)[0]).sum()

    gradients = jax.jit(jax.grad(functools.partial(chained, js.sparse_matmul)))(x[0], w)
    close(gradients, jax.grad(functools.partial(chained, jnp.dot))(x[0], jnp.asarray(dense)))


def test_an_adapter_trains_below_frozen_compressed_weights():
    model, x = nn.Sequential([nn.Dense(16), nn.relu, nn.DenseGeneral((4, 8))]), normal(3, 16)
    params = model.init(jax.random.key(0), x)
    plan = js.flax.plan(model, {"*kernel": T24}, x)
    masks = jax.jit(js.magnitude_masks)(params, plan)

    def loss(adapter, params):
        with js.flax.intercept():
            return jnp.sin(model.apply(params, x + x @ adapter)).sum()

    adapter = normal(16, 16) / 8
    gradient = jax.jit(jax.grad(loss))(adapter, js.compress(params, masks, plan))
    close(gradient, jax.jit(jax.grad(loss))(adapter, js.effective_params(params, masks)))


def test_the_turned_product_has_second_derivatives_and_gradients_of_values():
    w, dense = packed((16, 8), (0, 1))
    x, direction = normal(5, 16), normal(5, 16, seed=6)

    def along(product, leaf, x):
        return (jax.grad(lambda x: jnp.sin(product(x, leaf)).sum())(x) * direction).sum()

    def of_values(values):
        return along(js.sparse_matmul, dataclasses.replace(w, values=values), x)

    close(
        jax.grad(functools.partial(along, js.sparse_matmul, w))(x),
        jax.grad(functools.partial(along, jnp.dot, jnp.asarray(dense)))(x),
    )
    expected = jax.grad(lambda dense: along(jnp.dot, dense, x))(jnp.asarray(dense))
    gradient = js.decompress(dataclasses.replace(w, values=jax.grad(of_values)(w.values)))
    close(gradient, jnp.where(dense != 0, expected, 0))


def by_expanding(x, values, metadata, *bias):
    """What a kernel is asked for."""
    y = x @ expand(values, layouts.untile(metadata, values.shape[0], -(-values.shape[1] // 8))).T
    return y + bias[0][None].astype(y.dtype) if bias else y


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["canonical", "mma16"])
@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_kernels_are_given_each_weight_of_a_stack_the_right_way_around(stack, layout):
    w, dense = packed((*stack, 64, 128), (-2, -1), dtype=jnp.bfloat16, layout=layout, integers=True)
    x, ct = (
        jnp.asarray(np.random.default_rng(1).integers(-2, 3, (*stack, 4, size)), jnp.bfloat16)
        for size in (64, 128)
    )
    bias = jnp.broadcast_to(jnp.arange(128.0), (*stack, 128))
    dense = np.asarray(dense, np.float32)
    y = matmul._with_kernel(by_expanding, "mma16", layout, False, x, w.values, w.metadata, bias)
    np.testing.assert_array_equal(
        y,
        jnp.asarray((np.asarray(x, np.float32) @ dense).astype(jnp.bfloat16))
        + bias[..., None, :].astype(x.dtype),
    )
    dx = matmul._with_kernel(by_expanding, "mma16", layout, True, ct, w.values, w.metadata)
    np.testing.assert_array_equal(
        dx, jnp.asarray(np.asarray(ct, np.float32) @ dense.swapaxes(-1, -2)).astype(jnp.bfloat16)
    )


RUNS = {
    "hopper": functools.partial(hopper.matmul, cores=4, ops=interpreted.hopper_ops),
    "decode": functools.partial(decode.matmul, cores=4, ops=interpreted.decode_ops),
}


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot interpret transposed references"
)
@pytest.mark.parametrize("name", RUNS)
def test_the_gradient_of_x_by_a_whole_kernel_is_exact(name):
    w, dense = packed((196, 132), (0, 1), dtype=jnp.bfloat16, layout="mma16", integers=True)
    ct = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (24, 132)), jnp.bfloat16)
    run = functools.partial(RUNS[name], **interpreted.params())
    dx = matmul._with_kernel(run, "mma16", "mma16", True, ct, w.values, w.metadata)
    np.testing.assert_array_equal(
        dx,
        jnp.asarray(np.asarray(ct, np.float32) @ np.asarray(dense, np.float32).T).astype(
            jnp.bfloat16
        ),
    )
