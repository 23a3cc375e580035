"""Runs the example as `make demo` does, and keeps its table and plot.

python benchmarks/char_lm.py
"""

import argparse
import time

import timing

from jaxsparse.examples import char_lm

if __name__ == "__main__":
    timing.with_warm_heap()  # as the Makefile does
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=char_lm.STEPS)
    args = parser.parse_args()
    start = time.perf_counter()
    plan, header, rows = char_lm.main(
        ["--steps", str(args.steps), "--plot", str(timing.RESULTS / "char_lm.png")]
    )
    timing.save(
        "char_lm",
        steps=args.steps,
        seconds=time.perf_counter() - start,
        plan=str(plan),
        header=header,
        rows=rows,
    )
