"""The mask of exactly the k highest keys of one array or of several together, equal keys by the
lower flat index.

A threshold is searched for: each pass over the arrays counts the keys above eight candidates. A
sample gives the first candidates and the counts the next; whatever they are worth, the quarters of
the interval are among them.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse._masks.ranking import wide_keys

__all__ = ["how_many", "top_masks"]

_SAMPLE = 4096


class _Interval(NamedTuple):
    """Where the k-th highest key is: unsigned `low` and `high`, both included, and how many keys
    are `>= low` and `> high`.
    """

    low: object
    high: object
    from_low: object
    above_high: object


def how_many(density, size: int):
    """`density * size`, rounded half up, at least 1: an int for a float, else an int32 scalar."""
    if isinstance(density, float):
        return min(max(math.floor(density * size + 0.5), 1), size)
    return jnp.clip(
        jnp.floor(jnp.asarray(density, jnp.float32) * size + 0.5).astype(jnp.int32),
        min(1, size),
        size,
    )


def top_masks(arrays, keys_of, k):
    """The masks of `arrays`, of several none empty, ranked by the integers `keys_of(array)`; `k` is
    an int or a traced one.
    """
    size = sum(a.size for a in arrays)
    if size > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"{size:,} weights are ranked together, more than an int32 counts. Rank them in parts."
        )
    if not size:
        return [jnp.ones(a.shape, bool) for a in arrays]
    views = [jnp.asarray(a).reshape(-1, a.shape[-1] if a.ndim else 1) for a in arrays]

    def keys(array):
        return wide_keys(keys_of(array))

    def narrow(interval, candidates):
        candidates = jnp.clip(candidates, interval.low + 1, interval.high)
        counts = sum(_count(keys(view), [_signed(c) for c in candidates]) for view in views)
        enough = counts >= k
        return _Interval(
            jnp.max(jnp.where(enough, candidates, interval.low)),
            jnp.min(jnp.where(enough, interval.high, candidates - 1)),
            jnp.min(jnp.where(enough, counts, interval.from_low)),
            jnp.max(jnp.where(enough, interval.above_high, counts)),
        )

    stride = size // _SAMPLE | 1  # odd, so that it does not run down a column
    sample = _unsigned(jnp.sort(jnp.concatenate([keys(a.reshape(-1)[::stride]) for a in arrays])))
    ends = jnp.iinfo(sample.dtype)
    interval = _Interval(
        jnp.array(ends.min, sample.dtype),
        jnp.array(ends.max, sample.dtype),
        jnp.int32(size),
        jnp.int32(0),
    )
    interval = narrow(interval, _from_sample(sample, k, size))
    interval = lax.while_loop(
        lambda interval: (interval.from_low != k) & (interval.low < interval.high),
        lambda i: narrow(i, _between(i, k)),
        interval,
    )
    lowest = _signed(interval.low)

    def last_places():
        """The place of the last key equal to the lowest that stays, in each array."""
        room, places = k - interval.above_high, []
        for view in views:
            equal_in_row = (keys(view) == lowest).sum(1, dtype=jnp.int32)
            ends = jnp.cumsum(equal_in_row)
            here = jnp.clip(room, 0, ends[-1])
            row = jnp.searchsorted(ends, here)
            in_row = jnp.cumsum(keys(view[row]) == lowest, dtype=jnp.int32)
            column = jnp.searchsorted(in_row, here - ends[row] + equal_in_row[row])
            places.append(jnp.where(here > 0, row * view.shape[1] + column, -1).astype(jnp.int32))
            room -= here
        return places

    every = [jnp.full_like(interval.from_low, size)] * len(views)
    lasts = lax.cond(interval.from_low == k, lambda: every, last_places)
    return [
        _mask(keys(view), lowest, last).reshape(a.shape)
        for a, view, last in zip(arrays, views, lasts, strict=True)
    ]


def _mask(keys, lowest, last):
    place = lax.broadcasted_iota(jnp.int32, keys.shape, 0) * keys.shape[1] + lax.broadcasted_iota(
        jnp.int32, keys.shape, 1
    )
    return (keys > lowest) | ((keys == lowest) & (place <= last))


def _unsigned(keys):
    unsigned = jnp.dtype(f"uint{8 * keys.dtype.itemsize}")
    return lax.bitcast_convert_type(keys, unsigned) ^ jnp.array(
        1 << (8 * keys.dtype.itemsize - 1), unsigned
    )


def _signed(keys):
    bits = 8 * keys.dtype.itemsize
    return lax.bitcast_convert_type(
        keys ^ jnp.array(1 << (bits - 1), keys.dtype), jnp.dtype(f"int{bits}")
    )


def _count(keys, candidates):
    """How many keys are at least each of the candidates; one pass."""
    reached = [(keys >= c).astype(jnp.int32) for c in candidates]
    add = lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)]  # noqa: E731
    return jnp.stack(lax.reduce(reached, [jnp.int32(0)] * len(reached), add, (0, 1)))


def _from_sample(sample, k, size):
    """Candidates around the place in the ascending sample where the k-th highest of all is
    expected, in standard deviations.
    """
    count = sample.shape[0]
    share = jnp.asarray(k, jnp.float32) / size
    deviations = jnp.array([-4.0, -2.0, -1.0, -0.3, 0.3, 1.0, 2.0, 4.0])
    place = count * (1 - share) + deviations * jnp.sqrt(count * share * (1 - share))
    return sample[jnp.clip(place, 0, count - 1).astype(jnp.int32)]


def _between(interval, k):
    """Candidates around the place where the k-th highest is expected if keys are spread evenly, and
    the quarters.
    """
    width = (interval.high - interval.low).astype(jnp.float32)
    inside = (interval.from_low - interval.above_high).astype(jnp.float32)
    expected = width * (interval.from_low - k).astype(jnp.float32) / inside
    offsets = expected + jnp.array([-4.0, -1.0, 0.0, 1.0, 4.0]) * width / jnp.sqrt(inside)
    offsets = jnp.concatenate([jnp.clip(offsets, 1, width), width * jnp.array([0.25, 0.5, 0.75])])
    return interval.low + offsets.astype(interval.low.dtype)
