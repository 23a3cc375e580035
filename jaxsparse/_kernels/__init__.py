"""Kernels for 2:4 products, one file each: where each can run, and which one runs. Nothing here
imports Pallas.
"""

import jax
import jax.numpy as jnp

__all__ = ["ACTIVATIONS", "KERNELS", "misfit", "preferred", "unavailable"]

ACTIVATIONS = {  # all by one tanh, which every kernel has
    None: lambda x: x,
    "relu": lambda x: jnp.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "silu": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.5 * x)),
}

KERNELS = ("hopper", "ampere", "decode")

# multiples of K and M up to which a kernel pads its operands, at every call
_PADDED = {"hopper": (16, 8), "ampere": (64, 128), "decode": (16, 1)}

# What is measured faster than the dense product, as `benchmarks/gpu.py` prints it, with the result
# file it printed it from: (compute capabilities, kernel, rows of x from, to, least output features
# times contraction, least of either). Nothing is yet.
_PREFERENCES: tuple[tuple[tuple[tuple[int, int], ...], str, int, int, int, int], ...] = ()


def misfit(name: str, n, dtype) -> str | None:
    """Why a kernel cannot compute a product on any device, or None.

    Args:
      name: one of `KERNELS`.
      n: rows of x.
      dtype: of x and of the values.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and these are {dtype}"
    if not 0 < n <= (64 if name == "decode" else 1 << 31):
        return (
            f"it takes 1 to 64 rows, and these are {n}" if name == "decode" else "there are no rows"
        )
    return None


def unavailable(name: str, capability: tuple[int, int] | None) -> str | None:
    """Why a kernel cannot run on a CUDA device of a compute capability, or None; `capability` is
    None where it is not known.
    """
    if capability is None:
        return "the compute capability is unknown, as when lowering for export or for an absent GPU"
    has = f"and this device has {capability[0]}.{capability[1]}"
    if name == "hopper" and capability != (9, 0):
        return f"it needs compute capability 9.0, {has}"
    if name == "ampere" and not (8, 0) <= capability < (9, 0):
        return f"it needs compute capability 8.0 to 8.9, {has}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {has}"
    if capability < (9, 0) and jax.__version_info__ < (0, 11):
        major, minor = capability
        return (
            f"compiling it for compute capability {major}.{minor} needs jax 0.11, "
            f"and this is {jax.__version__}"
        )
    return None


def preferred(n, m: int, k: int, dtype, capability: tuple[int, int] | None) -> str:
    """The kernel that is measured to beat the dense product on a device, or `"dense"`; none that
    would have to copy the weight or y.
    """
    if capability is None:
        return "dense"
    for capabilities, name, least_n, most_n, least_weights, least_side in _PREFERENCES:
        wins = (
            capability in capabilities
            and least_n <= n <= most_n
            and m * k >= least_weights
            and min(m, k) >= least_side
        )
        copies = k % _PADDED[name][0] or m % _PADDED[name][1]
        if (
            wins
            and not copies
            and misfit(name, n, dtype) is None
            and unavailable(name, capability) is None
        ):
            return name
    return "dense"
