"""Orders of columns under which N:M keeps more."""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _checks

__all__ = ["ColumnOrder", "column_order"]


class ColumnOrder(NamedTuple):
    """An order of columns and what N:M keeps under it.

    Attributes:
      order: int `[K]`; the column at place i of the new order was at place `order[i]`.
      kept: the sum of the scores that N:M keeps in this order.
      before: the same in the given order.
      unstructured: the sum of as many scores, the largest of each row: no order keeps more.
    """

    order: np.ndarray
    kept: float
    before: float
    unstructured: float


def column_order(
    scores: _checks.AnArray,
    n: int,
    m: int,
    *,
    rounds: int = 100,
    seconds: float = math.inf,
    seed: int = 0,
    progress: Callable[[float], Any] = lambda kept: None,
) -> ColumnOrder:
    """Searches for an order of the columns of a weight under which n:m keeps the highest scores.

    A product does not change if the columns of its weight and its inputs are reordered alike, and
    the inputs cost nothing to reorder if the layer that makes them has its rows reordered.

    Up to 3 groups of 4 columns, all partitions into groups are tried (35 of 8 columns, 5775 of 12).
    Beyond, the groups are paired at random in each round, and each pair becomes the best of all its
    partitions for `m <= 4`, and of all swaps of two columns for longer groups. Where a round gains
    nothing, columns are swapped at random to go on from there. The best order is returned, which is
    never worse than the given one.

    Args:
      scores: `[M, K]`, such as the magnitudes of a weight; groups run along K.
      n: how many of each group are kept.
      m: the length of a group; K is a multiple of it.
      rounds: the number of rounds.
      seconds: the time after which no further round starts.
      seed: of the random pairs.
      progress: called with the sum that is kept, after each round.

    Returns:
      A `ColumnOrder`.

    Raises:
      TypeError: `n`, `m`, `rounds` or `seed` is not an integer.
      ValueError: `scores` is not a matrix, is not finite or negative, K is not a multiple of m, or
        `n` is not in `1..m`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> w = jnp.array([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]])
      >>> found = js.column_order(w, 2, 4)
      >>> found.before, found.kept
      (19.0, 30.0)
      >>> w[:, found.order]
      Array([[9., 8., 1., 1., 7., 6., 1., 1.]], dtype=float32)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.1, figure 6
      (arXiv:2104.08378).
    """
    n, m = _checks.counts("column_order", n, m)
    matrix = np.asarray(scores, np.float32)
    if matrix.ndim != 2 or matrix.shape[1] % m or not matrix.size:
        raise ValueError(
            f"column_order: `scores` have shape {matrix.shape}. Pass [M, K] with K a multiple of "
            f"{m}."
        )
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        raise ValueError(
            "column_order: `scores` must be finite and not negative. Pass the magnitudes of the "
            "weight."
        )
    rounds = _checks.integer(rounds, "column_order: `rounds`")
    random = np.random.default_rng(_checks.integer(seed, "column_order: `seed`"))
    k = matrix.shape[1]
    columns, groups = jnp.asarray(matrix.T), k // m
    order = np.arange(k)
    before = _kept(columns, n, m)
    best, kept = order, before
    few = m == 4 and groups <= 3
    if groups == 1 or few:
        rounds = min(rounds, groups - 1, 1)
    end = time.monotonic() + seconds
    now = before
    for _ in range(rounds):
        if time.monotonic() > end:
            break
        if few:
            order = np.asarray(_best_partition(columns, n, groups))
        else:
            pairs = random.permutation(groups)[: groups // 2 * 2]
            order = np.asarray(_paired(columns, jnp.asarray(order), jnp.asarray(pairs), n, m))
        last, now = now, _kept(columns[order], n, m)
        if now > kept:
            best, kept = order, now
        elif now <= last:
            a, b = random.choice(k, 2, replace=False)
            order = order.copy()
            order[[a, b]] = order[[b, a]]
        progress(kept)
    top = np.sort(matrix, 1)[:, k - k // m * n :].sum(dtype=np.float64)
    return ColumnOrder(_sorted_groups(best, m), kept, before, float(top))


def _sorted_groups(order, m):
    """The same groups, each in ascending order, and by their first columns."""
    groups = np.sort(order.reshape(-1, m), 1)
    return groups[np.argsort(groups[:, 0])].reshape(-1)


def _top(columns, n):
    """The sum over rows of the n largest along the last axis but one: `[..., m, M]` to `[...]`."""
    m = columns.shape[-2]
    if n == m:
        return columns.sum((-2, -1))
    if (n, m) == (2, 4):
        a, b, c, d = (columns[..., i, :] for i in range(4))
        # of two sorted pairs: the larger maximum, and the second largest
        high, low = jnp.maximum(a, b), jnp.minimum(a, b)
        high2, low2 = jnp.maximum(c, d), jnp.minimum(c, d)
        second = jnp.maximum(jnp.minimum(high, high2), jnp.maximum(low, low2))
        return (jnp.maximum(high, high2) + second).sum(-1)
    return jnp.sort(columns, -2)[..., m - n :, :].sum((-2, -1))


def _kept(columns, n, m):
    """The sum that is kept, over groups in float64."""
    return float(np.asarray(_kept_by_group(columns, n, m)).sum(dtype=np.float64))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _kept_by_group(columns, n, m):
    return _top(columns.reshape(-1, m, columns.shape[1]), n)


def _halves(m):
    """All ways to split 2 m columns into two groups, or for long groups those a swap away."""
    if m > 4:
        ways = [list(range(2 * m))]
        for i, j in itertools.product(range(m), range(m, 2 * m)):
            way = list(range(2 * m))
            way[i], way[j] = j, i
            ways.append(way)
        return np.array(ways)
    rest = range(1, 2 * m)
    firsts = [(0, *some) for some in itertools.combinations(rest, m - 1)]
    return np.array([[*one, *(i for i in range(2 * m) if i not in one)] for one in firsts])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _paired(columns, order, pairs, n, m):
    """The order after each pair of groups has become the best of its partitions."""
    ways = jnp.asarray(_halves(m))
    groups = order.reshape(-1, m)
    places = groups[pairs].reshape(-1, 2 * m)

    def best(place):
        some = columns[place]
        sums = jax.vmap(lambda way: _top(some[way].reshape(2, m, -1), n).sum())(ways)
        return place[ways[sums.argmax()]]

    after = jax.lax.map(best, places).reshape(-1, m)
    return groups.at[pairs].set(after).reshape(-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _best_partition(columns, n, groups):
    """The best of all partitions of 8 or 12 columns into groups of 4."""
    k = 4 * groups
    subsets = list(itertools.combinations(range(k), 4))
    place = {one: i for i, one in enumerate(subsets)}
    partitions = list(_partitions(tuple(range(k))))
    sums = jax.lax.map(lambda some: _top(columns[some], n), jnp.array(subsets))
    which = jnp.array([[place[group] for group in one] for one in partitions])
    return jnp.array(partitions).reshape(-1, k)[sums[which].sum(1).argmax()]


def _partitions(columns):
    """All partitions of columns into groups of 4, the first column in the first group."""
    if not columns:
        yield ()
        return
    for some in itertools.combinations(columns[1:], 3):
        group = (columns[0], *some)
        for others in _partitions(tuple(i for i in columns if i not in group)):
            yield (group, *others)
