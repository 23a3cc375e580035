"""The mask of exactly the k highest keys of one array, or of several ranked together.

Among equal keys the lower flat index stays. The threshold is found by search: each pass over the
arrays counts the keys above eight candidates. The first candidates come from a sample, later ones
from the counts. The quarters of the interval are always among them, so the search converges however
poor the other candidates are.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsparse import _checks
from jaxsparse._masks.ranking import common_dtype, magnitude_keys, order_keys, wide, wide_keys

__all__ = ["checked_density", "of_one_dtype", "ranked_masks", "topk_mask"]

_SAMPLE = 4096


def topk_mask(
    scores: Real[ArrayLike, "*shape"], density: Float[ArrayLike, ""] | int
) -> Bool[Array, "*shape"]:
    """Marks the highest scores of the whole array, exactly `density * size` of them.

    The number is rounded half up and at least 1. Equal scores keep the lower flat index. NaN ranks
    highest. Not differentiable: gradients stop here.

    Args:
      scores: real array of any shape and of a floating or integer dtype; the importance of each
        weight. Only the order matters. Magnitude pruning passes `jnp.abs(w)`.
      density: the fraction that stays, a float in (0, 1], or a traced scalar so that a schedule
        does not recompile; its product with the size is then a float32.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: `scores` are complex or boolean, or `density` is not a number.
      ValueError: `density` is not in (0, 1], or there are more scores than an int32 can count.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.topk_mask(jnp.array([3.0, 1.0, 2.0, 2.0]), 0.5)
      Array([ True, False,  True, False], dtype=bool)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, top-d.
    """
    scores = _checks.array(scores, "topk_mask: `scores`")
    if not _checks.rankable(scores.dtype):
        raise TypeError(
            f"topk_mask: `scores` are {scores.dtype}, which cannot be ranked. Pass real scores, as "
            "in jnp.abs(w)."
        )
    return ranked_masks([scores], checked_density("topk_mask", density))[0]


def checked_density(call: str, value: Any) -> Any:
    """Returns a density as a float; a traced scalar passes through."""
    if not isinstance(value, jax.core.Tracer):
        return _checks.density(call, value)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{call}: `density` must be a floating scalar, not {value.dtype}{list(value.shape)}."
        )
    return value


def ranked_masks(
    arrays: Any, density: Any, *, magnitude: bool = False, stack: tuple[int, ...] = ()
) -> Any:
    """The masks, of the given density, of arrays ranked together by their values or magnitudes.

    All arrays have the axes `stack`; along these, each position is ranked separately.
    """
    arrays = [lax.stop_gradient(array) for array in of_one_dtype(arrays)]
    positions = math.prod(arrays[0].shape[axis] for axis in stack)
    size = sum(a.size for a in arrays) // max(positions, 1)
    if size > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"{size:,} weights are ranked together, more than an int32 can count. Rank them in "
            "parts."
        )
    return _ranked_masks(arrays, jnp.int32(_how_many(density, size)), magnitude, stack)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _ranked_masks(arrays, k, magnitude, stack):
    top = functools.partial(_top_masks, magnitude_keys if magnitude else order_keys, k)
    for axis in reversed(stack):
        top = jax.vmap(top, axis, axis)
    return top(*arrays)


def of_one_dtype(arrays: Any) -> list:
    """Converts arrays to one dtype that holds all of their values, to rank them together."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return arrays
    # jax does not promote 8-bit floats to other types implicitly
    holding = (wide(a).dtype if a.dtype.itemsize == 1 else a.dtype for a in arrays)
    dtype = functools.reduce(common_dtype, holding)
    return [array.astype(dtype) for array in arrays]


class _Interval(NamedTuple):
    """The interval that contains the k-th highest key.

    It runs from unsigned `low` to `high`, both included; `from_low` keys are `>= low` and
    `above_high` are `> high`.
    """

    low: object
    high: object
    from_low: object
    above_high: object


def _how_many(density: Any, size: int) -> Any:
    """`density * size`, rounded half up, at least 1: an int for a float, else an int32 scalar."""
    if isinstance(density, float):
        return min(max(math.floor(density * size + 0.5), 1), size)
    return jnp.clip(
        jnp.floor(jnp.asarray(density, jnp.float32) * size + 0.5).astype(jnp.int32),
        min(1, size),
        size,
    )


def _top_masks(keys_of, k, *arrays):
    """The masks of the `k` highest of the integers `keys_of(array)`.

    If there are several arrays, each has at least one element.
    """
    size = sum(a.size for a in arrays)
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
        """The index, in each array, of the last key that stays among those equal to `lowest`."""
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
    """Counts, in one pass, the keys that are at least each of the candidates."""
    reached = [(keys >= c).astype(jnp.int32) for c in candidates]

    def add(xs, ys):
        return [x + y for x, y in zip(xs, ys, strict=True)]

    return jnp.stack(lax.reduce(reached, [jnp.int32(0)] * len(reached), add, (0, 1)))


def _from_sample(sample, k, size):
    """Candidates around the expected position of the k-th highest key in the ascending sample.

    They are spaced in standard deviations.
    """
    count = sample.shape[0]
    share = jnp.asarray(k, jnp.float32) / size
    deviations = jnp.array([-4.0, -2.0, -1.0, -0.3, 0.3, 1.0, 2.0, 4.0], jnp.float32)
    place = count * (1 - share) + deviations * jnp.sqrt(count * share * (1 - share))
    return sample[jnp.clip(place, 0, count - 1).astype(jnp.int32)]


def _between(interval, k):
    """Candidates around the expected k-th highest key, and the quarters of the interval.

    The expectation assumes that keys are spread evenly.
    """
    width = (interval.high - interval.low).astype(jnp.float32)
    inside = (interval.from_low - interval.above_high).astype(jnp.float32)
    expected = width * (interval.from_low - k).astype(jnp.float32) / inside
    offsets = expected + jnp.array([-4.0, -1.0, 0.0, 1.0, 4.0], jnp.float32) * width / jnp.sqrt(
        inside
    )
    offsets = jnp.concatenate(
        [jnp.clip(offsets, 1, width), width * jnp.array([0.25, 0.5, 0.75], jnp.float32)]
    )
    return interval.low + offsets.astype(interval.low.dtype)
