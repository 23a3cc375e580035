"""What an N:M mask is, in plain Python loops; shares no code with the library."""

import itertools
import math

import numpy as np


def sort_key(score):
    """Orders scores as the masks do: NaN above infinity, -0 equal to 0."""
    value = score.item()
    return (1, 0) if math.isnan(value) else (0, value)


def best_places(scores, n):
    """The places of the `n` highest scores; of equal ones the lower place."""
    taken = []
    for _ in range(n):
        best = None
        for place, score in enumerate(scores):
            if place not in taken and (best is None or sort_key(score) > sort_key(scores[best])):
                best = place
        taken.append(best)
    return taken


def nm_mask(scores, n, m, axis):
    """True for the `n` highest of every `m` neighbours along `axis`."""
    scores = np.asarray(scores)
    if scores.dtype.kind not in "iuf":  # bfloat16 and the 8-bit floats: every value of theirs is one of float32
        scores = scores.astype(np.float32)
    rows = np.moveaxis(scores, axis, -1)
    mask = np.zeros(rows.shape, bool)
    for row in itertools.product(*map(range, rows.shape[:-1])):
        for begin in range(0, rows.shape[-1], m):
            for place in best_places(rows[row][begin : begin + m], n):
                mask[(*row, begin + place)] = True
    return np.moveaxis(mask, -1, axis)
