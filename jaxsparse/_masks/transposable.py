"""The mask that keeps n of every 4 along two axes at once, and of all such masks the one that keeps
most.
"""

import itertools

import jax.numpy as jnp
from jax import lax

from jaxsparse._masks.ranking import once, wide

__all__ = ["transposable_mask"]

# 12 of each stay below the next one, so that a kept NaN outweighs any inf, an inf all else, and no
# sum overflows
_FINITE, _INF, _NAN = 2.0**116, 2.0**120, 2.0**124


def transposable_mask(scores, n: int, axes: tuple[int, ...]):
    """The mask of `scores`, whose sizes along `axes` are multiples of 4."""
    a, b = sorted(axes)
    shape = scores.shape
    blocks = scores.reshape(
        *shape[:a], shape[a] // 4, 4, *shape[a + 1 : b], shape[b] // 4, 4, *shape[b + 1 :]
    )

    def member(i, j):
        x = lax.index_in_dim(
            lax.index_in_dim(blocks, j, b + 2, keepdims=False), i, a + 1, keepdims=False
        )
        x = wide(x)
        return jnp.where(x <= _FINITE, x, jnp.where(x == x, _INF, _NAN))

    def spread(words):
        place = 4 * lax.broadcasted_iota(jnp.uint16, blocks.shape, a + 1) + lax.broadcasted_iota(
            jnp.uint16, blocks.shape, b + 2
        )
        return jnp.expand_dims(words, (a + 1, b + 2)) >> (15 - place) & 1 == 1

    return once(
        _best_words([[member(i, j) for j in range(4)] for i in range(4)], n), spread
    ).reshape(shape)


def _best_words(members, n):
    """The best mask of each block as 16 bits, its first place the highest; of equal ones the
    highest word.

    The columns that the upper two rows fill leave to the lower two what fills the rest: few cases
    (19 for 2:4), in each of which the two halves are chosen apart.
    """
    rows = list(itertools.combinations(range(4), n))
    sums = [{row: sum((x[j] for j in row[1:]), x[row[0]]) for row in rows} for x in members]
    upper, lower = _best_halves(*sums[:2]), _best_halves(*sums[2:])
    cases = []
    for filled, (total, word) in upper.items():
        rest = lower.get(tuple(n - count for count in filled))
        if rest is not None:
            cases.append((total + rest[0], word << 8 | rest[1]))
    while len(cases) > 1:  # pair by pair, which waits less than one after the other
        odd = cases[len(cases) - len(cases) % 2 :]
        cases = [*map(_better, cases[::2], cases[1::2]), *odd]
    return cases[0][1].astype(jnp.uint16)


def _better(one, other):
    (total, word), (new_total, new_word) = one, other
    wins = (new_total > total) | ((new_total == total) & (new_word > word))
    return jnp.where(wins, new_total, total), jnp.where(wins, new_word, word)


def _best_halves(first, second):
    """For each way in which two rows fill the columns, the largest sum and its word; of equal ones
    the highest.
    """
    best: dict[tuple[int, ...], tuple] = {}
    for row, other in itertools.product(first, second):
        filled = tuple((j in row) + (j in other) for j in range(4))
        total, word = first[row] + second[other], jnp.int32(_bits(row) << 4 | _bits(other))
        if filled in best:
            better = total > best[filled][0]
            total, word = (
                jnp.where(better, total, best[filled][0]),
                jnp.where(better, word, best[filled][1]),
            )
        best[filled] = total, word
    return best


def _bits(row):
    return sum(8 >> j for j in row)
