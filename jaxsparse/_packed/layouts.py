"""Layouts of 2:4 metadata: the canonical one, and that of the lanes of a sparse tensor core."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt16, UInt32

from jaxsparse._checks import AnArray

__all__ = ["FILLER", "Layout", "convert", "metadata_form", "preferred_layout", "tile", "untile"]

Layout = Literal["canonical", "mma16"]
FILLER = 0x4444  # places 0 and 1 in each of four groups: legal for the hardware


def preferred_layout(dtype: Any) -> Layout:
    """The fastest layout on the default backend; all layouts are correct on all backends."""
    sixteen = jnp.dtype(dtype).itemsize == 2
    return "mma16" if sixteen and jax.default_backend() == "gpu" else "canonical"


def metadata_form(layout: str, values: Any, call: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the metadata of `values` `[..., M, K/2]` in a layout."""
    if layout not in get_args(Layout):
        raise ValueError(
            f"{call}: there is no metadata layout {layout!r}. Pass one of {get_args(Layout)}."
        )
    *stack, m, half = values.shape
    columns = -(-half // 8)
    if layout == "canonical":
        return jax.ShapeDtypeStruct((*stack, m, columns), jnp.uint16)
    if jnp.dtype(values.dtype).itemsize != 2:
        raise ValueError(
            f'{call}: the layout "mma16" is for weights of 16 bits, but this weight is '
            f'{values.dtype}. Pass "canonical".'
        )
    return jax.ShapeDtypeStruct((*stack, 2 * -(-m // 128), 2 * -(-columns // 8), 128), jnp.uint32)


def convert(metadata: Any, old: str, new: str, values: Any) -> Any:
    """Converts the metadata of `values` `[..., M, K/2]` to another layout."""
    metadata_form(new, values, "Sparse24")
    if old == new:
        return metadata
    if new == "mma16":
        return tile(metadata)
    return untile(metadata, values.shape[-2], -(-values.shape[-1] // 8))


def tile(
    words: UInt16[AnArray, "*stack M C"],
) -> UInt32[Array, "*stack row_tiles column_tiles 128"]:
    """Converts canonical uint16 `[..., M, C]` to the layout `"mma16"`.

    The result is uint32 `[..., 2*ceil(M/128), 2*ceil(C/8), 128]`, whose last axis covers 64 rows by
    64 columns of the dense weight. Word `32*w + 4*g + p` is the register of lane `4*g + p` of warp
    w: columns `16*p` to `16*p + 15` of row `16*w + g` in its low half, and of row `16*w + g + 8` in
    its high half. Rows and columns beyond the weight hold `FILLER`.
    """
    *stack, rows, columns = words.shape
    words = jnp.pad(
        words, [(0, 0)] * len(stack) + [(0, -rows % 128), (0, -columns % 8)], constant_values=FILLER
    )
    # row tile, w, half, g, column tile, p
    words = words.reshape(*stack, -1, 4, 2, 8, words.shape[-1] // 4, 4)
    low, high = words[..., 0, :, :, :].astype(jnp.uint32), words[..., 1, :, :, :].astype(jnp.uint32)
    lanes = jnp.moveaxis(low | high << 16, -2, -4)  # row tile, column tile, w, g, p
    return lanes.reshape(*lanes.shape[:-3], 128)


def untile(
    lanes: UInt32[AnArray, "*stack row_tiles column_tiles 128"], rows: int, columns: int
) -> UInt16[Array, "*stack {rows} {columns}"]:
    """Inverts `tile`, cut to canonical `[..., rows, columns]`."""
    *stack, row_tiles, column_tiles, _ = lanes.shape
    # row tile, w, g, column tile, p
    lanes = jnp.moveaxis(lanes.reshape(*stack, row_tiles, column_tiles, 4, 8, 4), -4, -2)
    words = jnp.stack([lanes & 0xFFFF, lanes >> 16], axis=-4).astype(jnp.uint16)
    return words.reshape(*stack, row_tiles * 64, column_tiles * 4)[..., :rows, :columns]
