"""`sparse_matmul` and its transformations equal the product with the dense masked weight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxsparse as js


def make(
    core=(24,),
    output=(6,),
    *,
    stack=(),
    output_first=False,
    dtype=jnp.float32,
    integers=False,
    seed=0,
):
    """A packed weight, and the dense masked weight in NumPy, float64, as `[*stack, K, M]`."""
    random = np.random.default_rng(seed)
    k, m = math.prod(core), math.prod(output)
    w = random.integers(-8, 9, (*stack, k, m)) if integers else random.normal(size=(*stack, k, m))
    keep = random.permuted(
        np.broadcast_to([True, True, False, False], (*stack, m, k // 4, 4)), axis=-1
    )
    mask = keep.reshape(*stack, m, k).swapaxes(-1, -2)
    w = np.asarray(jnp.asarray(w).astype(dtype), np.float64)
    values = w.swapaxes(-1, -2)[mask.swapaxes(-1, -2)].reshape(*stack, m, k // 2)
    first = np.argmax(keep, axis=-1)
    second = 3 - np.argmax(keep[..., ::-1], axis=-1)
    nibbles = np.full((*stack, m, math.ceil(k / 16) * 4), 4)
    nibbles[..., : k // 4] = first | second << 2
    words = (nibbles.reshape(*stack, m, -1, 4) * 16 ** np.arange(4)).sum(-1)
    axes = "O" * len(output) + "K" * len(core) if output_first else ""
    return js.Sparse24(
        jnp.asarray(values, dtype), jnp.asarray(words, jnp.uint16), core, output, axes
    ), np.where(mask, w, 0)


def make_x(shape, dtype=jnp.float32, integers=False, seed=9):
    random = np.random.default_rng(seed)
    return jnp.asarray(
        random.integers(-8, 9, shape) if integers else random.normal(size=shape)
    ).astype(dtype)


def dense_product(x, w):
    """The product row by row of x, for its last axis and `[K, M]`."""
    x = np.asarray(x, np.float64)
    return np.stack(
        [sum(row[k] * w[k] for k in range(len(row))) for row in x.reshape(-1, x.shape[-1])]
    ).reshape(*x.shape[:-1], -1)


def close(a, b, **kwargs):
    np.testing.assert_allclose(
        np.asarray(a, np.float64),
        np.asarray(b, np.float64),
        **{"rtol": 1e-5, "atol": 1e-5, **kwargs},
    )


@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_integers_are_exact_for_x_of_any_rank(rows, dtype):
    w, dense = make(dtype=dtype, integers=True)
    x = make_x((*rows, 24), dtype, integers=True)
    y = js.sparse_matmul(x, w)
    assert y.dtype == dtype
    assert y.shape == (*rows, 6)
    if y.size:
        np.testing.assert_array_equal(
            np.asarray(y, np.float64),
            np.asarray(jnp.asarray(dense_product(x, dense)).astype(dtype), np.float64),
        )


@pytest.mark.parametrize("implementation", [None, "dense"])
def test_random_floats(implementation):
    w, dense = make(core=(40,))
    x = make_x((7, 40))
    close(js.sparse_matmul(x, w, implementation=implementation), dense_product(x, dense))


@pytest.mark.parametrize("output_first", [False, True])
def test_several_contracted_and_output_axes(output_first):
    w, dense = make(core=(3, 8), output=(2, 5), output_first=output_first)
    x = make_x((4, 2, 3, 8))
    y = js.sparse_matmul(x, w)
    assert y.shape == (4, 2, 2, 5)
    close(y.reshape(4, 2, 10), dense_product(x.reshape(4, 2, 24), dense))
    axes = (2, 3, 0, 1) if output_first else (0, 1, 2, 3)
    close(js.decompress(w), dense.reshape(3, 8, 2, 5).transpose(axes), rtol=1e-6)


@pytest.mark.parametrize("rows", [(), (4,), (4, 3)])
def test_a_stack_multiplies_each_with_its_own(rows):
    w, dense = make(stack=(2, 3))
    x = make_x((2, 3, *rows, 24))
    y = js.sparse_matmul(x, w)
    assert y.shape == (2, 3, *rows, 6)
    for i in range(2):
        for j in range(3):
            close(y[i, j], dense_product(x[i, j], dense[i, j]))


@pytest.mark.parametrize(
    "x_dtype, w_dtype",
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "float16"),
        ("bfloat16", "int8"),
    ],
)
def test_dtypes_promote_as_in_a_dense_product(x_dtype, w_dtype):
    w, dense = make(dtype=w_dtype, integers=True)
    x = make_x((3, 24), x_dtype, integers=True)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
        js.sparse_matmul(x, w)
    with jax.numpy_dtype_promotion("standard"):
        y = js.sparse_matmul(x, w)
        assert y.dtype == jnp.promote_types(x_dtype, w_dtype)
    close(y, jnp.asarray(dense_product(x, dense)).astype(y.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("w_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_products_of_8_bit_floats_are_summed_in_float32(w_dtype, x_dtype):
    w = jax.random.randint(jax.random.key(0), (64, 6), -8, 9).astype(w_dtype)
    plan = js.plan({"w": w}, {"w": js.NM(2, 4, axis=0)})
    masks = js.magnitude_masks({"w": w}, plan)
    packed = js.compress({"w": w}, masks, plan)["w"]
    assert packed.dtype == w_dtype
    x = make_x((3, 64), x_dtype or w_dtype, integers=True)
    dense = np.where(masks["w"], np.asarray(w, np.float64), 0)
    exact = jnp.asarray(dense_product(x, dense), jnp.float32)
    y = js.sparse_matmul(x, packed)
    assert y.dtype == (jnp.float32 if x_dtype else w_dtype)
    np.testing.assert_array_equal(y.astype(jnp.float32), exact.astype(y.dtype).astype(jnp.float32))
    wide = js.sparse_matmul(x, packed, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(wide, exact)
    gradient = jax.grad(lambda x: js.sparse_matmul(x, packed).astype(jnp.float32).sum())(x)
    assert gradient.dtype == x.dtype
    expected = jnp.asarray(np.tile(dense.sum(1), (3, 1)), jnp.float32).astype(x.dtype)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), expected.astype(jnp.float32))


def test_without_jit_the_product_and_its_transformations_are_the_same():
    w, _ = make()
    x = make_x((5, 24))

    def loss(x, values):
        return js.sparse_matmul(x, dataclasses.replace(w, values=values), activation="silu").sum()

    expected = jax.value_and_grad(loss, (0, 1))(x, w.values)
    with jax.disable_jit():
        eager = jax.value_and_grad(loss, (0, 1))(x, w.values)
        rows = jax.vmap(js.sparse_matmul, (0, None))(x, w)
    jax.tree.map(close, eager, expected)
    close(rows, js.sparse_matmul(x, w))


def test_sixteen_bit_sums_are_taken_in_float32():
    values = jnp.full((1, 512), 1.0, jnp.bfloat16).at[0, 0].set(256)  # in bfloat16, 256 + 1 is 256
    w = js.Sparse24(values, jnp.full((1, 64), 0x4444, jnp.uint16), (1024,), (1,))
    x = jnp.ones((1, 1024), jnp.bfloat16)
    assert js.sparse_matmul(x, w)[0, 0] == 768  # 767 to the nearest of 8 bits
    (product,) = [
        line
        for line in jax.jit(js.sparse_matmul).lower(x, w).as_text().splitlines()
        if "dot_general" in line
    ]
    assert product.endswith("-> tensor<1x1xf32>")  # sums in float32 whatever the backend


@pytest.mark.parametrize(
    "precision",
    ["highest", jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)],
)
def test_precision_reaches_the_product_and_its_gradients(precision):
    w, _ = make()
    f = lambda x, w: js.sparse_matmul(x, w, precision=precision).sum()  # noqa: E731
    text = jax.jit(jax.grad(f, argnums=(0, 1), allow_int=True)).lower(make_x((3, 24)), w).as_text()
    assert text.count("precision = [HIGHEST, HIGHEST]") == text.count("dot_general") > 1
    plain = jax.jit(js.sparse_matmul).lower(make_x((3, 24)), w).as_text()
    assert "HIGHEST" not in plain
    assert "dot_general" in plain


@pytest.mark.parametrize(
    ("asked", "said"),
    [("highest", "HIGHEST"), ("BF16_BF16_F32_X3", "num_primitive_operations = 3")],
)
def test_the_precision_of_the_context_is_that_where_the_product_is_called(asked, said):
    w, _ = make()

    def f(x, w):
        with jax.default_matmul_precision(asked):
            return js.sparse_matmul(x, w).sum()

    text = jax.jit(jax.grad(f, argnums=(0, 1), allow_int=True)).lower(make_x((3, 24)), w).as_text()
    assert text.count("dot_general") > 1
    assert all(said in line for line in text.splitlines() if "dot_general" in line)


def test_the_gradient_of_relu_at_0_is_0():
    w, _ = make()
    x = jnp.zeros((3, 24))
    gradients, expected = (
        jax.grad(lambda x, values, f=f: f(x, with_values(w, values)).sum(), (0, 1))(x, w.values)
        for f in (
            functools.partial(js.sparse_matmul, activation="relu"),
            lambda x, w: jax.nn.relu(js.sparse_matmul(x, w)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)
    assert not gradients[0].any()


def with_values(w, values):
    return js.Sparse24(values, w.metadata, w.contracting, w.output, w.axes)


def dense_twin(w):
    """A differentiable dense product of x and the values, by a scatter outside of the library."""
    k, m = w.contracting[0], w.output[0]
    nibbles = np.asarray(w.metadata)[..., None] >> np.arange(0, 16, 4) & 15
    nibbles = nibbles.reshape(m, -1)[:, : k // 4]
    rows = np.stack([nibbles & 3, nibbles >> 2], -1) + 4 * np.arange(k // 4)[:, None]
    columns = np.broadcast_to(np.arange(m)[:, None], (m, k // 2))

    def product(x, values):
        return x @ jnp.zeros((k, m), values.dtype).at[rows.reshape(m, -1), columns].set(values)

    return product


W, DENSE = make()
X = make_x((5, 24))
TWIN = dense_twin(W)


def sparse(x, values):
    return js.sparse_matmul(x, with_values(W, values))


def scalar(f):
    return lambda x, values: jnp.sin(f(x, values)).sum()


def test_gradients_equal_the_dense_ones_at_the_kept_places():
    x_grad, values_grad = jax.grad(scalar(sparse), (0, 1))(X, W.values)
    through_y = np.cos(dense_product(X, DENSE))
    close(x_grad, through_y @ DENSE.T)
    dense_grad = np.asarray(X, np.float64).T @ through_y
    kept = DENSE != 0
    close(values_grad, dense_grad.T[kept.T].reshape(6, 12))


def test_the_gradient_of_a_weight_is_a_weight():
    grads = jax.grad(lambda w: jnp.sin(js.sparse_matmul(X, w)).sum(), allow_int=True)(W)
    assert isinstance(grads, js.Sparse24)
    assert grads.metadata.dtype == jax.dtypes.float0
    close(grads.values, jax.grad(scalar(sparse), 1)(X, W.values), rtol=1e-6)


@pytest.mark.parametrize("mode", ["jvp", "linearize", "jvp of x", "jvp of values"])
def test_forward_mode_equals_the_dense_one(mode):
    dots = make_x(X.shape, seed=1), make_x(W.values.shape, seed=2)
    if mode == "linearize":
        run = lambda f: jax.linearize(f, X, W.values)[1](*dots)  # noqa: E731
    elif mode == "jvp":
        run = lambda f: jax.jvp(f, (X, W.values), dots)[1]  # noqa: E731
    elif mode == "jvp of x":
        run = lambda f: jax.jvp(lambda x: f(x, W.values), (X,), dots[:1])[1]  # noqa: E731
    else:
        run = lambda f: jax.jvp(lambda values: f(X, values), (W.values,), dots[1:])[1]  # noqa: E731
    close(run(sparse), run(TWIN))


@pytest.mark.slow
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_second_derivatives_equal_the_dense_ones(outer, argnums):
    x = X[:2]
    derivatives, expected = (
        outer(jax.grad(scalar(f), argnums), argnums)(x, W.values) for f in (sparse, TWIN)
    )
    jax.tree.map(functools.partial(close, atol=1e-4), derivatives, expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, None), (None, 2), (1, 2)])
def test_vmap_equals_the_dense_one(axes):
    x = X if axes[0] is None else jnp.stack([X, 2 * X, X - 1], axes[0])
    values = (
        W.values if axes[1] is None else jnp.stack([W.values, 3 * W.values, W.values + 1], axes[1])
    )
    for f, twin in (
        (sparse, TWIN),
        (jax.grad(scalar(sparse), (0, 1)), jax.grad(scalar(TWIN), (0, 1))),
    ):
        jax.tree.map(
            functools.partial(close, atol=1e-4),
            jax.vmap(f, axes)(x, values),
            jax.vmap(twin, axes)(x, values),
        )


def test_vmap_over_whole_weights_and_nested():
    ws, dense = make(stack=(2, 3), seed=4)
    y = jax.vmap(jax.vmap(js.sparse_matmul, (None, 0)), (0, 0))(make_x((2, 5, 24)), ws)
    for i in range(2):
        for j in range(3):
            close(y[i, j], dense_product(make_x((2, 5, 24))[i], dense[i, j]))
    close(
        jax.vmap(jax.vmap(js.sparse_matmul, (0, None)), (0, None))(make_x((2, 3, 24)), W),
        dense_product(make_x((2, 3, 24)), DENSE),
    )
    y = jax.vmap(jax.vmap(js.sparse_matmul, (0, None)), (None, 0))(
        X, jax.tree.map(lambda a: a[0], ws)
    )
    close(y[1], dense_product(X, dense[0, 1]))


def test_jit_remat_and_scan():
    expected = jax.grad(scalar(TWIN), (0, 1))(X, W.values)
    for f in (jax.jit(sparse), jax.remat(sparse), jax.jit(jax.remat(sparse))):
        jax.tree.map(close, jax.grad(scalar(f), (0, 1))(X, W.values), expected)
    ws, dense = make(output=(24,), stack=(3,))

    def chained(x, ws):
        return jax.lax.scan(lambda x, w: (js.sparse_matmul(x, w), None), x, ws)[0]

    y = np.asarray(X)
    for one in dense:
        y = dense_product(y, one)
    close(chained(X, ws), y, rtol=1e-4, atol=1e-3)
    x_grad = jax.grad(lambda x: chained(x, ws).sum())(X)
    close(x_grad, np.ones((5, 24)) @ dense[2].T @ dense[1].T @ dense[0].T, rtol=1e-4, atol=1e-3)


PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def test_it_exports_for_every_platform_at_once():
    exported = export.export(
        jax.jit(lambda x, values: js.sparse_matmul(x, with_values(W, values))), platforms=PLATFORMS
    )(X, W.values)
    assert exported.platforms == PLATFORMS
    close(exported.call(X, W.values), dense_product(X, DENSE))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_it_lowers_for_a_platform_that_is_not_here(platform):
    f = jax.jit(jax.value_and_grad(scalar(sparse), (0, 1)))
    assert "dot_general" in f.trace(X, W.values).lower(lowering_platforms=(platform,)).as_text()


def test_a_mismatch_names_both_shapes():
    with pytest.raises(
        ValueError, match=r"`x` of shape \(5, 20\) does not end with the contracted axes \(24,\)"
    ):
        js.sparse_matmul(X[:, :20], W)
    with pytest.raises(TypeError, match="not a Sparse24"):
        js.sparse_matmul(X, DENSE)
