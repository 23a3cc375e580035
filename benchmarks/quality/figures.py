"""Plots of differences and their spread."""

import math

import numpy as np
from matplotlib.figure import Figure


def plot(title, width=6.0, panels=1):
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title, fontsize=10)
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def bars(ax, differences, unit):
    """Horizontal bars of differences `{name: Difference}` with their standard deviations."""
    differences = {name: one for name, one in differences.items() if one is not None}
    places = np.arange(len(differences))
    ax.barh(
        places,
        [one.mean for one in differences.values()],
        xerr=[np.nan_to_num(one.spread) for one in differences.values()],
        height=0.6,
        capsize=2,
    )
    ax.set_yticks(places, list(differences), fontsize=8)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set_xlabel(unit, fontsize=8)


def line(ax, xs, points, label):
    """Points `[(mean, spread)]` with error bars and a line, which None and NaN interrupt."""
    mean, spread = np.array(
        [(math.nan, math.nan) if point is None else point[:2] for point in points]
    ).T
    if not np.isnan(mean).all():
        ax.errorbar(
            list(xs),
            mean,
            np.nan_to_num(spread),
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=label,
        )
