"""Divides a product with a compressed weight among the devices of a mesh.

Left to itself, the compiler decompresses a weight before it sends it to other devices. This rule
sends values and metadata, and each device multiplies its share, by a kernel where one runs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["devices_needed", "divided"]

# outputs and inputs of the dense weight that one element along each axis of the metadata covers
COVERED = {"canonical": (1, 16), "mma16": (128, 128)}


class _Division(NamedTuple):
    """The axes of the mesh along which each axis of a product is divided."""

    stack: tuple[tuple[str, ...], ...]
    rows: tuple[str, ...]
    features: tuple[str, ...]
    contraction: tuple[str, ...]


@functools.cache
def devices_needed() -> Any:
    """A program for the parameters of a primitive, so that JAX tells its lowering the devices."""

    @custom_partitioning
    def identity(x):
        return x

    identity.def_partition(
        lambda mesh, arguments, result: (mesh, lambda x: x, result.sharding, (result.sharding,)),
        sharding_rule="i -> i",
    )
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((1,), "float32")).jaxpr


def divided(
    whole: Callable,
    share: Callable,
    *operands: Any,
    transposed: bool,
    layout: str,
    sums: bool,
) -> Any:
    """A product under automatic partitioning.

    Args:
      whole: the product, from its operands, on one device.
      share: the product of one device, from the axes of the mesh over which it is to be summed, and
        its operands.
      *operands: x `[*stack, N, K]`, values `[*stack, M, K/2]`, metadata and an optional bias
        `[*stack, M]`; x is `[*stack, N, M]` if `transposed`.
      transposed: whether the product is with the transpose of the weight.
      layout: that of the metadata.
      sums: whether the contraction may be divided.
    """
    stack = operands[0].ndim - 2

    def partition(mesh, arguments, result):
        division = _division(mesh, arguments, result, transposed, layout, sums)
        *inner, out = (
            NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))
            for spec in _specs(division, arguments, transposed)
        )
        return mesh, functools.partial(share, division.contraction), out, tuple(inner)

    product = custom_partitioning(whole)
    product.def_partition(partition, sharding_rule=_rule(stack, len(operands), transposed, layout))
    return product(*operands)


def _rule(stack, count, transposed, layout):
    """The axes that operands and result share, for the compiler's propagation of shardings."""
    m = "contraction" if transposed else "features"
    # along the last axis, values and metadata are shorter than the weight: other axes
    metadata = [m, "words"] if layout == "canonical" else ["row_tiles", "column_tiles", "lanes"]
    axes = [["rows", "contraction"], [m, "values"], metadata, [m]][:count]
    batch = [f"stack{i}" for i in range(stack)]
    *inner, out = (" ".join([*batch, *names]) for names in (*axes, ["rows", "features"]))
    return f"{', '.join(inner)} -> {out}"


def _division(mesh, arguments, result, transposed, layout, sums):
    """The division that the shardings ask for; that of the result comes first."""
    x, values, out = (_mesh_axes(one) for one in (*arguments[:2], result))
    *stack, m, half = arguments[1].shape
    covered_m, covered_k = COVERED[layout]
    wide, summed = (values[-2], m, covered_m), (values[-1], 2 * half, covered_k)
    if transposed:
        wide, summed = summed, wide
    used: set[str] = set()

    def claim(candidates, size, covered=1):
        for axes in candidates:
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if axes and not used & set(axes) and size % (parts * covered) == 0:
                used.update(axes)
                return axes
        return ()

    along_stack = tuple(claim([out[i], values[i], x[i]], size) for i, size in enumerate(stack))
    rows = claim([out[-2]], arguments[0].shape[-2])
    features = claim([out[-1]], *wide[1:])
    rows = rows or claim([x[-2]], arguments[0].shape[-2])
    features = features or claim([wide[0]], *wide[1:])
    contraction = claim([x[-1], summed[0]], *summed[1:]) if sums else ()
    return _Division(along_stack, rows, features, contraction)


def _mesh_axes(argument):
    """The axes of the mesh along each axis of an argument."""
    entries = tuple(argument.sharding.spec)
    entries += (None,) * (len(argument.shape) - len(entries))
    return [
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    ]


def _specs(division, arguments, transposed):
    """The axes of the mesh along each axis of the operands and of the result."""
    stack, rows, features, contraction = division
    m, k = (contraction, features) if transposed else (features, contraction)
    lanes = ((),) * (len(arguments[2].shape) - len(stack) - 2)
    specs = [(rows, contraction), (m, k), (m, k, *lanes), (m,)][: len(arguments)]
    return [(*stack, *spec) for spec in (*specs, (rows, features))]
