"""Scores to integers that order as they do, and how XLA:CPU is kept from computing a thing again
for each of its readers.
"""

import jax.numpy as jnp
from jax import lax

__all__ = ["magnitude_keys", "once", "order_keys", "wide", "wide_keys"]


def wide(x):
    """Numbers as floats of 32 bits, or of the 64 that they have."""
    return (
        x
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
        else x.astype(jnp.float32)
    )


def wide_keys(keys):
    """Integers of 32 bits, or of the 64 that they have."""
    return keys if keys.dtype.itemsize >= 4 else keys.astype(jnp.int32)


def order_keys(scores):
    """Signed integers that order as the scores do: -0 equals 0, every NaN is the same and above
    infinity.
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
    """Signed integers, 0 or more for floats, that order as the magnitudes of the weights do."""
    weights = _bytes(weights)
    if jnp.issubdtype(weights.dtype, jnp.unsignedinteger):
        return order_keys(weights)
    if jnp.issubdtype(weights.dtype, jnp.integer):
        # |w| - 1, which the lowest integer has too
        return ~jnp.where(weights < 0, weights, -weights)
    bits = _bits(weights)
    return jnp.minimum(bits & jnp.iinfo(bits.dtype).max, _infinity(bits.dtype, weights.dtype) + 1)


def _bytes(x):
    """Integers of fewer than 8 bits as ones of 8."""
    return (
        x.astype(jnp.int8)
        if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8
        else x
    )


def _bits(x):
    # the 8-bit floats differ in their bits for NaN and zero: float16 holds them all
    if x.dtype.itemsize == 1:
        x = x.astype(jnp.float16)
    return lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))


def _infinity(integer, dtype):
    exponent = {jnp.dtype(jnp.bfloat16): 0x7F80}.get(
        jnp.dtype(dtype), {16: 0x7C00, 32: 0x7F800000, 64: 0x7FF << 52}[jnp.iinfo(integer).bits]
    )
    return jnp.array(exponent, integer)


def once(x, f=lambda x: x):
    """`f(x)`, for which each element of x is computed once.

    XLA:CPU fuses a per-group result x into the expansion that reads it and computes it again for
    each member, m times the work; what passes into a conditional, if only on an opaque constant, is
    written first. Elsewhere the fusion is what one wants.
    """

    def written_first(x):
        # as sharded as f(x)
        return lax.cond(
            lax.optimization_barrier(jnp.bool_(True)), f, lambda x: jnp.zeros_like(f(x)), x
        )

    return lax.platform_dependent(x, cpu=written_first, default=f)
