"""Writes the tables of README from the committed results, so that no number there is typed by hand.

python benchmarks/readme.py
"""

import json
import pathlib
import re

import tabulate

ROOT = pathlib.Path(__file__).parent.parent


def where(result):
    return f"{result['processor'] or result['device']}, {result['cores']} cores, jax {result['jax']}, {result['date']}"


def train_step(result):
    return (
        f"A training step of a transformer of {result['parameters'] / 1e6:.1f} million parameters with new masks every step, against the "
        f"dense step: medians of {result['rounds']} rounds in which the runs take turns (`python benchmarks/train_step.py`; "
        f"{where(result)}).\n\n"
        + tabulate.tabulate(result["rows"], result["header"], tablefmt="github", floatfmt=("", ".1f", ".3f", ".2f", ".1f"))
    )


def char_lm(result):
    return (
        f"The table of `make demo` after {result['steps']} steps ({where(result)}, {result['seconds']:.0f} seconds in all):\n\n"
        + tabulate.tabulate(result["rows"], result["header"], tablefmt="github", floatfmt=("", ".3f", ".3f", ".2f", ".1f", ".1f"))
    )


def plan(result):
    return f"```\n{result['plan']}\n```"


def masks(result):
    return (
        f"The time of a mask over that of reading the same weights once and writing a mask (`abs(w) > 0.5`), medians of {result['rounds']} "
        f"rounds in turns, 4096 x 4096 (`python benchmarks/masks.py`; {where(result)}).\n\n"
        + tabulate.tabulate(result["rows"], result["header"], tablefmt="github", floatfmt=".2f")
    )


def mask_peers(result):
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"The same ratio for what else computes such masks (`python benchmarks/mask_peers.py`, medians of {result['rounds']} rounds; "
        f"{versions}; {where(result)}).\n\n" + tabulate.tabulate(result["rows"], result["header"], tablefmt="github", floatfmt=".1f")
    )


TABLES = {
    "masks": ("masks", masks),
    "mask_peers": ("mask_peers", mask_peers),
    "plan": ("char_lm", plan),
    "char_lm": ("char_lm", char_lm),
    "train_step": ("train_step", train_step),
}


def filled(text):
    """The text with every block between `<!-- name -->` and `<!-- end -->` made anew."""

    def block(match):
        name, written = TABLES[match[1]]
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        return f"<!-- {match[1]} -->\n{written(result)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
