"""Runs a Python program in its own process."""

import os
import subprocess
import sys

# set by conftest.py for the tests themselves
OWN = ("NPROC", "XLA_FLAGS")


def output(*command, timeout=500, **environment):
    """The output of `python *command`, without the settings of the tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN}
    command = [str(part) for part in command]
    run = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        timeout=timeout,
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {run.stderr[-3000:]}")
    return run.stdout
