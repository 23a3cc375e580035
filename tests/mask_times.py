"""Prints, as JSON, the CPU time of masks relative to reading the weights once.

The format is `{axis and dtype: {pattern: ratio}}`, medians of rounds in turns. Arguments: the
patterns. It is its own program, because the flags that make the tests compile faster make the
compiled programs slower.
"""

import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import masks
import numpy as np
import timing

if __name__ == "__main__":  # starts the process again
    timing.with_warm_heap()


def ratios(axis, dtype, patterns, rounds=25):
    w = masks.weights((4096, 4096), dtype)
    calls = {name: masks.mask(masks.nm(name, axis), w) for name in patterns}
    calls = {name: lambda f=f: f(w) for name, f in {"stream": masks.stream, **calls}.items()}
    # CPU time, since other programs run at the same time
    seconds = timing.in_turns(calls, rounds, clock=time.process_time)
    base = np.array(seconds.pop("stream"))
    return {name: float(np.median(np.array(each) / base)) for name, each in seconds.items()}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"axis {axis} {dtype}": ratios(axis, dtype, sys.argv[1:])
                for axis in (0, 1)
                for dtype in masks.DTYPES
            }
        )
    )
