"""The table of kernels for 2:4 products, which holds everything that other modules need to know.

Nothing here imports Pallas. To add a kernel, write its file, with `Config` and `matmul`, and add a
row.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["ACTIVATIONS", "KERNELS", "Kernel", "may_run", "preferred"]

ACTIVATIONS = {  # each with a single tanh, which every kernel supports
    None: lambda x: x,
    "relu": lambda x: jnp.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "silu": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.5 * x)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel for `x @ w` with a compressed weight.

    Attributes:
      name: its name for users, and that of its file in this folder.
      least: the lowest compute capability that it runs on.
      below: the compute capability from which it no longer runs; None if there is no such limit.
      since: a compute capability, and the jax version that all lower ones need.
      dtypes: the dtypes of x and of the values, which must be equal.
      layout: the layout of the metadata.
      most_rows: the largest number of rows of x.
      multiples: the multiples of K and of M to which it pads its operands at every call.
      timed_rows: the range of rows in which `benchmarks/gpu.py` times it; outside, another kernel
        is meant to run.
      targets: the GPUs that the tests compile it for ahead of time.
      configs: configurations that only hardware can decide between, as fields of its `Config`, for
        the N, M and K at which `benchmarks/gpu.py` compares them.
    """

    name: str
    least: tuple[int, int]
    below: tuple[int, int] | None
    since: tuple[tuple[int, int], tuple[int, int]]
    dtypes: tuple[str, ...]
    layout: str
    most_rows: int
    multiples: tuple[int, int]
    timed_rows: tuple[int, int]
    targets: tuple[str, ...]
    configs: dict[tuple[int, int, int], tuple[dict[str, Any], ...]]

    @property
    def module(self) -> ModuleType:
        """The module with its `Config` and `matmul`."""
        return importlib.import_module(f"jaxsparse._kernels.{self.name}")

    def misfit(self, n: Any, dtype: Any) -> str | None:
        """Why it cannot compute a product of n rows on any device, or None."""
        if jnp.dtype(dtype).name not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)}, and these are {dtype}"
        if n < 1:
            return "there are no rows"
        if n > self.most_rows:
            return f"it takes 1 to {self.most_rows} rows, and these are {n}"
        return None

    def unavailable(self, capability: tuple[int, int] | None) -> str | None:
        """Why it cannot run on a CUDA device of a compute capability, if known, or None."""
        if capability is None:
            return "the compute capability is unknown, as when lowering for export or an absent GPU"
        major, minor = capability
        if capability < self.least or (self.below is not None and capability >= self.below):
            return f"it needs compute capability {self._range}, and this device has {major}.{minor}"
        old, version = self.since
        if capability < old and jax.__version_info__ < version:
            return (
                f"compiling it for compute capability {major}.{minor} needs jax "
                f"{'.'.join(map(str, version))}, and this is {jax.__version__}"
            )
        return None

    @property
    def _range(self) -> str:
        least = ".".join(map(str, self.least))
        if self.below is None:
            return f"{least} or later"
        if self.below == (self.least[0], self.least[1] + 1):
            return least
        return f"{least} to {self.below[0] - 1}.9"


_SIXTEEN = ("bfloat16", "float16")
_ASYNCHRONOUS_COPIES = ((9, 0), (0, 11))  # for GPUs before Hopper, available from jax 0.11

KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "hopper",
            least=(9, 0),
            below=(9, 1),
            since=_ASYNCHRONOUS_COPIES,
            dtypes=_SIXTEEN,
            layout="mma16",
            most_rows=1 << 31,
            multiples=(16, 8),
            timed_rows=(64, 1 << 31),
            targets=("h200",),
            configs={
                (8192, 8192, 8192): (
                    {"cluster": 2},
                    {"cluster": 1},
                    {"cluster": 2, "in_flight": 0},
                    {"cluster": 2, "stages": 4},
                    {"cluster": 2, "stripe": 16},
                ),
                (256, 4096, 4096): (
                    {"tile_n": 256, "cluster": 2},
                    {"tile_n": 128, "stages": 7},
                    {"tile_n": 64, "stages": 8},
                    {"tile_n": 32, "stages": 8},
                ),
            },
        ),
        Kernel(
            "ampere",
            least=(8, 0),
            below=(9, 0),
            since=_ASYNCHRONOUS_COPIES,
            dtypes=_SIXTEEN,
            layout="mma16",
            most_rows=1 << 31,
            multiples=(64, 128),
            timed_rows=(64, 1 << 31),
            targets=("a100",),
            configs={
                (4096, 4096, 4096): (
                    {"tile_m": 128, "stages": 3},
                    {"tile_m": 128, "stages": 4},
                    {"tile_m": 256, "stages": 3},
                    {"tile_m": 256, "stages": 4},
                )
            },
        ),
        Kernel(
            "decode",
            least=(8, 0),
            below=None,
            since=_ASYNCHRONOUS_COPIES,
            dtypes=_SIXTEEN,
            layout="mma16",
            most_rows=64,
            multiples=(16, 1),
            timed_rows=(1, 64),
            targets=("h200", "a100"),
            configs={
                (16, 14336, 4096): (
                    {"tile_m": 16, "unroll": 4, "warpgroups": 1},
                    {"tile_m": 32, "unroll": 2, "warpgroups": 2},
                    {"tile_m": 32, "unroll": 4, "warpgroups": 2},
                    {"tile_m": 64, "unroll": 2, "warpgroups": 2},
                ),
            },
        ),
    )
}

# Measured to be faster than the dense product, as printed by `benchmarks/gpu.py`, with the result
# file: (compute capabilities, kernel, fewest and most rows of x, least product of output features
# and contraction, least of either). Empty until more than a few
# products are measured.
_PREFERENCES: tuple[tuple[tuple[tuple[int, int], ...], str, int, int, int, int], ...] = ()


def may_run(implementation: str | None, layout: str) -> bool:
    """Whether a product may run on a kernel, which can then fuse the bias and the activation."""
    if implementation is None:
        return any(kernel.layout == layout for kernel in KERNELS.values())
    return implementation in KERNELS


def preferred(
    n: Any, m: int, k: int, dtype: Any, layout: str, capability: tuple[int, int] | None
) -> str:
    """The kernel that is measured to beat the dense product on a device, or `"dense"`.

    A kernel that would have to copy the weight, its metadata or the result is not chosen.
    """
    if capability is None:
        return "dense"
    for capabilities, name, least_n, most_n, least_weights, least_side in _PREFERENCES:
        kernel = KERNELS[name]
        measured = capability in capabilities and least_n <= n <= most_n
        large = m * k >= least_weights and min(m, k) >= least_side
        copies = k % kernel.multiples[0] or m % kernel.multiples[1] or layout != kernel.layout
        runs = kernel.misfit(n, dtype) is None and kernel.unavailable(capability) is None
        if measured and large and runs and not copies:
            return name
    return "dense"
