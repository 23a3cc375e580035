"""Trains small models dense and by every recipe, and tests the findings of the papers.

python -m benchmarks.quality                 writes benchmarks/results/quality; finished runs
                                             are not repeated
python -m benchmarks.quality --minutes 60    stops in time, the most important runs first
python -m benchmarks.quality --gpu           a larger model, longer, all seeds at once
python -m benchmarks.quality --smoke         every step on tiny models, stored nowhere
python -m benchmarks.quality.findings        only the tables, tests and plots of stored runs
"""

import argparse
import os
import pathlib
import tempfile
import time

import tqdm

from benchmarks import timing
from benchmarks.quality import findings, pool, store
from benchmarks.quality.runs import CPU, GPU, RECIPES, TUNING_SEED, matrix, tiny, tuning


def missing(wanted, finished):
    """The jobs (cell, seeds) that are wanted, (cell, seeds), and not finished."""
    jobs, known = [], set(finished)
    for cell, seeds in wanted:
        left = [seed for seed in seeds if (cell, seed) not in known]
        known |= {(cell, seed) for seed in left}
        if left:
            jobs.append((cell, left))
    return jobs


def some(wanted):
    """The first entry of the matrix for every function of the library."""
    first = {}
    for entry in wanted:
        _, cell = entry
        first.setdefault(
            RECIPES[cell.recipe].function if cell.recipe in RECIPES else cell.recipe, entry
        )
    return first.values()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu", action="store_true", help="a larger model, longer, seeds under vmap"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models and few steps, in a temporary folder"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="after which no further run starts"
    )
    parser.add_argument("--out", type=pathlib.Path, help="the folder of runs, tables and plots")
    args = parser.parse_args(argv)
    deadline = time.time() + 60 * args.minutes
    scale = GPU if args.gpu else CPU
    scale = tiny(scale) if args.smoke else scale
    folder = args.out or (pathlib.Path(tempfile.mkdtemp()) if args.smoke else store.folder(scale))

    keep, records = store.Store(folder), store.read(folder)
    with tqdm.tqdm(unit="step", unit_scale=True, mininterval=1, smoothing=0.05) as bar:

        def run(stage, wanted):
            jobs = missing(wanted, records)
            bar.set_description(stage)
            bar.total = (bar.total or 0) + sum(cell.steps * len(seeds) for cell, seeds in jobs)
            for cell, seed, record in pool.run(jobs, scale, args.workers, deadline, bar.update):
                keep.add(cell, seed, record)
                records[cell, seed] = record
                bar.set_postfix_str(
                    f"{cell.pattern} {cell.recipe}: {record['bits']:.3f} bits", refresh=False
                )

        for stage, part in (("learning rates", 0), ("settings", 1)):
            cells = store.cells(scale, records)
            run(
                stage,
                [(cell, [TUNING_SEED]) for grid in tuning(cells)[part].values() for cell in grid],
            )
        wanted = matrix(store.cells(scale, records))
        run("tables", [(cell, scale.seeds) for _, cell in (some(wanted) if args.smoke else wanted)])
    findings.report(scale, folder)


if __name__ == "__main__":
    timing.with_warm_heap()
    main()
