"""Statistics of finished runs: means, spreads, and paired tests over seeds."""

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


AS_IN_PAPERS, TOWARDS, NOT_SO = (
    "As in the papers",
    "Towards the papers, but not everywhere beyond chance",
    "Not as in the papers",
)


class Difference(NamedTuple):
    """How much worse one cell is than another, over the seeds that both have.

    Mean and standard deviation, the number of seeds, and p of a paired t-test.
    """

    mean: float
    spread: float
    seeds: int
    p: float

    def __str__(self):
        return f"{self.mean:+.3f} ± {self.spread:.3f} ({p_text(self.p)})"


def p_text(p):
    return "p untested" if math.isnan(p) else f"p = {p:.2g}" if p >= 1e-4 else "p < 1e-4"


class Runs:
    """The finished runs of a scale.

    `runs(cell)` is the metric of its task for each seed, in seed order.
    """

    def __init__(self, by_run, scale):
        self.by_run, self.scale = by_run, scale

    def __call__(self, cell):
        key, factor, _ = UNITS[cell.task]
        return {
            seed: factor * self.by_run[cell, seed][key]
            for seed in self.scale.seeds
            if (cell, seed) in self.by_run
        }

    def records(self, cell):
        return [self.by_run[cell, seed] for seed in self.scale.seeds if (cell, seed) in self.by_run]

    def mean(self, cell):
        """Mean and standard deviation over seeds; NaN without runs."""
        values = list(self(cell).values())
        return (float(np.mean(values)), deviation(values)) if values else (math.nan, math.nan)

    def difference(self, cell, reference):
        """`cell` minus `reference`, paired by seed; None without common seeds."""
        ours, theirs = self(cell), self(reference)
        return difference([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])

    def tuning(self, cell):
        return (
            self.by_run[cell, TUNING_SEED]["bits"] if (cell, TUNING_SEED) in self.by_run else None
        )


def difference(differences):
    """Statistics of differences paired by seed; None without any."""
    if not len(differences):
        return None
    mean, spread = float(np.mean(differences)), deviation(differences)
    return Difference(
        mean,
        spread,
        len(differences),
        float(stats.ttest_1samp(differences, 0).pvalue) if spread > 0 else math.nan,
    )


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def significant(difference, level=0.05):
    return difference is not None and difference.p < level


def untested(difference):
    return difference is None or math.isnan(difference.p)


def verdict(holds, points=False):
    """The verdict on a finding that holds or does not; None if there are too few runs.

    `points` means that the differences at least have the expected sign.
    """
    return (
        "Not enough runs to tell"
        if holds is None
        else AS_IN_PAPERS
        if holds
        else TOWARDS
        if points
        else NOT_SO
    )


def above_zero(*expected):
    """The verdict on differences that the papers expect to be above 0."""
    if any(map(untested, expected)):
        return verdict(None)
    points = all(one.mean > 0 for one in expected)
    return verdict(points and all(map(significant, expected)), points)


def text(difference):
    return "not run" if difference is None else str(difference)
