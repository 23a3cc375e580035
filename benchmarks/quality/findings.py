"""Derives the findings from finished runs: a table, a plot and a line of text for each.

A line states if runs are missing.

    python -m benchmarks.quality.findings
"""

import argparse
import itertools
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tabulate
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.quality import store
from benchmarks.quality.compare import (
    AS_IN_PAPERS,
    UNITS,
    Runs,
    above_zero,
    difference,
    p_text,
    significant,
    text,
    untested,
    verdict,
)
from benchmarks.quality.figures import bars, line, plot
from benchmarks.quality.runs import (
    ABLATIONS,
    COMPARED_WITH_DENSE,
    CPU,
    DECAYING,
    DENSITIES,
    GPU,
    ON_DIGITS,
    RECIPES,
    TIED,
    TUNED_AT,
    at_density,
    density,
    longer,
    resets,
    sweep,
    tuning,
    wider,
)

# The likely reason if a finding of the papers does not show at the size for CPUs; written by hand
# after inspecting the runs.
REASONS = {
    "decaying": "Decay with the masked gradient makes the difference; at 1:8 and denser, "
    "differences are as small as those between seeds.",
    "exploration": "The cost of a fixed mask is below what five seeds can resolve.",
    "gap": "The gap is likely due to the size of the model, which is hundreds of times smaller "
    "than those of the papers: it closes with width.",
    "structures": "At 2:4 and 1:8 the cost of blocks is below what five seeds can resolve.",
    "sweeps": "Five seeds can resolve differences of about 0.02 bits, and these are smaller.",
    "variances": "The reason for the rise of the second moments is not known.",
    "digits": "The images are few and easy: seeds differ more than recipes do.",
}
HEADER = (
    "pattern",
    "recipe",
    "metric",
    "mean",
    "s.d.",
    "seeds",
    "minus",
    "difference",
    "s.d. of it",
    "p",
)


class Finding(NamedTuple):
    """One finding.

    Attributes:
      name: the name of its files.
      line: the result in words.
      header: the header of its table.
      rows: the rows of its table.
      figure: its plot.
      verdict: whether the finding of the papers was seen.
    """

    name: str
    line: str
    header: tuple[str, ...]
    rows: list[Any]
    figure: Figure
    verdict: str


def row(runs, cell, reference=None, name=None):
    """A row of a table with columns `HEADER`; blank where runs are missing."""
    mean, spread = runs.mean(cell)
    difference = runs.difference(cell, reference) if reference and reference != cell else None
    against = (
        (
            f"{reference.pattern} {reference.recipe}",
            known(difference.mean),
            known(difference.spread),
            known(difference.p),
        )
        if difference
        else (None,) * 4
    )
    return (
        cell.pattern,
        name or cell.recipe,
        UNITS[cell.task][2],
        known(mean),
        known(spread),
        len(runs(cell)),
        *against,
    )


def known(number):
    return None if math.isnan(number) else number


def gap(cells, runs):
    """How far 2:4 is from dense, and whether the gap closes with length and size."""
    patterns = COMPARED_WITH_DENSE[1:]
    figure, axes = plot("2:4 minus dense, trained by RESET: bits per character", 8, 2)
    rows, lines, closes, now = [], [], [], {}
    for pattern in patterns:
        for ax, axis, sizes in zip(
            axes, ("steps", "width"), (longer(cells), wider(cells)), strict=True
        ):
            by_size, gaps = {}, []
            for size, changes in sizes.items():
                cell, dense = resets(cells, pattern, **changes), resets(cells, "dense", **changes)
                by_size[size] = runs.difference(cell, dense)
                ours, theirs = runs(cell), runs(dense)
                gaps.append(
                    {seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()}
                )
                rows += [
                    row(runs, one, dense, f"{one.recipe}, {one.steps} steps, width {one.width}")
                    for one in (dense, cell)
                ]
            now[pattern] = runs.difference(cells(pattern, "RESET"), cells("dense", "dense"))
            line(ax, by_size, by_size.values(), pattern)
            ax.set(xlabel=axis, xscale="log")
            ax.set_xticks(list(by_size), list(map(str, by_size)))
            ax.minorticks_off()
            first, *_, last = gaps
            change = difference([last[seed] - first[seed] for seed in first.keys() & last.keys()])
            seen = {size: f"{one.mean:+.3f}" for size, one in by_size.items() if one}
            if len(seen) > 1:
                trend = f" (first to last {p_text(change.p)})" if change else ""
                lines.append(
                    f"{pattern} {', '.join(seen.values())} at {axis} "
                    f"{', '.join(map(str, seen))}{trend}"
                )
            closes.append(None if untested(change) else change.mean < 0 and significant(change))
    for ax in axes:
        ax.axhline(0, color="black", linewidth=0.8)
        ax.legend(fontsize=8)
    distance = "; ".join(
        f"{pattern} is {text(one)} bits from dense" for pattern, one in now.items()
    )
    holds = (
        None
        if any(map(untested, now.values()))
        else not any(one.mean > 0 and significant(one) for one in now.values())
    )
    trend = (
        "is not known yet"
        if None in closes
        else "closes with length and size"
        if all(closes)
        else "does not close beyond chance everywhere"
    )
    return Finding(
        "gap",
        f"{distance}. The gap {trend}: {'; '.join(lines) or 'not run'}.",
        HEADER,
        rows,
        figure,
        verdict(holds),
    )


def ties(cells, runs):
    """Whether the recipes tie at 2:4."""
    recipes = ("RESET", *TIED)
    pairs = {
        pair: runs.difference(*(cells("2:4", recipe) for recipe in pair))
        for pair in itertools.combinations(recipes, 2)
    }
    tested = {pair: one for pair, one in pairs.items() if not untested(one)}
    rows = [row(runs, cells("2:4", recipe), cells("2:4", "RESET")) for recipe in recipes]
    figure, (ax,) = plot("Recipes at 2:4: bits per character above RESET")
    bars(
        ax,
        {recipe: runs.difference(cells("2:4", recipe), cells("2:4", "RESET")) for recipe in TIED},
        "bits above RESET",
    )
    if len(tested) < len(pairs):
        return Finding(
            "ties", "Recipes at 2:4: not enough are run.", HEADER, rows, figure, verdict(None)
        )
    adjusted = stats.false_discovery_control([one.p for one in tested.values()])
    apart = [
        f"{' minus '.join(pair)} {one}"
        for (pair, one), p in zip(tested.items(), adjusted, strict=True)
        if p < 0.05
    ]
    widest = max(abs(one.mean) for one in tested.values())
    seen = np.median(
        [one.spread * stats.t.ppf(0.975, one.seeds - 1) / one.seeds**0.5 for one in tested.values()]
    )
    said = (
        f"{', '.join(recipes)} lie within {widest:.3f} bits at 2:4; of their {len(pairs)} pairs "
        f"{len(apart)} differ (paired t-tests, false discovery rate 5 %; half a 95 % interval is "
        f"about {seen:.3f} bits){': ' if apart else ''}{'; '.join(apart)}."
    )
    return Finding("ties", said, HEADER, rows, figure, verdict(not apart))


def decaying(cells, runs):
    """Whether decaying recipes beat SR-STE at low density, and by how much."""
    rows, lines, expected = [], [], []
    lead, start = DECAYING[0], "SR-STE, dense start"
    for pattern in DENSITIES:
        reference = cells(pattern, "SR-STE")
        rows += [
            row(runs, cells(pattern, recipe), reference)
            for recipe in RECIPES
            if runs(cells(pattern, recipe))
        ]
        differences = [
            runs.difference(one, cells(pattern, lead)) for one in (reference, cells(pattern, start))
        ]
        seen = [
            f"{said}{one}"
            for said, one in zip(("", "with its dense start "), differences, strict=True)
            if one
        ]
        lines += [f"{pattern} {', '.join(seen)}"] if seen else []
        if pattern in ("1:16", "1:32"):
            expected += differences
    figure, (ax,) = plot("Recipes by sparsity: bits per character above dense", 7)
    dense = cells("dense", "dense")
    for recipe in ("SR-STE", start, "RESET", lead):
        line(
            ax,
            [1 / density(p) for p in DENSITIES],
            [runs.difference(cells(p, recipe), dense) for p in DENSITIES],
            recipe,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks([1 / density(p) for p in DENSITIES], list(DENSITIES))
    ax.legend(fontsize=8)
    said = f"{lead} is better than SR-STE by, in bits: {'; '.join(lines) or 'not run'}."
    others = {
        recipe: runs.difference(cells(TUNED_AT, start), cells(TUNED_AT, recipe))
        for recipe in DECAYING[1:]
    }
    against = ", ".join(f"{name} {text(one)}" for name, one in others.items())
    said += f" The others are better than SR-STE with its dense start at {TUNED_AT} by: {against}."
    return Finding("decaying", said, HEADER, rows, figure, above_zero(*expected))


def exploration(cells, runs):
    """Whether no exploitation, a fixed mask and no exploration are worse than rewiring."""
    reference = cells(TUNED_AT, "RESET")
    rows = [row(runs, cells(TUNED_AT, recipe), reference) for recipe in ("RESET", *ABLATIONS)]
    differences = {
        recipe: runs.difference(cells(TUNED_AT, recipe), reference) for recipe in ABLATIONS
    }
    figure, (ax,) = plot(
        f"Without exploitation or exploration at {TUNED_AT}: bits per character above RESET"
    )
    bars(ax, differences, "bits above RESET")
    seen = [f"{recipe} {one}" for recipe, one in differences.items() if one]
    said = f"Above rewiring with RESET at {TUNED_AT}, in bits: {', '.join(seen) or 'not run'}."
    return Finding("exploration", said, HEADER, rows, figure, above_zero(*differences.values()))


def sweeps(cells, runs):
    """Whether the error depends on r, s and z as in figure 2 of the first paper."""
    names = {
        "every": "r, steps between rewirings",
        "grad_scale": "s, gradient scale (0 at the left)",
        "reset_every": "z, steps between resets",
    }
    figure, axes = plot(f"RESET at {TUNED_AT}, swept: bits per character above dense", 10, 3)
    dense, usual = cells("dense", "dense"), cells(TUNED_AT, "RESET")
    rows, lines, expected = [], [], []
    for (name, label), ax in zip(names.items(), axes, strict=True):
        swept = sweep(cells, name)
        rows += [
            row(runs, cell, usual, f"{label.split(',')[0]} = {value:g}")
            for value, cell in swept.items()
        ]
        # s = 0 is drawn at the left end of the logarithmic axis
        xs = [max(value, 3e-3) for value in swept]
        line(ax, xs, [runs.difference(cell, dense) for cell in swept.values()], TUNED_AT)
        values = list(swept)
        # compares the papers' worst value (r large, s = 0, z = 1) with the best
        bad, good = (values[-1], values[0]) if name == "every" else (values[0], values[-1])
        effect = runs.difference(swept[bad], swept[good])
        lines += [f"{label[0]} = {bad:g} rather than {good:g} costs {effect}"] if effect else []
        expected.append(effect)
        ax.set(xlabel=label, xscale="log")
    return Finding(
        "sweeps",
        f"At {TUNED_AT}, in bits: {'; '.join(lines) or 'not run'}.",
        HEADER,
        rows,
        figure,
        above_zero(*expected),
    )


def structures(cells, runs):
    """Whether blocks are worse than N:M at equal density."""
    rows, lines, by_pattern = [], [], {}
    for pattern in DENSITIES:
        reference = cells(pattern, "RESET")
        others = at_density(cells, pattern)
        if pattern == TUNED_AT:
            others["SMALL"] = cells(pattern, "SMALL")
        if pattern == "2:4":
            others["transposable 2:4"] = cells("transposable 2:4", "RESET")
        rows += [row(runs, cell, reference) for cell in (reference, *others.values())]
        by_pattern[pattern] = {
            name: runs.difference(cell, reference) for name, cell in others.items()
        }
        lines += (
            [f"{by_pattern[pattern]['block 4x4']} at {pattern}"]
            if by_pattern[pattern]["block 4x4"]
            else []
        )
    figure, axes = plot(
        "Other structures at the density of N:M: bits per character above it", 12, len(by_pattern)
    )
    for ax, (pattern, differences) in zip(axes, by_pattern.items(), strict=True):
        bars(ax, differences, f"bits above {pattern}")
    costs = ", ".join(lines) or "not run"
    said = f"Blocks of 4x4 cost against N:M of equal density, in bits: {costs}."
    small = runs.difference(
        cells(f"block 4x4 {DENSITIES[TUNED_AT]}", "RESET"), cells(TUNED_AT, "SMALL")
    )
    said += f" Against SMALL, which keeps as many weights, {text(small)} at {TUNED_AT}."
    return Finding(
        "structures",
        said,
        HEADER,
        rows,
        figure,
        above_zero(*(one["block 4x4"] for one in by_pattern.values())),
    )


def decorrelation(cells, runs):
    """Whether the decorrelation time of a weight grows with its final magnitude."""
    figure, (ax,) = plot("Dense model: how long weights remember, by their final magnitude")
    records = [record["decorrelation"] for record in runs.records(cells("dense", "dense"))]
    header = (
        "kernel",
        "rank correlation of Delta and magnitude",
        "s.d. over seeds",
        "Delta of the smallest",
        "Delta of the largest",
    )
    rows, correlations = [], []
    for path in records[0] if records else ():
        magnitudes, deltas = (
            np.array([record[path][half] for record in records]) for half in (0, 1)
        )
        by_seed = [
            stats.spearmanr(*pair, nan_policy="omit").statistic
            for pair in zip(magnitudes, deltas, strict=True)
        ]
        correlations.append(by_seed)
        label = path.replace("/kernel", "")
        rows.append(
            (
                label,
                np.mean(by_seed),
                np.std(by_seed),
                np.nanmean(deltas[:, 0]),
                np.nanmean(deltas[:, -1]),
            )
        )
        line(
            ax,
            magnitudes.mean(0),
            list(zip(np.nanmean(deltas, 0), np.nanstd(deltas, 0), strict=True)),
            label,
        )
    ax.set(
        xlabel="final magnitude (median of a tenth of the weights)",
        ylabel="Delta, fraction of training",
    )
    if not rows:
        return Finding(
            "decorrelation",
            "Delta against final magnitude: not run.",
            header,
            rows,
            figure,
            verdict(None),
        )
    ax.legend(fontsize=8)
    correlation = difference(np.mean(correlations, 0))
    ends = [np.mean([r[i] for r in rows]) for i in (3, 4)]
    said = (
        f"Delta is {ends[0]:.2f} of training for the tenth of weights that end smallest and "
        f"{ends[1]:.2f} for the largest; the rank correlation of the tenths' medians is "
        f"{correlation} over {correlation.seeds} seeds, by kernel "
        f"{min(r[1] for r in rows):+.2f} to {max(r[1] for r in rows):+.2f}."
    )
    return Finding("decorrelation", said, header, rows, figure, above_zero(correlation))


def variances(cells, runs):
    """Whether variances of gradients and second moments fall under MDGF but not under SR-STE."""
    kinds = ("gradient variance", "second moment variance")
    recipes = ("SR-STE", "SR-STE, dense start", "RESET", "MDGF linear", "MDGF exponential")
    figure, axes = plot(
        f"Feed-forward kernels at {TUNED_AT}: variance, mean of logarithms over kernels and seeds",
        10,
        2,
    )
    header = (
        "recipe",
        "what",
        "end over start, log10",
        "s.d. over seeds",
        "p",
        "kernels in which it falls",
    )
    rows, changes = [], {}
    for recipe in recipes:
        records = runs.records(cells(TUNED_AT, recipe))
        for ax, kind in zip(axes, kinds, strict=True):
            ax.set(xlabel="step", yscale="log", title=kind)
            if not records:
                continue
            # [seeds, kernels, samples]; the start is the second tenth of training, after the
            # warm-up, and the end is the last tenth
            series = np.log10(
                np.maximum([list(record[kind].values()) for record in records], 1e-30)
            )
            tenth = max(1, series.shape[-1] // 10)
            change = series[..., -tenth:].mean(-1) - series[..., tenth : 2 * tenth].mean(-1)
            changes[recipe, kind] = change.mean(1)
            effect = difference(changes[recipe, kind])
            rows.append(
                (
                    recipe,
                    kind,
                    effect.mean,
                    effect.spread,
                    effect.p,
                    f"{(change.mean(0) < 0).sum()} of {change.shape[1]}",
                )
            )
            ax.plot(
                records[0]["sampled at"], 10 ** series.mean((0, 1)), label=recipe, linewidth=1.2
            )
    axes[0].legend(fontsize=7)
    lines, expected, (lead, *others) = [], [], (DECAYING[0], "SR-STE", "SR-STE, dense start")
    for kind in kinds:
        seen = [
            f"{10 ** changes[recipe, kind].mean():.2g}-fold under {recipe}"
            for recipe in (lead, *others)
            if (recipe, kind) in changes
        ]
        lines.append(f"the {kind} changes {'; '.join(seen) or '(not run)'}")
        expected.append(difference(-changes.get((lead, kind), np.array([]))))
        for other in others:
            both = [changes.get((recipe, kind), np.array([])) for recipe in (other, lead)]
            expected.append(difference(both[0] - both[1]) if len(both[0]) == len(both[1]) else None)
    said = (
        f"From the second to the last tenth of training {'; '.join(lines)}. D scales the gradients "
        f"of {lead} by construction."
    )
    return Finding("variances", said, header, rows, figure, above_zero(*expected))


def digits(cells, runs):
    """Whether 2:4 costs accuracy on the digits, and whether MDGF beats SR-STE there."""
    figure, axes = plot("Digits: % error above dense", 10, 2)
    rows, lines, expected = [], [], []
    for ax, task in zip(axes, ("transformer", "convolutions"), strict=True):
        if task not in cells.settings:
            continue
        dense = cells("dense", "dense", task)
        wanted = [
            cells(pattern, recipe, task)
            for pattern, recipes in ON_DIGITS.items()
            for recipe in recipes
        ]
        rows += [row(runs, cell, dense, f"{cell.recipe}, {task}") for cell in wanted]
        bars(
            ax,
            {
                f"{cell.pattern} {cell.recipe}": runs.difference(cell, dense)
                for cell in wanted
                if cell != dense
            },
            "% error above dense",
        )
        ax.set_title(task, fontsize=9)
        near = runs.difference(cells("2:4", "RESET", task), dense)
        lead = runs.difference(
            cells("1:16", "SR-STE, dense start", task), cells("1:16", DECAYING[0], task)
        )
        lines += [f"{task}: 2:4 is {near} % error from dense"] if near else []
        lines += (
            [f"{task}: SR-STE with its dense start is {lead} % error above {DECAYING[0]} at 1:16"]
            if lead
            else []
        )
        expected.append(lead)
    return Finding(
        "digits",
        f"{'; '.join(lines) or 'Digits: not run'}.",
        HEADER,
        rows,
        figure,
        above_zero(*expected or [None]),
    )


FINDINGS = (gap, ties, decaying, exploration, sweeps, structures, decorrelation, variances, digits)


def tuning_table(cells, runs):
    """All tuning runs, and the choices made from them."""
    rates, settings = tuning(cells)
    rows = [
        (
            task,
            "dense",
            "learning rate",
            cell.rate,
            runs.tuning(cell),
            cell.rate == cells.settings[task],
        )
        for task in rates
        for cell in rates[task]
    ]
    for name, tried in settings.items():
        chosen = dict(cells(TUNED_AT, name).options)
        for cell in tried:
            value = dict(cell.options)[RECIPES[name].tuned]
            rows.append(
                (
                    "characters",
                    name,
                    RECIPES[name].tuned,
                    value,
                    runs.tuning(cell),
                    value == chosen[RECIPES[name].tuned],
                )
            )
    return ("task", "recipe", "argument", "value", "bits on the tuning seed", "chosen"), rows


def overview(cells, runs):
    """The cost of every recipe and structure at every density: bits per character above dense."""
    dense = cells("dense", "dense")

    def entry(cell):
        difference = runs.difference(cell, dense)
        return f"{difference.mean:+.3f} ± {difference.spread:.3f}" if difference else ""

    rows = [
        (recipe, *(entry(cells(pattern, recipe)) for pattern in DENSITIES))
        for recipe in ("SMALL", *RECIPES)
    ]
    structures = [at_density(cells, pattern) for pattern in DENSITIES]
    rows += [
        (f"RESET, {kind}", *(entry(one[kind]) for one in structures)) for kind in structures[0]
    ]
    rows.append(
        (
            "RESET, transposable",
            entry(cells("transposable 2:4", "RESET")),
            *[""] * (len(DENSITIES) - 1),
        )
    )
    return ("recipe", *DENSITIES), rows


def report(scale, folder):
    """Writes the tables and plots of the runs in a folder, and prints them."""
    where, records = store.where(folder), store.read(folder)
    cells, runs = store.cells(scale, records), Runs(records, scale)
    header, rows = tuning_table(cells, runs)
    save(folder, "tuning", where, header=header, rows=rows)
    summary = []
    for make in FINDINGS:
        one = make(cells, runs)
        read = folder == store.folder(CPU) and one.verdict != AS_IN_PAPERS
        reason = f" {REASONS[one.name]}" if read and one.name in REASONS else ""
        whole = f"{one.verdict}. {one.line}{reason}"
        summary.append((one.name, whole))
        save(
            folder,
            one.name,
            where,
            line=whole,
            verdict=one.verdict,
            header=one.header,
            rows=one.rows,
        )
        one.figure.savefig(folder / f"{one.name}.png", dpi=120)
        print(f"\n{one.name}: {whole}\n{tabulate.tabulate(one.rows, one.header, floatfmt='.3g')}")
    hours = sum(record["seconds"] for record in records.values()) / 3600
    header, rows = overview(cells, runs)
    mean, spread = runs.mean(cells("dense", "dense"))
    save(
        folder,
        "findings",
        where,
        runs=len(records),
        core_hours=hours,
        dense=(mean, spread),
        header=header,
        rows=rows,
        findings=summary,
    )


def save(folder, name, where, **content):
    (folder / f"{name}.json").write_text(
        json.dumps({**where, **content}, indent=1, default=plain) + "\n"
    )


def plain(value):
    return np.asarray(value).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="those of the larger model")
    parser.add_argument("--out", type=pathlib.Path, help="the folder of the runs")
    args = parser.parse_args()
    scale = GPU if args.gpu else CPU
    folder = args.out or store.folder(scale)
    if not store.read(folder):
        parser.error(f"{folder} holds no runs. Make some by python -m benchmarks.quality.")
    report(scale, folder)
