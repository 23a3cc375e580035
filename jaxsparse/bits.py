"""Masks at one bit a weight, as the optimizer state keeps them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

__all__ = ["Bits", "pack", "unpack"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("size", "axis"))
@dataclasses.dataclass(frozen=True)
class Bits:
    """A mask whose neighbours along `axis` share bytes, the lowest bit first.

    Attributes:
      words: uint8, of the shape of the mask but for `axis`, which is `ceil(size / 8)` long.
      size: the size of that axis of the mask, static.
      axis: the axis, counted from the end, static.
    """

    words: jax.Array
    size: int
    axis: int


def pack(mask, axis: int) -> Bits:
    """The bits of a boolean mask."""
    size, axis = mask.shape[axis], axis % mask.ndim
    spare = [(0, -size % 8 if i == axis else 0) for i in range(mask.ndim)]
    eights = jnp.pad(mask, spare).reshape(*mask.shape[:axis], -(-size // 8), 8, *mask.shape[axis + 1 :])
    places = jnp.arange(8, dtype=jnp.uint8).reshape(8, *[1] * (mask.ndim - axis - 1))
    return Bits((eights.astype(jnp.uint8) << places).sum(axis + 1, dtype=jnp.uint8), size, axis - mask.ndim)


def unpack(bits: Bits) -> jax.Array:
    """The boolean mask."""
    words = jnp.asarray(bits.words)  # an nnx.Variable in the state of an nnx.Optimizer
    axis = bits.axis % words.ndim
    places = jnp.arange(8, dtype=jnp.uint8).reshape(8, *[1] * (words.ndim - axis - 1))
    eights = jnp.expand_dims(words, axis + 1) >> places & 1 == 1
    whole = eights.reshape(*words.shape[:axis], 8 * words.shape[axis], *words.shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, bits.size, axis=axis)
