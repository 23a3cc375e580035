"""Worker processes, one pinned to each core.

Two of them do 1.7 times as much work as one process with two threads.
"""

import multiprocessing
import os
import queue
import signal
import time
import traceback

from benchmarks.quality import train

SINGLE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def run(jobs, scale, workers, deadline, progress):
    """Runs (cell, seeds) in order; yields (cell, seed, record) of finished runs.

    Args:
      jobs: a list of (cell, seeds).
      scale: the sizes.
      workers: the number of processes; only this one if seeds run together.
      deadline: the time after which no further run starts.
      progress: called with the number of new steps.
    """
    if scale.together:
        for cell, seeds in jobs:
            yield from timed(cell, seeds, scale, deadline, progress)
        return
    workers = min(workers, len(jobs))
    context = multiprocessing.get_context("spawn")
    waiting, results = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * workers]:
        waiting.put(job)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pool = [
        context.Process(
            target=work,
            args=(cores[i % len(cores)] if cores else None, scale, waiting, results, deadline),
            daemon=True,
        )
        for i in range(workers)
    ]
    for process in pool:
        process.start()
    try:
        while workers:
            try:
                result = results.get(timeout=10)
            except queue.Empty:
                if any(process.exitcode for process in pool):
                    raise RuntimeError(
                        "a worker was killed; start again to go on with the runs that are missing"
                    ) from None
                continue
            if isinstance(result, str):
                raise RuntimeError(f"a worker failed:\n{result}")
            if result is None:
                workers -= 1
            elif isinstance(result, int):
                progress(result)
            else:
                yield result
    finally:
        for process in pool:
            process.terminate()


def work(core, scale, waiting, results, deadline):
    """A worker: takes jobs until none are left, time is up, or its parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if core is not None:
        os.sched_setaffinity(0, {core})
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} {SINGLE_THREAD}"  # read at jax's first array
    )
    try:
        for cell, seeds in iter(waiting.get, None):
            for result in timed(cell, seeds, scale, deadline, results.put):
                results.put(result)
    except BaseException:
        results.put(traceback.format_exc())
    results.put(None)


def timed(cell, seeds, scale, deadline, progress):
    """Yields (cell, seed, record) until the deadline, with the seconds of the run in the record."""
    parent, start = multiprocessing.parent_process(), time.time()
    if start > deadline:
        return
    for seed, record in train.train(cell, seeds, scale, progress):
        yield cell, seed, {**record, "seconds": round(time.time() - start, 1)}
        start = time.time()
        if start > deadline or (parent and not parent.is_alive()):
            return
