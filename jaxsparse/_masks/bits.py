"""Masks packed at one bit a weight, as the optimizer state keeps them."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8

from jaxsparse._checks import AnArray

__all__ = ["pack", "unpack"]


@functools.partial(jax.jit, static_argnames="axis")
def pack(mask: Bool[AnArray, "..."], axis: int) -> UInt8[Array, "..."]:
    """Packs a boolean mask into uint8: eight neighbours along `axis` a byte, lowest bit first."""
    axis %= mask.ndim
    size = mask.shape[axis]
    spare = [(0, -size % 8 if i == axis else 0) for i in range(mask.ndim)]
    eights = jnp.pad(mask, spare).reshape(
        *mask.shape[:axis], -(-size // 8), 8, *mask.shape[axis + 1 :]
    )
    return (eights.astype(jnp.uint8) << _places(eights, axis + 1)).sum(axis + 1, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnames=("size", "axis"))
def unpack(words: UInt8[AnArray, "..."], size: int, axis: int) -> Bool[Array, "..."]:
    """Unpacks a boolean mask that has `size` along `axis`."""
    axis %= words.ndim
    repeated = jnp.expand_dims(words, axis + 1)
    eights = repeated >> _places(repeated, axis + 1) & 1 == 1
    whole = eights.reshape(*words.shape[:axis], 8 * words.shape[axis], *words.shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis)


def _places(eights, axis):
    """The places of eight bits along an axis of `eights`; size 1 along the others."""
    return jnp.arange(8, dtype=jnp.uint8).reshape(
        [8 if i == axis else 1 for i in range(eights.ndim)]
    )
