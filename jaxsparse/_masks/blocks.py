"""Masks of whole blocks of weights."""

import functools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsparse import _checks
from jaxsparse._masks.ranking import magnitude_keys, once, order_keys, wide
from jaxsparse._masks.topk import checked_density, of_one_dtype, ranked_masks

__all__ = ["block_mask", "block_masks"]


def block_mask(
    scores: Real[ArrayLike, "*dims"],
    shape: Sequence[SupportsIndex],
    density: Float[ArrayLike, ""] | int,
    *,
    axes: Sequence[SupportsIndex],
    pool: _checks.Pool = "max",
) -> Bool[Array, "*dims"]:
    """Marks the highest-scoring blocks, exactly `density * blocks` of them, as participating.

    All weights of a block participate, or none. Where a size is not a multiple of the block's, the
    last block is smaller and is scored by the weights that it holds. The number of blocks is
    rounded half up and at least 1. Equal blocks keep the lower flat index. A block with a NaN ranks
    highest. Not differentiable: gradients stop here.

    Args:
      scores: real array of two or more axes, of a floating or integer dtype; the importance of each
        weight. Magnitude pruning passes `jnp.abs(w)`.
      shape: the sizes of a block along `axes`; along every other axis it is 1.
      density: the fraction of blocks that stays, a float in (0, 1], or a traced scalar so that a
        schedule does not recompile.
      axes: the two axes that blocks cover.
      pool: what ranks a block: its `"max"`, `"mean"` or `"l2"` (the root of the sum of squares);
        the last two in float32.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: `scores` are complex or boolean, a size or an axis is not an integer, or `density`
        is not a number.
      ValueError: `shape`, `density`, `axes` or `pool` is invalid, as for `Block`, or an axis is out
        of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.block_mask(jnp.array([[1, 1, 5], [1, 1, 0]]), (2, 2), 0.5, axes=(0, 1)).astype(int)
      Array([[0, 0, 1],
             [0, 0, 1]], dtype=int32)

    References:
      Advances in Sparse Neural Model Training, section 2, block sparsity.
    """
    scores = _checks.array(scores, "block_mask: `scores`")
    density = checked_density("block_mask", density)
    if not _checks.rankable(scores.dtype):
        raise TypeError(
            f"block_mask: `scores` are {scores.dtype}, which cannot be ranked. Pass real scores, "
            "as in jnp.abs(w)."
        )
    shape = _checks.shape_of_block("block_mask", shape)
    axes = _checks.two_axes(axes, "block_mask: `axes`")
    _checks.choice("block_mask", "pool", pool, _checks.Pool)
    reason = _checks.misfit(axes, (1, 1), scores.shape, scores.dtype)
    if reason:
        raise ValueError(
            f"block_mask: {reason} (`scores` of shape {scores.shape}). Choose other axes, pad it, "
            "or leave this leaf dense."
        )
    axes = tuple(axis % scores.ndim for axis in axes)
    return block_masks([scores], [axes], shape, density, pool)[0]


def block_masks(
    arrays: Any,
    axes: Any,
    shape: tuple[int, ...],
    density: Any,
    pool: str,
    *,
    magnitude: bool = False,
    stack: tuple[int, ...] = (),
) -> Any:
    """The masks of arrays whose blocks are ranked together; `axes` has a pair for each array."""
    arrays = [lax.stop_gradient(array) for array in of_one_dtype(arrays)]
    keys = [
        _block_keys(array, shape, pair, pool, magnitude)
        for array, pair in zip(arrays, axes, strict=True)
    ]
    masks = ranked_masks(keys, density, stack=stack)
    return [
        _expand(mask, shape, pair, array.shape)
        for mask, pair, array in zip(masks, axes, arrays, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _block_keys(values, shape, axes, pool, magnitude):
    """Integers that rank the blocks of `values`, one for each block."""
    if pool == "max":
        return _reduce((magnitude_keys if magnitude else order_keys)(values), shape, axes, jnp.max)
    values = wide(values)
    if pool == "l2":
        # the root keeps the order
        return order_keys(_reduce(values * values, shape, axes, jnp.sum))
    total = _reduce(jnp.abs(values) if magnitude else values, shape, axes, jnp.sum)
    return order_keys(total / _reduce(jnp.ones_like(values), shape, axes, jnp.sum))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _expand(mask, shape, axes, whole):
    """Expands the mask of blocks to that of an array of shape `whole`."""
    a, b, split = _split(whole, shape, axes)
    padded = tuple(
        -(-size // step) * step
        for size, step in zip(whole, _steps(whole, shape, axes), strict=True)
    )

    def spread(mask):
        spread_out = jnp.broadcast_to(jnp.expand_dims(mask, (a + 1, b + 2)), split).reshape(padded)
        return lax.slice(spread_out, (0,) * len(whole), whole)

    return spread(once(mask))


def _reduce(values, shape, axes, reduction):
    a, b, split = _split(values.shape, shape, axes)
    short = [
        (0, -size % step)
        for size, step in zip(values.shape, _steps(values.shape, shape, axes), strict=True)
    ]
    if any(after for _, after in short):
        lowest = jnp.iinfo(values.dtype).min if reduction is jnp.max else 0
        values = jnp.pad(values, short, constant_values=lowest)
    # one axis after the other, because XLA:CPU does not vectorise a reduction over both
    return reduction(lax.optimization_barrier(reduction(values.reshape(split), a + 1)), b + 1)


def _steps(whole, shape, axes):
    steps = dict(zip(axes, shape, strict=True))
    return [steps.get(axis, 1) for axis in range(len(whole))]


def _split(whole, shape, axes):
    """The two axes in order, and the shape that splits each into blocks and their positions."""
    a, b = sorted(axes)
    step = _steps(whole, shape, axes)
    split = [
        (-(-size // step[i]), step[i]) if i in (a, b) else (size,) for i, size in enumerate(whole)
    ]
    return a, b, tuple(part for parts in split for part in parts)
