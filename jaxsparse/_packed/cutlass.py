"""Weights in the arrangement of CUTLASS, which PyTorch's semi-structured tensors hold."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxsparse._checks import AnArray
from jaxsparse._packed.sparse24 import Sparse24

__all__ = ["CutlassArrays", "from_cutlass", "to_cutlass"]

# by the bytes of a value: the dtype of a word, and the rows that are interleaved
WORDS: dict[int, tuple[np.dtype, int]] = {2: (np.dtype("int16"), 32), 1: (np.dtype("int32"), 16)}


class CutlassArrays(NamedTuple):
    """A weight as CUTLASS reads it.

    Attributes:
      values: `[M, K/2]`, the kept weights.
      metadata: int16 `[M, K/16]` for values of 16 bits, int32 `[M, K/32]` for values of 8 bits: the
        places, in the order of CUTLASS.
    """

    values: Shaped[Array, "M half"]
    metadata: Int[Array, "M columns"]


def to_cutlass(w: Sparse24) -> CutlassArrays:
    """Converts a compressed weight to the arrays of PyTorch's `SparseSemiStructuredTensorCUTLASS`.

    They are its fields `packed` and `meta`, of a weight `[M, K]` as `torch.nn.Linear` has it.

    Args:
      w: a compressed weight of 16 or 8 bits, without stacks; M is a multiple of 32 (16 bits) or 16
        (8 bits), and K of 32 or 64. Its metadata may have any layout.

    Returns:
      A named tuple of `values` `[M, K/2]` and `metadata`, which is int16 `[M, K/16]` for weights of
      16 bits and int32 `[M, K/32]` for those of 8.

    Raises:
      TypeError: `w` is not a compressed weight.
      ValueError: CUTLASS has no such weight: its dtype, a stack, its sizes, or a scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32), jnp.bfloat16)}
      >>> plan = js.plan(params, {"kernel": js.NM(2, 4, axis=0)})
      >>> packed = js.compress(params, js.magnitude_masks(params, plan), plan)
      >>> values, metadata = js.to_cutlass(packed["kernel"])
      >>> values.shape, metadata.shape, metadata.dtype
      ((32, 32), (32, 4), dtype('int16'))

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """
    if not isinstance(w, Sparse24):
        raise TypeError(f"to_cutlass: `w` is a {type(w).__name__}. Pass a weight from compress.")
    _check("to_cutlass", w.values)
    if w.scale is not None:
        raise ValueError(
            "to_cutlass: `w` has a scale, which the arrays of CUTLASS lack. Pass the integers as "
            "dataclasses.replace(w, scale=None, input_scale=None, activations=None), and keep "
            "`w.scale`."
        )
    words = w.with_layout("canonical").metadata
    if w.values.dtype.itemsize == 1:
        words = words.reshape(*words.shape[:-1], -1, 2)
    word, rows = WORDS[w.values.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(words, word)
    m, columns = words.shape
    words = words.reshape(-1, rows // 8, 8, columns).swapaxes(1, 2)
    blocks = words.reshape(m // 2, 2, columns // 2, 2).transpose(2, 0, 3, 1)
    return CutlassArrays(w.values, blocks.reshape(m, columns))


def from_cutlass(
    values: Shaped[AnArray, "M half"], metadata: Int[AnArray, "M columns"], *, axes: str = "KO"
) -> Sparse24:
    """Reads a compressed weight from the arrays of `SparseSemiStructuredTensorCUTLASS`.

    Args:
      values: `[M, K/2]`, its field `packed`, of 16 or 8 bits.
      metadata: its field `meta`, int16 `[M, K/16]` or int32 `[M, K/32]`.
      axes: the order of the axes of the dense weight: `"KO"` for `[K, M]`, as a Flax kernel is, or
        `"OK"` for `[M, K]`, as in PyTorch.

    Returns:
      The compressed weight, with canonical metadata.

    Raises:
      ValueError: the dtypes, sizes or places are not those of a 2:4 weight in CUTLASS.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxsparse as js
      >>> values, metadata = jnp.ones((32, 16), jnp.bfloat16), jnp.full((32, 2), 0x4444, jnp.int16)
      >>> js.decompress(js.from_cutlass(values, metadata, axes="OK"))[0, :6]
      Array([1, 1, 0, 0, 1, 1], dtype=bfloat16)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """
    call = "from_cutlass"
    if axes not in ("KO", "OK"):
        raise ValueError(f'{call}: `axes` is {axes!r}. Pass "KO" or "OK".')
    values, metadata = jnp.asarray(values), jnp.asarray(metadata)
    _check(call, values)
    word, rows = WORDS[values.dtype.itemsize]
    m, half = values.shape
    columns = half // (4 * word.itemsize)
    if metadata.dtype != word or metadata.shape != (m, columns):
        raise ValueError(
            f"{call}: `metadata` is {metadata.dtype} {metadata.shape}, but values {values.dtype} "
            f"{values.shape} need {word} {(m, columns)}. Pass `packed` and `meta` of one "
            "tensor."
        )
    blocks = metadata.reshape(columns // 2, m // 2, 2, 2).transpose(1, 3, 0, 2)
    words = blocks.reshape(-1, 8, rows // 8, columns).swapaxes(1, 2).reshape(m, columns)
    words = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(m, -1)
    return Sparse24(values, words, contracting=(2 * half,), output=(m,), axes=axes)


def _check(call: str, values: jax.Array) -> None:
    """Raises a ValueError if CUTLASS has no 2:4 weight with such values."""
    size = values.dtype.itemsize
    if size not in WORDS:
        raise ValueError(
            f"{call}: the values are {values.dtype}, but 2:4 in CUTLASS is for values of 16 and 8 "
            "bits. Cast the weight."
        )
    if values.ndim != 2:
        raise ValueError(
            f"{call}: the values have shape {values.shape}, but CUTLASS has one weight of shape "
            "(M, K/2). Convert the weights of a stack one by one."
        )
    rows, columns = WORDS[size][1], 64 // size
    m, k = values.shape[0], 2 * values.shape[1]
    if m % rows or k % columns:
        raise ValueError(
            f"{call}: M is {m} and K is {k}, but CUTLASS needs multiples of {rows} and {columns}. "
            "Pad the weight before compressing it."
        )
