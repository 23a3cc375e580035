"""The N:M mask of groups along an axis of their own: several algorithms, and which to use.

All compute the same mask, the n highest keys of each group with the lower index among equal ones,
at different speeds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._masks.ranking import once, wide_keys

__all__ = ["algorithm", "mask_groups"]


def algorithm(n: Any, m: int, key_bits: int) -> Any:
    """The fastest algorithm for n of m, as measured on XLA:CPU by benchmarks/masks.py.

    On GPU and TPU each of them is ordinary XLA.
    """
    few = isinstance(n, int) and n <= 2
    if few and key_bits <= 16 and m <= 1 << 15 and m > (4 if n == 1 else 8):
        return _merge
    if m <= 8 or (m <= 16 and not (few and n == 1)):
        return _compare_all
    # XLA:CPU takes minutes and gigabytes to compile _insert for m = 256
    if few and (n == 1 or m <= 64):
        return _best if n == 1 else _insert
    return _bisect


def mask_groups(groups: Any, keys_of: Any, n: Any, m: int, axis: int) -> Any:
    """The mask of `groups`, whose `axis` has size m, ranked by the integers `keys_of(groups)`."""
    return algorithm(n, m, jnp.iinfo(jax.eval_shape(keys_of, groups).dtype).bits)(
        groups, keys_of, n, m, axis
    )


def _compare_all(groups, keys_of, n, m, axis):
    """Compares every pair in a group; packs each group's mask into a word and spreads its bits."""
    members = _members(keys_of, groups, m, axis)
    dtype = jnp.int16 if jnp.iinfo(members[0].dtype).bits < 16 else members[0].dtype
    # how many rank higher, minus n: a member stays if this is negative
    above = [jnp.full(members[0].shape, i - jnp.clip(n, 0, m), dtype) for i in range(m)]
    for j in range(m):
        for i in range(j):
            higher_wins = (members[j] > members[i]).astype(dtype)
            above[i] += higher_wins
            above[j] -= higher_wins
    sign = jnp.iinfo(dtype).bits - 1
    words = functools.reduce(
        jnp.bitwise_or, (a >> sign & jnp.asarray(1 << i).astype(dtype) for i, a in enumerate(above))
    )
    words = words.astype(jnp.uint8 if m <= 8 else jnp.uint16)

    def spread(words):
        place = lax.broadcasted_iota(words.dtype, groups.shape, axis)
        return jnp.expand_dims(words, axis) >> place & 1 == 1

    return once(words, spread) if m <= 8 else spread(once(words))  # the faster, as measured


def _runs(m):
    """The length of the runs into which long groups are split for a two-level search."""
    return next((r for r in (16, 8, 4) if m % r == 0 and m >= 4 * r), m) if m > 16 else m


def _merge(groups, keys_of, n, m, axis):
    """Finds the n highest keys by merging sorted lists; the low bits of a key hold its index."""
    contiguous = axis == groups.ndim - 1
    # the fastest run length, as measured
    run, bits = (32 if n == 1 and contiguous and m % 32 == 0 else _runs(m), (m - 1).bit_length())
    last = (1 << bits) - 1
    lowest = jnp.int32(jnp.iinfo(jnp.int32).min)

    def merge(a, b):
        if n == 1:
            return (jnp.maximum(a[0], b[0]),)
        return jnp.maximum(a[0], b[0]), jnp.maximum(
            jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])
        )

    def best(lists, axis):
        return lax.reduce(lists, (lowest,) * n, merge, (axis,))

    place = lax.broadcasted_iota(jnp.int32, groups.shape, axis)
    keys = keys_of(groups).astype(jnp.int32) << bits | (last - place)
    split = (*groups.shape[:axis], m // run, run, *groups.shape[axis + 1 :])
    best_keys = best((keys.reshape(split), *(jnp.full(split, lowest),) * (n - 1)), axis + 1)
    if run < m:
        best_keys = [jnp.expand_dims(x, axis) for x in best(tuple(map(once, best_keys)), axis)]
    word = jnp.uint8 if n * bits <= 8 else jnp.uint16 if n * bits <= 16 else jnp.uint32
    words = functools.reduce(
        jnp.bitwise_or, ((last - (x & last)) << i * bits for i, x in enumerate(best_keys))
    )
    words = once(words.astype(word))
    place = lax.broadcasted_iota(word, groups.shape, axis)
    return functools.reduce(jnp.logical_or, ((words >> i * bits & last) == place for i in range(n)))


def _best(groups, keys_of, n, m, axis):
    """Finds the index of the highest key; in long groups, among the highest keys of short runs."""
    run = _runs(m)
    place = lax.broadcasted_iota(jnp.int32, groups.shape, axis)
    if run < m:
        split = (*groups.shape[:axis], m // run, run, *groups.shape[axis + 1 :])
        best = _first_highest(
            (wide_keys(keys_of(groups.reshape(split))), place.reshape(split)), axis + 1
        )
        best = _first_highest(lax.optimization_barrier(best), axis)
    else:
        best = _first_highest((wide_keys(keys_of(groups)), place), axis)
    best = once(jnp.expand_dims(best[1].astype(jnp.uint8 if m <= 1 << 8 else jnp.int32), axis))
    return lax.broadcasted_iota(best.dtype, groups.shape, axis) == best


def _first_highest(keys_and_places, axis):
    def better(a, b):
        (key_a, place_a), (key_b, place_b) = a, b
        first = (key_a > key_b) | ((key_a == key_b) & (place_a < place_b))
        return jnp.where(first, key_a, key_b), jnp.where(first, place_a, place_b)

    dtype = keys_and_places[0].dtype
    worst = jnp.array(jnp.iinfo(dtype).min, dtype), jnp.int32(jnp.iinfo(jnp.int32).max)
    return lax.reduce(keys_and_places, worst, better, (axis,))


def _insert(groups, keys_of, n, m, axis):
    """Keeps the n best members so far in order, in one pass over the members."""

    members = _members(keys_of, groups, m, axis)
    keys, places = members[:1], [jnp.zeros(members[0].shape, jnp.int32)]
    for i, key in enumerate(members[1:], 1):
        place, wins = jnp.full(key.shape, i, jnp.int32), False
        for j in range(min(n, len(keys))):
            wins |= key > keys[j]  # once it wins, the members below move down by one
            keys[j], key = jnp.where(wins, key, keys[j]), jnp.where(wins, keys[j], key)
            places[j], place = jnp.where(wins, place, places[j]), jnp.where(wins, places[j], place)
        if len(keys) < n:
            keys.append(key)
            places.append(place)

    def mark(best):
        place = lax.broadcasted_iota(jnp.uint8, groups.shape, axis)
        return functools.reduce(
            jnp.logical_or, (place == jnp.expand_dims(best[i], axis) for i in range(n))
        )

    return mark(once(jnp.stack(places).astype(jnp.uint8)))


def _bisect(groups, keys_of, n, m, axis):
    """Finds the n-th highest key of each group bit by bit, then how many of its equals stay."""
    keys = keys_of(groups)
    lowest, bits = jnp.iinfo(keys.dtype).min, jnp.iinfo(keys.dtype).bits
    keys = wide_keys(keys)

    def count(members):
        return members.sum(axis, dtype=jnp.int32, keepdims=True)

    def raise_key(i, key):
        higher = key + (jnp.ones((), keys.dtype) << (bits - 1 - i))
        return jnp.where(count(keys >= higher) >= n, higher, key)

    start = jnp.full_like(lax.slice_in_dim(keys, 0, 1, axis=axis), lowest)
    key = lax.fori_loop(0, bits, raise_key, start)
    equal, place = keys == key, lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    room = n - count(keys > key)

    def raise_place(i, last):
        later = last + (1 << (m.bit_length() - 1 - i))
        return jnp.where(count(equal & (place < later)) < room, later, last)

    last = lax.fori_loop(0, m.bit_length(), raise_place, jnp.zeros_like(room))
    return (keys > key) | (equal & (place <= last) & (room > 0))


def _members(keys_of, groups, m, axis):
    return [keys_of(lax.index_in_dim(groups, i, axis, keepdims=False)) for i in range(m)]
