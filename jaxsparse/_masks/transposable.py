"""Transposable masks: n of every 4 along two axes at once, with the largest possible sum."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Real

from jaxsparse import _checks
from jaxsparse._checks import AnArray
from jaxsparse._masks.ranking import once, wide

__all__ = ["check_supported", "transposable_mask", "transposable_nm_mask"]

# 12 times each is below the next, so that a kept NaN outweighs any inf and a kept inf all finite
# scores, and sums do not overflow
_FINITE, _INF, _NAN = 2.0**116, 2.0**120, 2.0**124


def transposable_nm_mask(
    scores: Real[ArrayLike, "*shape"],
    n: SupportsIndex,
    m: SupportsIndex,
    *,
    axes: Sequence[SupportsIndex],
) -> Bool[Array, "*shape"]:
    """Marks `n` of every `m` scores along both of two axes, with the largest possible sum.

    Blocks of `m` by `m` neighbours are independent; each keeps exactly `n` in every row and column.
    Among masks with equal sums, the one that keeps the lower flat index at the first difference
    wins. Without such ties, the mask of the transpose is the transposed mask. Sums are taken in
    float32. NaN outweighs everything else, then inf. Not differentiable: gradients stop here.

    Args:
      scores: real array of two or more axes, of a floating or integer dtype; the importance of each
        weight. Magnitude pruning passes `jnp.abs(w)`.
      n: how many of each group stay, 1, 2 or 3.
      m: the group length, 4.
      axes: the two axes along which groups run.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: `scores` are complex or boolean, or `n`, `m` or an axis is not an integer.
      ValueError: `n:m` is not supported, `axes` are not two axes of `scores`, or a size is not a
        multiple of `m`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> scores = jnp.array([[9, 8, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
      >>> js.transposable_nm_mask(scores, 1, 4, axes=(0, 1)).astype(int)
      Array([[0, 1, 0, 0],
             [1, 0, 0, 0],
             [0, 0, 1, 0],
             [0, 0, 0, 1]], dtype=int32)

    References:
      Advances in Sparse Neural Model Training, section 2, 2:4 along both axes; Hubara et al.,
      Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
      Masks (arXiv:2102.08124).
    """
    scores = _checks.array(scores, "transposable_nm_mask: `scores`")
    if not _checks.rankable(scores.dtype):
        raise TypeError(
            f"transposable_nm_mask: `scores` are {scores.dtype}, which cannot be ranked. Pass real "
            "scores, as in jnp.abs(w)."
        )
    n, m = check_supported("transposable_nm_mask", n, m)
    axes = _checks.two_axes(axes, "transposable_nm_mask: `axes`")
    reason = _checks.misfit(axes, (m, m), scores.shape, scores.dtype)
    if reason:
        raise ValueError(
            f"transposable_nm_mask: {reason} (`scores` of shape {scores.shape}). Choose other "
            "axes, pad it, or leave this leaf dense."
        )
    return transposable_mask(scores, n, tuple(axis % scores.ndim for axis in axes))


def check_supported(call: str, n: Any, m: Any) -> tuple[int, int]:
    """Returns `n` and `m` as ints; raises if there is no transposable pattern for them."""
    n, m = _checks.integer(n, f"{call}: `n`"), _checks.integer(m, f"{call}: `m`")
    if m != 4 or n not in (1, 2, 3):
        raise ValueError(
            f"{call}: {n}:{m} is not supported along two axes. Pass 1:4, 2:4 or 3:4, or use NM "
            "along one axis."
        )
    return n, m


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames=("magnitude",))
def transposable_mask(
    scores: Real[AnArray, "*shape"], n: int, axes: tuple[int, ...], *, magnitude: bool = False
) -> Bool[Array, "*shape"]:
    """The mask of `scores`, or of their magnitudes; sizes along `axes` are multiples of 4."""
    scores = lax.stop_gradient(scores)
    if magnitude:
        scores = jnp.abs(wide(scores))
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
    """The best mask of each block as 16 bits, its first position the highest.

    Of equal masks the highest word wins. How the upper two rows fill the columns determines how the
    lower two must fill the rest. These are few cases (19 for 2:4), and in each the two halves are
    chosen independently.
    """
    rows = list(itertools.combinations(range(4), n))
    sums = [{row: sum((x[j] for j in row[1:]), x[row[0]]) for row in rows} for x in members]
    upper, lower = _best_halves(*sums[:2]), _best_halves(*sums[2:])
    cases = []
    for filled, (total, word) in upper.items():
        rest = lower.get(tuple(n - count for count in filled))
        if rest is not None:
            cases.append((total + rest[0], word << 8 | rest[1]))
    while len(cases) > 1:  # pairwise, a shorter chain of dependencies than one after the other
        odd = cases[len(cases) - len(cases) % 2 :]
        cases = [*map(_better, cases[::2], cases[1::2]), *odd]
    return cases[0][1].astype(jnp.uint16)


def _better(one, other):
    (total, word), (new_total, new_word) = one, other
    wins = (new_total > total) | ((new_total == total) & (new_word > word))
    return jnp.where(wins, new_total, total), jnp.where(wins, new_word, word)


def _best_halves(first, second):
    """For each way in which two rows fill the columns, the largest sum and its word.

    Of equal sums the highest word wins.
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
