"""Finished runs to numbers: means, spreads, and paired tests over seeds."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.quality.runs import TUNING_SEED

UNITS = {
    "characters": ("bits", 1.0, "bits per character"),
    "transformer": ("error", 100.0, "% error"),
    "convolutions": ("error", 100.0, "% error"),
}


class Difference(NamedTuple):
    """How much worse one cell is than another: mean and deviation over the seeds that both have, their number, p of a paired t-test."""

    mean: float
    spread: float
    seeds: int
    p: float

    def __str__(self):
        return f"{self.mean:+.3f} ± {self.spread:.3f} ({p_text(self.p)})"


def p_text(p):
    return "p untested" if math.isnan(p) else f"p = {p:.2g}" if p >= 1e-4 else "p < 1e-4"


class Runs:
    """The finished runs of a scale: `runs(cell)` is the metric of its task for each seed, in seed order."""

    def __init__(self, found, scale):
        self.found, self.scale = found, scale

    def __call__(self, cell):
        key, factor, _ = UNITS[cell.task]
        return {seed: factor * self.found[cell, seed][key] for seed in self.scale.seeds if (cell, seed) in self.found}

    def records(self, cell):
        return [self.found[cell, seed] for seed in self.scale.seeds if (cell, seed) in self.found]

    def mean(self, cell):
        """Mean and standard deviation over seeds; NaN where there is none."""
        values = list(self(cell).values())
        return (float(np.mean(values)), deviation(values)) if values else (math.nan, math.nan)

    def difference(self, cell, reference):
        """`cell` minus `reference`, paired by seed; None where they share none."""
        ours, theirs = self(cell), self(reference)
        return difference([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])

    def tuning(self, cell):
        return self.found[cell, TUNING_SEED]["bits"] if (cell, TUNING_SEED) in self.found else None


def difference(differences):
    """What differences paired by seed come to; None where there are none."""
    if not len(differences):
        return None
    mean, spread = float(np.mean(differences)), deviation(differences)
    return Difference(mean, spread, len(differences), float(stats.ttest_1samp(differences, 0).pvalue) if spread > 0 else math.nan)


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def significant(difference, level=0.05):
    return difference is not None and difference.p < level


def verdict(*conditions):
    """Whether all hold; None where one of them could not be told."""
    return None if any(condition is None for condition in conditions) else all(conditions)


def worse(found):
    """Whether a difference is above 0 beyond chance; None where it was not tested."""
    return None if found is None or math.isnan(found.p) else found.mean > 0 and significant(found)


def text(found):
    return "not run" if found is None else str(found)
