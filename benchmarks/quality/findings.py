"""Finished runs to the findings: for each a table, a plot and a line of text; where runs are missing it says so.

python -m benchmarks.quality.findings
"""

import argparse
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tabulate
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.quality import store
from benchmarks.quality.compare import UNITS, Runs, difference, p_text, significant, text, verdict, worse
from benchmarks.quality.figures import bars, line, plot
from benchmarks.quality.runs import (
    ABLATIONS,
    COMPARED_WITH_DENSE,
    CPU,
    DECAYING,
    DENSITIES,
    FULL,
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

# Where a finding of the papers does not show at the size for CPUs, the likely reason; written once the runs have been read.
REASONS = {
    "exploration": "All point as in the papers, most by no more than seeds differ: five are too few.",
    "gap": "That there is a gap is likely the size of the model, hundreds of times smaller than those of the papers: it closes with width.",
    "structures": "Blocks are worse beyond chance at 1:8 and 1:16; at 2:4 and 1:32 seeds differ by more than there is to see.",
    "sweeps": "All three point as in the papers; r and s by no more than seeds differ.",
    "variances": "Why second moments rise is not known; MDGF has smaller gradients by construction, since D scales them.",
    "digits": "In the convolutional network all recipes but SMALL lie within half a per cent of each other at 1:16.",
}
HEADER = ("pattern", "recipe", "metric", "mean", "s.d.", "seeds", "minus", "difference", "s.d. of it", "p")


class Finding(NamedTuple):
    """One finding.

    Attributes:
      name: of its files.
      line: what was seen.
      header: of its table.
      rows: of its table.
      figure: its plot.
      holds: whether the papers' finding was seen; None where too little was run to say.
    """

    name: str
    line: str
    header: tuple[str, ...]
    rows: list[Any]
    figure: Figure
    holds: bool | None


def row(runs, cell, reference=None, name=None):
    """A row of a table, under `HEADER`; with blanks where runs are missing."""
    mean, spread = runs.mean(cell)
    found = runs.difference(cell, reference) if reference and reference != cell else None
    against = (f"{reference.pattern} {reference.recipe}", known(found.mean), known(found.spread), known(found.p)) if found else (None,) * 4
    return (cell.pattern, name or cell.recipe, UNITS[cell.task][2], known(mean), known(spread), len(runs(cell)), *against)


def known(number):
    return None if math.isnan(number) else number


def gap(cells, runs):
    """How far 2:4 is from dense, and whether the gap closes with length and size."""
    patterns = COMPARED_WITH_DENSE[1:]
    figure, axes = plot("2:4 minus dense, trained by RESET: bits per character", 8, 2)
    rows, lines, closes, now = [], [], [], {}
    length = f"steps (width {cells.scale.width // 2})"
    for pattern in patterns:
        for ax, axis, sizes in zip(axes, (length, "width"), (longer(cells), wider(cells)), strict=True):
            found, gaps = {}, []
            for size, changes in sizes.items():
                cell, dense = resets(cells, pattern, **changes), resets(cells, "dense", **changes)
                found[size] = runs.difference(cell, dense)
                ours, theirs = runs(cell), runs(dense)
                gaps.append({seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()})
                rows += [row(runs, one, dense, f"{one.recipe}, {one.steps} steps, width {one.width}") for one in (dense, cell)]
            now[pattern] = runs.difference(cells(pattern, "RESET"), cells("dense", "dense"))
            line(ax, found, found.values(), pattern)
            ax.set(xlabel=axis, xscale="log")
            ax.set_xticks(list(found), list(map(str, found)))
            ax.minorticks_off()
            first, *_, last = gaps
            change = difference([last[seed] - first[seed] for seed in first.keys() & last.keys()])
            seen = {size: f"{one.mean:+.3f}" for size, one in found.items() if one}
            if len(seen) > 1:
                lines.append(
                    f"{pattern} {', '.join(seen.values())} at {axis} {', '.join(map(str, seen))} (first to last {p_text(change.p)})"
                )
            closes.append(None if change is None or math.isnan(change.p) else change.mean < 0 and significant(change))
    for ax in axes:
        ax.axhline(0, color="black", linewidth=0.8)
        ax.legend(fontsize=8)
    distance = "; ".join(f"{pattern} is {text(one)} bits from dense" for pattern, one in now.items())
    holds = verdict(*(None if one is None or math.isnan(one.p) else not worse(one) for one in now.values()))
    said = {True: "The gap closes with length and size", False: "The gap does not close in every case", None: "Its trend is not known yet"}
    return Finding("gap", f"{distance}. {said[verdict(*closes)]}: {'; '.join(lines) or 'not run'}.", HEADER, rows, figure, holds)


def ties(cells, runs):
    """Whether the recipes tie at 2:4."""
    reference = cells("2:4", "RESET")
    found = {recipe: runs.difference(cells("2:4", recipe), reference) for recipe in TIED}
    tested = {recipe: one for recipe, one in found.items() if one and not math.isnan(one.p)}
    rows = [row(runs, cells("2:4", recipe), reference) for recipe in ("RESET", *TIED)]
    figure, (ax,) = plot("Recipes at 2:4: bits per character above RESET")
    bars(ax, found, "bits above RESET")
    if len(tested) < 2:
        return Finding("ties", "Recipes at 2:4: not enough are run.", HEADER, rows, figure, None)
    adjusted = dict(zip(tested, stats.false_discovery_control([one.p for one in tested.values()]), strict=True))
    apart = [f"{recipe} {tested[recipe]}" for recipe, p in adjusted.items() if p < 0.05]
    low, high = (pick(tested, key=lambda recipe: tested[recipe].mean) for pick in (min, max))
    said = f"Against RESET the recipes at 2:4 lie between {tested[low].mean:+.3f} ({low}) and {tested[high].mean:+.3f} bits ({high})"
    said += f"; of {len(tested)}, {len(apart)} differ (paired t-tests, false discovery rate 5 %)" + (
        f": {'; '.join(apart)}." if apart else "."
    )
    missing = [recipe for recipe in TIED if recipe not in tested]
    said += f" Not run: {', '.join(missing)}." if missing else ""
    return Finding("ties", said, HEADER, rows, figure, False if apart else None if missing else True)


def decaying(cells, runs):
    """Whether decaying recipes beat SR-STE where little is kept, and by how much."""
    rows, lines, holds = [], [], []
    lead = DECAYING[0]
    for pattern in DENSITIES:
        reference = cells(pattern, "SR-STE")
        rows += [row(runs, cells(pattern, recipe), reference) for recipe in RECIPES if runs(cells(pattern, recipe))]
        plain, start = (
            runs.difference(reference, cells(pattern, lead)) for reference in (reference, cells(pattern, "SR-STE, dense start"))
        )
        seen = [f"{said}{one}" for said, one in (("", plain), ("with its dense start ", start)) if one]
        lines += [f"{pattern} {', '.join(seen)}"] if seen else []
        if pattern in ("1:16", "1:32"):
            holds.append(worse(start))
    figure, (ax,) = plot("Recipes by sparsity: bits per character above dense", 7)
    dense = cells("dense", "dense")
    for recipe in ("SR-STE", "SR-STE, dense start", "RESET", *DECAYING):
        line(ax, [1 / density(p) for p in DENSITIES], [runs.difference(cells(p, recipe), dense) for p in DENSITIES], recipe)
    ax.set_xscale("log", base=2)
    ax.set_xticks([1 / density(p) for p in DENSITIES], list(DENSITIES))
    ax.legend(fontsize=8)
    said = f"{lead} is better than SR-STE by, in bits: {'; '.join(lines) or 'not run'}."
    return Finding("decaying", said, HEADER, rows, figure, verdict(*holds))


def exploration(cells, runs):
    """Whether no exploitation, a fixed mask and no exploration are worse than rewiring."""
    rows, lines, found = [], [], {}
    for pattern in FULL:
        reference = cells(pattern, "RESET")
        rows += [row(runs, cells(pattern, recipe), reference) for recipe in ("RESET", *ABLATIONS)]
        found[pattern] = {recipe: runs.difference(cells(pattern, recipe), reference) for recipe in ABLATIONS}
        seen = [f"{recipe} {one}" for recipe, one in found[pattern].items() if one]
        lines += [f"{pattern}: {', '.join(seen)}"] if seen else []
    figure, axes = plot("Without exploitation or exploration: bits per character above RESET", 8, len(FULL))
    for ax, (pattern, differences) in zip(axes, found.items(), strict=True):
        bars(ax, differences, "bits above RESET")
        ax.set_title(pattern, fontsize=9)
    said = f"Above rewiring with RESET, in bits: {'; '.join(lines) or 'not run'}."
    holds = verdict(*(worse(one) for differences in found.values() for one in differences.values()))
    return Finding("exploration", said, HEADER, rows, figure, holds)


def sweeps(cells, runs):
    """Whether error depends on r, s and z as in figure 2 of the first paper."""
    names = {"every": "r, steps between rewirings", "grad_scale": "s, gradient scale", "reset_every": "z, steps between resets"}
    figure, axes = plot(f"RESET at {TUNED_AT}, swept: bits per character above dense", 10, 3)
    dense, usual = cells("dense", "dense"), cells(TUNED_AT, "RESET")
    rows, lines, holds = [], [], []
    for (name, label), ax in zip(names.items(), axes, strict=True):
        swept = sweep(cells, name)
        rows += [row(runs, cell, usual, f"{label.split(',')[0]} = {value:g}") for value, cell in swept.items()]
        xs = [max(value, 3e-3) for value in swept]  # s = 0 stands at the left end of the logarithmic axis
        line(ax, xs, [runs.difference(cell, dense) for cell in swept.values()], TUNED_AT)
        values = list(swept)
        # the papers' worst value against the best: r large, s = 0, z = 1
        bad, good = (values[-1], values[0]) if name == "every" else (values[0], values[-1])
        effect = runs.difference(swept[bad], swept[good])
        lines += [f"{label[0]} = {bad:g} rather than {good:g} costs {effect}"] if effect else []
        holds.append(worse(effect))
        ax.set(xlabel=label, xscale="log")
    return Finding("sweeps", f"At {TUNED_AT}, in bits: {'; '.join(lines) or 'not run'}.", HEADER, rows, figure, verdict(*holds))


def structures(cells, runs):
    """Whether blocks are worse than N:M at equal density."""
    rows, lines, holds, found = [], [], [], {}
    for pattern in DENSITIES:
        reference = cells(pattern, "RESET")
        others = at_density(cells, pattern)
        if pattern in FULL:
            others["SMALL"] = cells(pattern, "SMALL")
        if pattern == "2:4":
            others["transposable 2:4"] = cells("transposable 2:4", "RESET")
        rows += [row(runs, cell, reference) for cell in (reference, *others.values())]
        found[pattern] = {name: runs.difference(cell, reference) for name, cell in others.items()}
        lines += [f"{found[pattern]['block 4x4']} at {pattern}"] if found[pattern]["block 4x4"] else []
        if pattern in FULL:
            holds.append(worse(found[pattern]["block 4x4"]))
    figure, axes = plot("Other structures at the density of N:M: bits per character above it", 12, len(found))
    for ax, (pattern, differences) in zip(axes, found.items(), strict=True):
        bars(ax, differences, f"bits above {pattern}")
    said = f"Blocks of 4x4 cost against N:M of equal density, in bits: {', '.join(lines) or 'not run'}."
    return Finding("structures", said, HEADER, rows, figure, verdict(*holds))


def decorrelation(cells, runs):
    """Whether the time after which a weight forgets grows with its final magnitude."""
    figure, (ax,) = plot("Dense model: how long weights remember, by their final magnitude")
    records = [record["decorrelation"] for record in runs.records(cells("dense", "dense"))]
    header = ("kernel", "rank correlation of Delta and magnitude", "s.d. over seeds", "Delta of the smallest", "Delta of the largest")
    rows, correlations = [], []
    for path in records[0] if records else ():
        magnitudes, deltas = (np.array([record[path][half] for record in records]) for half in (0, 1))
        found = [stats.spearmanr(*pair, nan_policy="omit").statistic for pair in zip(magnitudes, deltas, strict=True)]
        correlations.append(found)
        label = path.replace("/kernel", "")
        rows.append((label, np.mean(found), np.std(found), np.nanmean(deltas[:, 0]), np.nanmean(deltas[:, -1])))
        line(ax, magnitudes.mean(0), list(zip(np.nanmean(deltas, 0), np.nanstd(deltas, 0), strict=True)), label)
    ax.set(xlabel="final magnitude (median of a tenth of the weights)", ylabel="Delta, fraction of training")
    if not rows:
        return Finding("decorrelation", "Delta against final magnitude: not run.", header, rows, figure, None)
    ax.legend(fontsize=8)
    found = difference(np.mean(correlations, 0))
    ends = [np.mean([r[i] for r in rows]) for i in (3, 4)]
    said = f"Delta is {ends[0]:.2f} of training for the tenth of weights that end smallest and {ends[1]:.2f} for the largest"
    said += f"; rank correlation with magnitude {found} over {found.seeds} seeds, by kernel "
    said += f"{min(r[1] for r in rows):+.2f} to {max(r[1] for r in rows):+.2f}."
    return Finding("decorrelation", said, header, rows, figure, worse(found))


def variances(cells, runs):
    """Whether the variances of gradients and of Adam's second moment fall under MDGF, and not under SR-STE."""
    kinds = ("gradient variance", "second moment variance")
    recipes = ("SR-STE", "SR-STE, dense start", "RESET", "MDGF linear", "MDGF exponential")
    figure, axes = plot(f"Feed-forward kernels at {TUNED_AT}: variance, mean of logarithms over kernels and seeds", 10, 2)
    header = ("recipe", "what", "end over start, log10", "s.d. over seeds", "p", "kernels in which it falls")
    rows, changes = [], {}
    for recipe in recipes:
        records = runs.records(cells(TUNED_AT, recipe))
        for ax, kind in zip(axes, kinds, strict=True):
            ax.set(xlabel="step", yscale="log", title=kind)
            if not records:
                continue
            # [seeds, kernels, samples]; the start is the tenth of training after the warm-up, the end the last tenth
            series = np.log10(np.maximum([list(record[kind].values()) for record in records], 1e-30))
            tenth = max(1, series.shape[-1] // 10)
            change = series[..., -tenth:].mean(-1) - series[..., tenth : 2 * tenth].mean(-1)
            changes[recipe, kind] = change.mean(1)
            found = difference(changes[recipe, kind])
            rows.append((recipe, kind, found.mean, found.spread, found.p, f"{(change.mean(0) < 0).sum()} of {change.shape[1]}"))
            ax.plot(records[0]["sampled at"], 10 ** series.mean((0, 1)), label=recipe, linewidth=1.2)
    axes[0].legend(fontsize=7)
    lines, holds, named = [], [], (DECAYING[0], "SR-STE")
    for kind in kinds:
        seen = [f"{10 ** changes[recipe, kind].mean():.2g}-fold under {recipe}" for recipe in named if (recipe, kind) in changes]
        lead, base = (changes.get((recipe, kind)) for recipe in named)
        paired = None if lead is None or base is None or len(lead) != len(base) else difference(base - lead)
        against = f" ({p_text(paired.p)})" if paired else ""
        lines.append(f"the {kind} changes {' and '.join(seen) or '(not run)'}{against}")
        holds.append(
            None if paired is None or math.isnan(paired.p) else bool(worse(paired) and lead.mean() < 0 and base.mean() > lead.mean())
        )
    return Finding("variances", f"From the second to the last tenth of training {'; '.join(lines)}.", header, rows, figure, verdict(*holds))


def digits(cells, runs):
    """What the digits say."""
    figure, axes = plot("Digits: % error above dense", 10, 2)
    rows, lines, holds = [], [], []
    for ax, task in zip(axes, ("transformer", "convolutions"), strict=True):
        if task not in cells.settings:
            continue
        dense = cells("dense", "dense", task)
        wanted = [cells(pattern, recipe, task) for pattern, recipes in ON_DIGITS.items() for recipe in recipes]
        rows += [row(runs, cell, dense, f"{cell.recipe}, {task}") for cell in wanted]
        bars(ax, {f"{cell.pattern} {cell.recipe}": runs.difference(cell, dense) for cell in wanted if cell != dense}, "% error above dense")
        ax.set_title(task, fontsize=9)
        near = runs.difference(cells("2:4", "RESET", task), dense)
        lead = runs.difference(cells("1:16", "SR-STE, dense start", task), cells("1:16", DECAYING[0], task))
        lines += [f"{task}: 2:4 is {near} % error from dense"] if near else []
        lines += [f"{task}: SR-STE with its dense start is {lead} % error above {DECAYING[0]} at 1:16"] if lead else []
        holds.append(worse(lead))
    return Finding("digits", f"{'; '.join(lines) or 'Digits: not run'}.", HEADER, rows, figure, verdict(*holds) if holds else None)


FINDINGS = (gap, ties, decaying, exploration, sweeps, structures, decorrelation, variances, digits)


def tuning_table(cells, runs):
    """Every run that tuning made, and what it chose."""
    rates, settings = tuning(cells)
    rows = [
        (task, "dense", "learning rate", cell.rate, runs.tuning(cell), cell.rate == cells.settings[task])
        for task in rates
        for cell in rates[task]
    ]
    for name, tried in settings.items():
        chosen = dict(cells(TUNED_AT, name).options)
        for cell in tried:
            value = dict(cell.options)[RECIPES[name].tuned]
            rows.append(("characters", name, RECIPES[name].tuned, value, runs.tuning(cell), value == chosen[RECIPES[name].tuned]))
    return ("task", "recipe", "argument", "value", "bits on the tuning seed", "chosen"), rows


def overview(cells, runs):
    """What every recipe and structure costs at every density: bits per character above dense."""
    dense = cells("dense", "dense")

    def entry(cell):
        found = runs.difference(cell, dense)
        return f"{found.mean:+.3f} ± {found.spread:.3f}" if found else ""

    rows = [(recipe, *(entry(cells(pattern, recipe)) for pattern in DENSITIES)) for recipe in ("SMALL", *RECIPES)]
    structures = [at_density(cells, pattern) for pattern in DENSITIES]
    rows += [(f"RESET, {kind}", *(entry(one[kind]) for one in structures)) for kind in structures[0]]
    rows.append(("RESET, transposable", entry(cells("transposable 2:4", "RESET")), *[""] * (len(DENSITIES) - 1)))
    return ("recipe", *DENSITIES), rows


def report(scale, folder):
    """Writes the tables and plots of the runs in a folder, and prints them."""
    where, found = store.where(folder), store.read(folder)
    cells, runs = store.cells(scale, found), Runs(found, scale)
    header, rows = tuning_table(cells, runs)
    save(folder, "tuning", where, header=header, rows=rows)
    summary = []
    for make in FINDINGS:
        one = make(cells, runs)
        said = {True: "As in the papers", False: "Not as in the papers", None: "Not enough runs to tell"}[one.holds]
        whole = f"{said}. {one.line}" + (f" {REASONS[one.name]}" if one.holds is False and scale == CPU and one.name in REASONS else "")
        summary.append((one.name, whole))
        save(folder, one.name, where, line=whole, holds=one.holds, header=one.header, rows=one.rows)
        one.figure.savefig(folder / f"{one.name}.png", dpi=120)
        print(f"\n{one.name}: {whole}\n{tabulate.tabulate(one.rows, one.header, floatfmt='.3g')}")
    hours = sum(record["seconds"] for record in found.values()) / 3600
    header, rows = overview(cells, runs)
    mean, spread = runs.mean(cells("dense", "dense"))
    save(folder, "findings", where, runs=len(found), core_hours=hours, dense=(mean, spread), header=header, rows=rows, findings=summary)


def save(folder, name, where, **content):
    (folder / f"{name}.json").write_text(json.dumps({**where, **content}, indent=1, default=plain) + "\n")


def plain(value):
    return np.asarray(value).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="those of the larger model")
    parser.add_argument("--out", type=pathlib.Path, help="the folder of the runs")
    args = parser.parse_args()
    scale = GPU if args.gpu else CPU
    folder = args.out or store.folder(scale)
    if not store.read(folder):
        parser.error(f"there are no runs in {folder}; python -m benchmarks.quality makes some")
    report(scale, folder)
