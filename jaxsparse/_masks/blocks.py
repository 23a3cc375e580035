"""Whole blocks of weights: what each scores, and how their mask becomes one of the weights."""

import jax.numpy as jnp
from jax import lax

from jaxsparse._masks.ranking import once, order_keys, wide

__all__ = ["block_keys", "expand_blocks"]


def block_keys(
    values,
    keys_of,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    score: str,
    *,
    magnitude: bool = False,
):
    """Integers that rank the blocks of `values`, in an array that has blocks where values has
    weights.
    """
    if score == "max":
        return _reduce(keys_of(values), shape, axes, jnp.max)
    values = wide(values)
    if score == "l2":
        # the root keeps the order
        return order_keys(_reduce(values * values, shape, axes, jnp.sum))
    total = _reduce(jnp.abs(values) if magnitude else values, shape, axes, jnp.sum)
    return order_keys(total / _reduce(jnp.ones_like(values), shape, axes, jnp.sum))


def expand_blocks(mask, shape: tuple[int, ...], axes: tuple[int, ...], whole: tuple[int, ...]):
    """The mask of an array of shape `whole` from that of its blocks."""
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
    # one axis after the other: XLA:CPU does not vectorise the reduction of both
    return reduction(lax.optimization_barrier(reduction(values.reshape(split), a + 1)), b + 1)


def _steps(whole, shape, axes):
    steps = dict(zip(axes, shape, strict=True))
    return [steps.get(axis, 1) for axis in range(len(whole))]


def _split(whole, shape, axes):
    """The two axes in order, and the shape in which each of them is split into blocks and the
    places in a block.
    """
    a, b = sorted(axes)
    step = _steps(whole, shape, axes)
    split = [
        (-(-size // step[i]), step[i]) if i in (a, b) else (size,) for i, size in enumerate(whole)
    ]
    return a, b, tuple(part for parts in split for part in parts)
