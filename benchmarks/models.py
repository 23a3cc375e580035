"""Plans the models of the tests' zoo and times them from compressed and from masked weights.

python benchmarks/models.py
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
import tabulate
import timing

timing.with_warm_heap()
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

from zoo import MODELS  # noqa: E402

import jaxsparse as js  # noqa: E402


def row(name, entry, rounds):
    """The row of the table for one model."""
    fn, params, args, *_ = entry.build()
    plan = js.plan(params, entry.rules, fn, *args)
    masks = js.magnitude_masks(params, plan)
    packed, masked = js.compress(params, masks, plan), js.effective_params(params, masks)
    sparse = js.sparsify(fn)
    uses = sparse.report(packed, *args).products
    compressed, dense = (
        jax.jit(one).lower(weights, *args).compile()
        for one, weights in ((sparse, packed), (fn, masked))
    )
    calls = {
        "compressed": lambda: compressed(packed, *args),
        "masked": lambda: dense(masked, *args),
    }
    seconds = timing.in_turns(calls, rounds, name)
    ratio = np.median(np.array(seconds["compressed"]) / np.array(seconds["masked"]))
    left = sorted({use.path for use in uses if use.reason})
    runs = sum(not use.reason for use in uses)
    return (
        name,
        f"{len(plan.sparse)} of {len(entry.planned)}",
        f"{runs} of {len(uses)}",
        ratio,
        ", ".join(left),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    rows = [row(name, entry, args.rounds) for name, entry in MODELS.items()]
    header = (
        "model",
        "weights planned",
        "uses that run compressed",
        "time over masked",
        "decompressed where used",
    )
    print(tabulate.tabulate(rows, header, floatfmt=".2f"))
    timing.save("models", rounds=args.rounds, header=header, rows=rows)


if __name__ == "__main__":
    main()
