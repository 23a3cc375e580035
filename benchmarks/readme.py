"""Writes the tables of the README and of docs/results.md from the committed result files.

No number in them is typed by hand.

    python benchmarks/readme.py
"""

import ast
import json
import pathlib
import re

import tabulate
import timing

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def where(result):
    machine = result["processor"] or result["device"]
    return f"{machine}, {result['cores']} cores, jax {result['jax']}, {result['date']}"


def rows_of(result, *floatfmt):
    return tabulate.tabulate(
        result["rows"], result["header"], tablefmt="github", floatfmt=("", *floatfmt)
    )


def train_step(result):
    return (
        f"A training step of a transformer of {result['parameters'] / 1e6:.1f} million parameters "
        f"with new masks every step, against the dense step: medians of {result['rounds']} rounds "
        f"in which the runs take turns (`python benchmarks/train_step.py`; {where(result)}).\n\n"
        + rows_of(result, ".1f", ".3f", ".2f", ".1f")
    )


def char_lm(result):
    return (
        f"The table of `make demo` after {result['steps']} steps ({where(result)}, "
        f"{result['seconds']:.0f} seconds in all):\n\n"
        + rows_of(result, ".3f", ".3f", ".2f", ".1f", ".1f")
    )


def smollm(result):
    return (
        "SmolLM2-135M, pruned in one shot along the input axis of all kernels of its blocks, in "
        f"perplexity on Python's manual pages ({where(result)}, {result['seconds'] / 60:.0f} "
        f"minutes and {result['gigabytes']:.1f} GB in all):\n\n"
        + rows_of(result, ".2f", ".3f", ".1f", ".0f")
    )


def permutation(result):
    before, after = result["perplexities"]
    return (
        "The magnitude that 2:4 keeps before and after channels are reordered, as a share of what "
        f"unstructured sparsity keeps, after {result['rounds']} rounds of the search (`python "
        f"benchmarks/permutation.py`; {where(result)}):\n\n"
        + rows_of(result, ".4f", ".4f", ".3f", ".0f")
        + f"\n\nMore magnitude is not less perplexity: with `ffn_down` pruned by it, {before:.2f} "
        f"in the given order, {after:.2f} in the other."
    )


def demo_plan(result):
    return f"```text\n{result['plan']}\n```"


def plan(result):
    """The rows of a plan that inform: one for each axis, and a dense one."""
    *head, total, saved = result["plan"].splitlines()
    header, rows, kept = head[:2], head[2:], {}
    for row in rows:
        leaf, _, _, axis, *_ = row.split()
        if not leaf.endswith(("bias", "scale")):
            kept.setdefault(axis, row)
    return "\n".join(("```text", *header, *kept.values(), "...", total, saved, "```"))


def models(result):
    rows = [row[:3] for row in result["rows"]]
    return (
        "Weights planned and uses run compressed, in small models with the structure of public "
        "ones (`python benchmarks/models.py`; "
        f"{where(result)}):\n\n" + tabulate.tabulate(rows, result["header"][:3], tablefmt="github")
    )


def masks(result):
    return (
        "The time of a mask over that of reading the same weights once and writing a mask "
        f"(`abs(w) > 0.5`), medians of {result['rounds']} rounds in turns, 4096 x 4096 (`python "
        f"benchmarks/masks.py`; {where(result)}).\n\n"
        + tabulate.tabulate(result["rows"], result["header"], tablefmt="github", floatfmt=".2f")
    )


def mask_peers(result):
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        "The same ratio for what else computes such masks (`python benchmarks/mask_peers.py`, "
        f"medians of {result['rounds']} rounds; {versions}; {where(result)}).\n\n"
        + tabulate.tabulate(result["rows"], result["header"], tablefmt="github", floatfmt=".1f")
    )


def quality(result):
    lines = [
        f"- [{name}](benchmarks/results/quality/{name}.png): {line}"
        for name, line in result["findings"]
    ]
    mean, spread = result["dense"]
    return (
        f"Bits per character above those of the dense model, {mean:.3f} ± {spread:.3f}: means ± "
        f"standard deviations over seeds, paired by seed ({result['runs']} runs, "
        f"{result['core_hours']:.1f} hours of one core; `python -m benchmarks.quality`; Python "
        f"{result['python']}, {where(result)}).\n\n"
        + tabulate.tabulate(
            result["rows"], result["header"], tablefmt="github", disable_numparse=True
        )
        + "\n\n![Recipes by sparsity](benchmarks/results/quality/decaying.png)\n\n"
        "The papers' findings, with p of paired t-tests; each name is its plot:\n\n"
        + "\n".join(lines)
    )


def gpu_verdicts(result):
    wrong = {one["kernel"] for one in result["wrong"]}
    verdicts = {
        kernel: "does not run here" if "why" in one else "right" if one["right"] else "WRONG"
        for kernel, one in result["checks"].items()
    }
    right = [
        f"`{kernel}` {'WRONG' if kernel in wrong else verdict}"
        for kernel, verdict in verdicts.items()
    ]
    return (
        f"{', '.join(right)} ({result['device']}, jax {result['jax']}, {result['date']}; "
        "`python benchmarks/gpu.py`)"
    )


def gpu(result, name):
    parts = [f"Checked with every operand, integers and random numbers: {gpu_verdicts(result)}."]
    if rows := gpu_variants(result["variants"]):
        parts.append("The fastest of a few configurations against jax's dense product in bfloat16:")
        parts.append(tabulate.tabulate(rows, "keys", tablefmt="github", disable_numparse=True))
    if timings := [one for one in result["timings"] if "over jax dense" in one]:
        parts += [
            "How many times as fast as that product the fastest kernel is in its default "
            f"configuration, by the rows of x ({len(result['left_out'])} left out when the time "
            "was up):",
            gpu_ratios(timings),
            f"![Ratio to the dense product by rows](benchmarks/results/{name}.png)",
        ]
    return "\n\n".join(parts)


def gpu_variants(variants):
    rows = []
    for label, configs in variants.items():
        kernel, product = label.split(", ")
        times = {one["config"]: one["microseconds"] for one in configs if "microseconds" in one}
        dense = times.pop("jax dense")
        best = min(times, key=times.get)
        options = ", ".join(f"{key} {value}" for key, value in ast.literal_eval(best).items())
        rows.append(
            {
                "rows x M x K": product,
                "kernel": f"`{kernel}`, {options}",
                "µs": f"{times[best]:.1f}",
                "dense, µs": f"{dense:.1f}",
                "times as fast": f"{dense / times[best]:.2f}",
            }
        )
    return rows


def gpu_ratios(timings):
    rows = sorted({one["rows"] for one in timings})
    ratios = {(one["shape"], one["rows"]): f"{one['over jax dense']:.2f}" for one in timings}
    shapes = {one["shape"]: f"{one['M']} x {one['K']}" for one in timings}
    table = [
        [shape, sizes, *(ratios.get((shape, n), "") for n in rows)]
        for shape, sizes in shapes.items()
    ]
    return tabulate.tabulate(
        table, ["shape", "M x K", *rows], tablefmt="github", disable_numparse=True
    )


def gpu_summary(result, _):
    speeds = ", ".join(
        f"{row['times as fast']} times at {row['rows x M x K']}"
        for row in gpu_variants(result["variants"])
    )
    return (
        f"{gpu_verdicts(result)}. Rate over that of jax's dense product in bfloat16, by "
        f"rows x M x K: {speeds}."
    )


def gpus(one=gpu):
    """A part for each measured device, or a sentence if there is none."""
    results = sorted(timing.RESULTS.glob("NVIDIA*.json"))
    return (
        "\n\n".join(one(json.loads(path.read_text()), path.stem) for path in results)
        or "**The kernels have not run on a GPU yet and no speed is measured.**"
    )


def written(name, table):
    return table(json.loads((timing.RESULTS / f"{name}.json").read_text()))


TABLES = {
    "quality": lambda: written("quality/findings", quality),
    "masks": lambda: written("masks", masks),
    "mask_peers": lambda: written("mask_peers", mask_peers),
    "models": lambda: written("models", models),
    "plan": lambda: written("char_lm", plan),
    "demo_plan": lambda: written("char_lm", demo_plan),
    "char_lm": lambda: written("char_lm", char_lm),
    "smollm": lambda: written("smollm", smollm),
    "permutation": lambda: written("permutation", permutation),
    "train_step": lambda: written("train_step", train_step),
    "gpu": gpus,
    "gpu_summary": lambda: gpus(gpu_summary),
}


def filled(text, page=PAGES[0]):
    """A page with every block between `<!-- name -->` and `<!-- end -->` replaced."""
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)

    def block(match):
        table = TABLES[match[1]]().replace("](benchmarks/", f"]({up}benchmarks/")
        return f"<!-- {match[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(), page))
