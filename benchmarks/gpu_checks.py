"""Checks of products with compressed weights: single operands, integers, random numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse as js

NIBBLES = np.array([4, 8, 9, 12, 13, 14], np.uint16)


def weight(values, nibbles, layout="mma16"):
    """A weight from values `[M, K/2]` and one nibble for each group, `[M, K/4]`.

    K is a multiple of 16.
    """
    words = (
        np.asarray(nibbles, np.uint16).reshape(len(nibbles), -1, 4)
        << np.arange(0, 16, 4, dtype=np.uint16)
    ).sum(-1, dtype=np.uint16)
    m, half = values.shape
    return js.Sparse24(values, jnp.asarray(words), (2 * half,), (m,)).with_layout(layout)


def dense(w):
    """The weight as a dense array `[K, M]` in float32."""
    return np.asarray(js.decompress(w), np.float32)


def probes(multiply, m=128, k=128, dtype=jnp.bfloat16, rows=64):
    """Counts the wrong elements of products that read out one operand at a time.

    Args:
      multiply: a function from x `[N, K]` and a weight to `[N, M]`.
      m: the number of output features.
      k: the size of the contraction.
      dtype: the dtype of x and of the values.
      rows: the rows of x in one call.

    Returns:
      A dict from the operand to the number of wrong elements.
    """
    place = np.arange(m * k // 2).reshape(m, k // 2)
    group = np.arange(m)[:, None] + np.arange(k // 4)
    # 16 compressed values belong to one selector, 8 of them to one of its lanes
    column = np.arange(k // 2) // 8 % 4
    one = jnp.eye(k, dtype=dtype)
    wrong = {}

    def read(name, values, nibbles):
        """Reads out the weight by rows of the identity, one row of x for each column."""
        w = weight(jnp.asarray(values, dtype), nibbles)
        y = np.concatenate(
            [
                np.asarray(multiply(one[first : first + rows], w), np.float32)
                for first in range(0, k, rows)
            ]
        )
        wrong[name] = wrong.get(name, 0) + int((y != dense(w)).sum())

    for code in (
        place % 251 + 1,
        place // 251 % 251 + 1,
    ):  # the two codes together identify every place
        read("values", code, NIBBLES[group % 6])
    for turn in range(6):
        read("metadata", np.ones((m, k // 2)), NIBBLES[(group + turn) % 6])
    for lane in range(4):
        read("selectors", np.where(column == lane, place % 7 + 1, 0), NIBBLES[(group * 5) % 6])
    w = weight(jnp.ones((m, k // 2), dtype), np.full((m, k // 4), 4))  # the first two of every four
    x = np.arange(rows * k).reshape(rows, k)
    for code in (x % 251 + 1, x // 251 % 251 + 1):
        hot = np.eye(k, dtype=bool)[np.arange(rows) * 4 % k]
        x_hot = np.where(hot, code, 0)
        y = np.asarray(multiply(jnp.asarray(x_hot, dtype), w), np.float32)
        wrong["x"] = wrong.get("x", 0) + int((y != x_hot.astype(np.float32) @ dense(w)).sum())
    return wrong


def random_weight(key, m, k, dtype=jnp.bfloat16, integers=False, transposable=False):
    """A weight that keeps the largest of random values.

    These are normal, scaled for the contraction, or integers up to 4.
    """
    return _random_weight(key, m, k, jnp.dtype(dtype), integers, transposable)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _random_weight(key, m, k, dtype, integers, transposable):
    numbers = (
        jax.random.randint(key, (k, m), -4, 5)
        if integers
        else jax.random.normal(key, (k, m)) * k**-0.5
    )
    w = {"w": numbers.astype(dtype)}
    plan = js.plan(
        w, {"w": js.TransposableNM(2, 4, axes=(0, 1)) if transposable else js.NM(2, 4, axis=0)}
    )
    return js.compress(w, js.magnitude_masks(w, plan), plan, layout="mma16")["w"]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_rows(key, n, k, dtype=jnp.bfloat16, integers=False):
    return (
        jax.random.randint(key, (n, k), -4, 5) if integers else jax.random.normal(key, (n, k))
    ).astype(dtype)


def _problem(n, m, k, dtype, integers, gradient):
    """x, a weight, and their product in float32.

    With `gradient`: the gradient of a product, a transposable weight, and the gradient of x.
    """
    x = random_rows(jax.random.key(n), n, m if gradient else k, dtype, integers)
    w = random_weight(jax.random.key(m + k), m, k, dtype, integers, gradient)
    return x, w, _reference(x, w, gradient)


# autotuning would take seconds for each shape
@functools.partial(jax.jit, static_argnums=2, compiler_options={"xla_gpu_autotune_level": 0})
def _reference(x, w, transposed):
    w = js.decompress(w).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return x.astype(jnp.float32) @ (w.T if transposed else w)


def wrong_integers(multiply, n, m, k, dtype=jnp.bfloat16, gradient=False):
    """Counts the wrong elements of a product of small integers, whose sums are exact in float32.

    With `gradient`, `multiply` maps the gradient of a product `[N, M]` and a weight to the gradient
    of x, `[N, K]`.
    """
    x, w, exact = _problem(n, m, k, dtype, True, gradient)
    return int((multiply(x, w) != exact.astype(dtype)).sum())


def error(multiply, n, m, k, dtype=jnp.bfloat16, gradient=False):
    """The largest error of a product of random numbers, in `units`."""
    x, w, exact = _problem(n, m, k, dtype, False, gradient)
    return _units(multiply(x, w), exact)


def fused_error(multiply, n, m, k, dtype=jnp.bfloat16):
    """The largest error of a random product with bias and GELU, in `units`.

    `multiply` takes the bias last.
    """
    x, w, exact = _problem(n, m, k, dtype, False, False)
    bias = jax.random.normal(jax.random.key(m), (m,))
    return _units(multiply(x, w, bias), jax.nn.gelu(exact + bias[None]))


def units(y, x, w):
    """The largest error of a product, in units in the last place of the largest result.

    Rounding alone gives half a unit.
    """
    return _units(y, _reference(x, w, False))


def _units(y, exact):
    unit = float(jnp.finfo(y.dtype).eps) * 2 ** jnp.floor(jnp.log2(jnp.abs(exact).max()))
    return float(jnp.abs(y.astype(jnp.float32) - exact).max() / unit)
