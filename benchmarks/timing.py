"""Shared by the benchmarks: timing candidates in turns, and a record of the environment."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time

import jax
import numpy as np
import tqdm

RESULTS = pathlib.Path(__file__).parent / "results"

# by default glibc returns large blocks to the system, and the next allocation pays for the page
# faults
HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "536870912",
}


def with_warm_heap():
    """Restarts the program with a heap that keeps its memory, unless it already has one."""
    if any(os.environ.get(name) != value for name, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | HEAP)


def in_turns(calls, rounds, label="", clock=time.perf_counter):
    """The seconds of each call in `{name: function without arguments}`, `[rounds]` each.

    All of them are called once in each round.
    """
    seconds = {name: [] for name in calls}
    for number in tqdm.trange(rounds + 2, desc=label, leave=False, mininterval=1):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            if number >= 2:
                seconds[name].append(clock() - start)
    return seconds


def environment():
    return {
        "date": datetime.date.today().isoformat(),
        "device": str(jax.devices()[0].device_kind),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions("jax", "jaxlib", "flax", "optax"),
    }


def versions(*packages):
    """The versions of those packages that are installed."""
    installed = {name for name in packages if importlib.util.find_spec(name)}
    return {name: importlib.metadata.version(name) for name in packages if name in installed}


def _processor():
    info = pathlib.Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def save(name, folder=RESULTS, /, **content):
    print(f"\nWritten to {write(name, folder, **content)}")


def write(name, folder=RESULTS, /, **content):
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(
        json.dumps(
            {**environment(), **content}, indent=1, default=lambda value: np.asarray(value).tolist()
        )
        + "\n"
    )
    unfinished.replace(path)
    return path
