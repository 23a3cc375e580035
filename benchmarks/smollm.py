"""Runs the example as `make smollm` does, and keeps its table and plot.

python benchmarks/smollm.py [--gguf FILE]
"""

import resource
import sys
import time

import timing

from jaxsparse.examples import smollm

if __name__ == "__main__":
    start = time.perf_counter()
    header, rows = smollm.main([*sys.argv[1:], "--plot", str(timing.RESULTS / "smollm.png")])
    timing.save(
        "smollm",
        seconds=time.perf_counter() - start,
        gigabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        header=header,
        rows=rows,
    )
