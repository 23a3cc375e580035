"""Every mask in plain Python loops; shares no code with the library."""

import itertools
import math

import numpy as np


def sort_key(score):
    """Orders scores as the masks do: NaN above infinity, -0 equal to 0."""
    value = score.item()
    return (1, 0) if math.isnan(value) else (0, value)


def best_places(scores, n):
    """The indices of the `n` highest scores; among equal ones the lower index."""
    places = []
    for _ in range(n):
        best = None
        for place, score in enumerate(scores):
            if place not in places and (best is None or sort_key(score) > sort_key(scores[best])):
                best = place
        places.append(best)
    return places


def nm_mask(scores, n, m, axis):
    """True for the `n` highest of every `m` neighbours along `axis`."""
    scores = np.asarray(scores)
    # float32 holds all values of bfloat16 and the 8-bit floats
    if scores.dtype.kind not in "iuf":
        scores = scores.astype(np.float32)
    rows = np.moveaxis(scores, axis, -1)
    mask = np.zeros(rows.shape, bool)
    for row in itertools.product(*map(range, rows.shape[:-1])):
        for begin in range(0, rows.shape[-1], m):
            for place in best_places(rows[row][begin : begin + m], n):
                mask[(*row, begin + place)] = True
    return np.moveaxis(mask, -1, axis)


def topk_mask(scores, k):
    """True for the `k` highest; among equal ones the lower flat index."""
    flat = list(np.asarray(scores).ravel())
    # stable, so ties keep their order
    order = sorted(range(len(flat)), key=lambda i: sort_key(flat[i]), reverse=True)
    mask = np.zeros(len(flat), bool)
    mask[order[:k]] = True
    return mask.reshape(np.shape(scores))


def half_up(x):
    """The nearest integer, rounded half up; at least 1."""
    return max(1, math.floor(x + 0.5))


def transposable_patterns(n):
    """Every 4x4 mask with n in each row and column, sorted by True at the first difference."""
    rows = list(itertools.combinations(range(4), n))
    for choice in itertools.product(rows, repeat=4):
        if all(sum(j in row for row in choice) == n for j in range(4)):
            yield [[j in row for j in range(4)] for row in choice]


def blocks_of_four(values, axes):
    """The 4x4 blocks along two axes, as nested lists."""
    a, b = sorted(axis % values.ndim for axis in axes)
    moved = np.moveaxis(values, (a, b), (-2, -1))
    for lead in itertools.product(*map(range, moved.shape[:-2])):
        for i, j in itertools.product(range(0, moved.shape[-2], 4), range(0, moved.shape[-1], 4)):
            yield [[moved[(*lead, i + p, j + q)].item() for q in range(4)] for p in range(4)]


def kept(block, pattern):
    """The number of NaN and of inf that a pattern keeps of a block, and the sum of the rest."""
    values = [block[p][q] for p in range(4) for q in range(4) if pattern[p][q]]
    return (
        sum(map(math.isnan, values)),
        values.count(math.inf),
        sum(x for x in values if math.isfinite(x)),
    )


def best_transposable(block, n):
    """The pattern that keeps the most; the first among equal ones."""
    return max(transposable_patterns(n), key=lambda pattern: kept(block, pattern))


def block_mask(scores, shape, density, axes, score):
    """True for the highest blocks; the last ones may be smaller."""
    scores = np.asarray(scores)
    size = dict(zip((axis % scores.ndim for axis in axes), shape, strict=True))
    starts = [range(0, length, size.get(axis, 1)) for axis, length in enumerate(scores.shape)]
    blocks = [
        tuple(slice(i, i + size.get(axis, 1)) for axis, i in enumerate(start))
        for start in itertools.product(*starts)
    ]
    worth = []
    for block in blocks:
        inside = scores[block].ravel().tolist()
        if any(math.isnan(x) for x in inside):
            worth.append(math.nan)
        elif score == "max":
            worth.append(max(inside))
        else:
            worth.append(
                sum(inside) / len(inside) if score == "mean" else sum(x * x for x in inside)
            )
    mask = np.zeros(scores.shape, bool)
    for block, stays in zip(
        blocks, topk_mask(np.array(worth), half_up(density * len(blocks))), strict=True
    ):
        mask[block] = stays
    return mask
