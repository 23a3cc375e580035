"""Integer keys that order as scores do, and a way to compute a value only once on XLA:CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["common_dtype", "magnitude_keys", "once", "order_keys", "wide", "wide_keys"]


def common_dtype(a: Any, b: Any) -> Any:
    """The promoted dtype, also where the program forbids implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def wide(x):
    """Converts numbers to float32; float32 and float64 pass through."""
    return (
        x
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
        else x.astype(jnp.float32)
    )


def wide_keys(keys):
    """Converts integers to int32; 32 and 64 bits pass through."""
    return keys if keys.dtype.itemsize >= 4 else keys.astype(jnp.int32)


def order_keys(scores):
    """Signed integers that order as the scores do.

    -0 equals 0; all NaN are equal and above infinity.
    """
    scores = _bytes(scores)
    if jnp.issubdtype(scores.dtype, jnp.signedinteger):
        return scores
    if jnp.issubdtype(scores.dtype, jnp.integer):
        signed = jnp.dtype(f"int{8 * scores.dtype.itemsize}")
        return lax.bitcast_convert_type(scores, signed) ^ jnp.iinfo(signed).min
    bits = _bits(scores)
    highest, lowest = jnp.iinfo(bits.dtype).max, jnp.iinfo(bits.dtype).min
    keys = jnp.where(bits < 0, lowest - bits, bits)  # sign and magnitude to two's complement
    return jnp.where(bits & highest > _infinity(bits.dtype, scores.dtype), highest, keys)


def magnitude_keys(weights):
    """Signed integers that order as the magnitudes of the weights do; 0 or more for floats."""
    weights = _bytes(weights)
    if jnp.issubdtype(weights.dtype, jnp.unsignedinteger):
        return order_keys(weights)
    if jnp.issubdtype(weights.dtype, jnp.integer):
        # |w| - 1, which does not overflow for the lowest integer
        return ~jnp.where(weights < 0, weights, -weights)
    bits = _bits(weights)
    return jnp.minimum(bits & jnp.iinfo(bits.dtype).max, _infinity(bits.dtype, weights.dtype) + 1)


def _bytes(x):
    """Widens integers of fewer than 8 bits to 8 bits."""
    return (
        x.astype(jnp.int8)
        if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8
        else x
    )


def _bits(x):
    # the 8-bit floats encode NaN and zero differently; float16 holds all of their values
    if x.dtype.itemsize == 1:
        x = x.astype(jnp.float16)
    return lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))


def _infinity(integer, dtype):
    exponent = {jnp.dtype(jnp.bfloat16): 0x7F80}.get(
        jnp.dtype(dtype), {16: 0x7C00, 32: 0x7F800000, 64: 0x7FF << 52}[jnp.iinfo(integer).bits]
    )
    return jnp.array(exponent, integer)


def once(x, f=lambda x: x):
    """Computes `f(x)` such that each element of x is computed only once.

    XLA:CPU fuses a per-group result x into the expansion that reads it, and so computes it again
    for each member: m times the work. An operand of a conditional is computed first, even if the
    predicate is an opaque constant. On other platforms the fusion is faster.
    """

    def written_first(x):
        # zeros_like(f(x)) has the sharding of f(x)
        return lax.cond(
            lax.optimization_barrier(jnp.bool_(True)), f, lambda x: jnp.zeros_like(f(x)), x
        )

    return lax.platform_dependent(x, cpu=written_first, default=f)
