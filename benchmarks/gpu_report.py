"""Reports on the timings of `gpu.py`: rows for the automatic choice, a plot, tables."""

import math
import statistics

import tabulate

from jaxsparse._kernels import KERNELS

MARGIN = (
    1.05  # by which a kernel must win at every measured product of a row of the table of choices
)

COLUMNS = ("shape", "rows", "best", "over jax dense", "over torch", "TFLOP/s", "GB/s", "of bound")


def row(shape, n, m, k, seconds, peaks):
    """One row of the table, the timings of one product."""
    dense = seconds["jax dense"]
    ours = {name: t for name, t in seconds.items() if name in KERNELS}
    best = min(ours, key=ours.get) if ours else None
    flops, bytes_moved = 2 * n * m * k, 1.125 * m * k + 2 * n * (m + k)
    out = {
        "shape": shape,
        "rows": n,
        "M": m,
        "K": k,
        "microseconds": {name: 1e6 * t for name, t in seconds.items()},
    }
    if best is None:
        return out
    t = ours[best]
    bound = max(flops / peaks[0], bytes_moved / peaks[1]) if peaks else None
    return {
        **out,
        "best": best,
        "over jax dense": dense / t,
        "over torch": seconds["torch semi-structured"] / t
        if "torch semi-structured" in seconds
        else None,
        "TFLOP/s": flops / t / 1e12,
        "GB/s": bytes_moved / t / 1e9,
        "of bound": bound / t if bound else None,
    }


def table(timings):
    return tabulate.tabulate(
        [[one.get(column) for column in COLUMNS] for one in timings], COLUMNS, floatfmt=".2f"
    )


def choices(timings, wrong, capability):
    """Rows of `_PREFERENCES` in `jaxsparse/_kernels/__init__.py` implied by timings on one device.

    A row states the number of weights from which a kernel beats the dense product by `MARGIN` in
    every measured shape. Neighbouring row counts with the same number are merged. A shape at which
    the kernel was wrong counts as lost. A row claims nothing between and beyond the measured row
    counts. The first row that fits is used, so the fastest kernels come first.
    """
    failed = {(one["kernel"], one["shape"], one["rows"]) for one in wrong}
    rows, gains = [], []
    for name in KERNELS:
        last = None
        for n in sorted({one["rows"] for one in timings}):
            measured = [
                one
                for one in timings
                if one["rows"] == n
                and (name in one["microseconds"] or (name, one["shape"], n) in failed)
            ]
            measured.sort(key=lambda one: -one["M"] * one["K"])
            wins = []
            for one in measured:
                if one["microseconds"]["jax dense"] < MARGIN * one["microseconds"].get(
                    name, math.inf
                ):
                    wins = [w for w in wins if w["M"] * w["K"] > one["M"] * one["K"]]
                    break
                wins.append(one)
            gain = [one["microseconds"]["jax dense"] / one["microseconds"][name] for one in wins]
            weights = min((one["M"] * one["K"] for one in wins), default=None)
            if weights is None:
                last = None
            elif last is not None and last[4] == weights:
                last[3] = n
                gains[-1] += gain
            else:
                last = [
                    (capability,),
                    name,
                    n,
                    n,
                    weights,
                    min(min(one["M"], one["K"]) for one in wins),
                ]
                rows.append(last)
                gains.append(gain)
    order = sorted(range(len(rows)), key=lambda i: -statistics.geometric_mean(gains[i]))
    return [tuple(rows[i]) for i in order]


def plot(timings, device, path):
    """Plots the ratio to the dense product against the rows of x, one line for each shape."""
    from matplotlib.figure import Figure  # here, so that measuring does not need matplotlib

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="rows of x",
        ylabel="times as fast as jax's dense product",
        xscale="log",
        title=device,
    )
    axes.set_xscale("log", base=2)
    for shape in dict.fromkeys(one["shape"] for one in timings):
        points = sorted(
            (one["rows"], one["over jax dense"])
            for one in timings
            if one["shape"] == shape and "over jax dense" in one
        )
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=3, label=shape
        ) if points else None
    axes.axhline(1, color="black", linewidth=0.8)
    if axes.lines[1:]:
        axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)
