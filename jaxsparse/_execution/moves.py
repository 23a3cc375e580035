"""What the equations of a program do to compressed weights: move, cut, scale or cast them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._execution.weights import (
    UnfitError,
    Weight,
    closed,
    cut_along,
    opened,
    ordered,
    place_of,
    split,
)
from jaxsparse._packed.sparse24 import Sparse24
from jaxsparse._program.flow import Atom, Value, constant_axes
from jaxsparse._program.walk import bind

__all__ = ["move"]

_VIEWS = {
    "broadcast_in_dim",
    "expand_dims",
    "mesh_cast",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
_OF_VALUES = {"copy", "copy_p", "name", "reduce_precision", "stop_gradient"}


def move(eqn: Any, operands: list, values: list[Value], result_values: list[Value]) -> list:
    """The results of an equation that moves, cuts or scales weights.

    Raises `UnfitError` if it does something else.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [var.aval.shape for var in eqn.outvars]
    is_weight = [isinstance(operand, Weight) for operand in operands]
    if any(0 in shape for shape in shapes):
        raise UnfitError("empty")
    if name == "optimization_barrier":
        arrays, rebuild = split(operands)
        return rebuild(lax.optimization_barrier(arrays))
    if name in ("mul", "div") and sum(is_weight) == 1:
        return [_scaled(name, is_weight.index(True), operands, values, result_values[0], shapes[0])]
    if name == "concatenate" and all(is_weight):
        return [_concatenated(operands, params["dimension"], shapes[0])]
    if not is_weight[0] or not result_values[0].origins:
        raise UnfitError(f"used by {name}")
    w: Weight = operands[0]
    if name in _VIEWS:
        return [w.viewed(result_values[0].origins[0], shapes[0])]
    if name in _OF_VALUES:
        (of_dtype,) = bind(eqn, [w.leaf.values if w.leaf.scale is None else w.leaf.scale])
        return [dataclasses.replace(w, leaf=_with(w.leaf, of_dtype))]
    if name == "convert_element_type":
        dtype, leaf = jnp.dtype(params["new_dtype"]), w.leaf
        if not jnp.issubdtype(dtype, jnp.floating) or (
            leaf.scale is not None and dtype.itemsize < 2
        ):
            raise UnfitError(f"cast to {dtype}")
        if leaf.scale is not None:
            leaf = _with(leaf, leaf.scale.astype(dtype))
        else:
            leaf = leaf if dtype.itemsize == w.dtype.itemsize else leaf.with_layout("canonical")
            leaf = _with(leaf, leaf.values.astype(dtype))
        return [dataclasses.replace(w, leaf=leaf)]
    if name == "slice":
        starts, strides = params["start_indices"], params["strides"] or (1,) * len(w.shape)
        cuts = list(zip(starts, params["limit_indices"], strides, strict=True))
        return [
            _parts(
                w,
                result_values[0],
                shapes[0],
                lambda a, place, axis: lax.slice_in_dim(a, *cuts[axis], axis=place),
            )
        ]
    if name == "dynamic_slice":
        starts, sizes = operands[1:], params["slice_sizes"]
        return [
            _parts(
                w,
                result_values[0],
                shapes[0],
                lambda a, place, axis: _dynamic_slice(a, starts[axis], sizes[axis], place),
            )
        ]
    if name == "unstack":
        axis = params["axis"]
        return [
            _parts(
                w,
                value,
                shape,
                lambda a, place, _, i=i: lax.slice_in_dim(a, i, i + 1, axis=place),
                unstacked=axis,
            )
            for i, (value, shape) in enumerate(zip(result_values, shapes, strict=True))
        ]
    if name == "split":
        ends = [sum(params["sizes"][: i + 1]) for i in range(len(shapes))]
        return [
            _parts(
                w,
                value,
                shape,
                lambda a, place, axis, end=end, shape=shape: lax.slice_in_dim(
                    a, end - shape[axis], end, axis=place
                ),
            )
            for value, shape, end in zip(result_values, shapes, ends, strict=True)
        ]
    raise UnfitError(f"used by {name}")


def _with(leaf: Sparse24, array: jax.Array) -> Sparse24:
    """The weight with another scale, or with other values if it has no scale."""
    if leaf.scale is None:
        return dataclasses.replace(leaf, values=array)
    return dataclasses.replace(leaf, scale=array)


def _dynamic_slice(a: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """Slices an array along one axis; `start` is not negative, as the program ensures."""
    starts = [start if i == axis else jnp.zeros_like(start) for i in range(a.ndim)]
    sizes = [size if i == axis else n for i, n in enumerate(a.shape)]
    return lax.dynamic_slice(a, starts, sizes, allow_negative_indices=False)


def _parts(
    w: Weight,
    value: Value,
    shape: tuple[int, ...],
    cut: Callable,
    unstacked: int | None = None,
) -> Weight:
    """Cuts a weight by `cut(array, place, axis)` along the axes whose size changes.

    The axis `unstacked` is cut to size 1 and left out of `shape`.
    """
    leaf = w.leaf
    sizes = shape if unstacked is None else (*shape[:unstacked], 1, *shape[unstacked:])
    for axis, (before, after) in enumerate(zip(w.shape, sizes, strict=True)):
        if before == after:
            continue
        dense_axis = w.axis(axis)
        if dense_axis is None:
            raise UnfitError("cut along several of its axes at once")
        leaf = cut_along(leaf, dense_axis, lambda a, place, axis=axis: cut(a, place, axis))
    return w.viewed(value.origins[0], shape, leaf)


def _concatenated(parts: list[Weight], dimension: int, shape: tuple[int, ...]) -> Weight:
    first = parts[0]
    axis = first.axis(dimension)
    kinds = [part.leaf.kinds for part in parts]
    alike = all(
        part.leaf.contracting == first.leaf.contracting
        and part.dtype == first.dtype
        and part.leaf.activations == first.leaf.activations
        for part in parts
    )
    views = {
        tuple(tuple(atom.axis for atom in atoms) for atoms in part.origin.axes) for part in parts
    }
    if (
        axis is None
        or len(set(kinds)) != 1
        or kinds[0][axis] != "O"
        or not alike
        or len(views) != 1
    ):
        raise UnfitError("not concatenated along an output axis")
    place = place_of(kinds[0], axis)
    arrays = [
        jnp.concatenate(pair, place)
        for pair in zip(*(opened(part.leaf) for part in parts), strict=True)
    ]
    leaf = closed(first.leaf, arrays, kinds[0])
    axes = tuple(
        (Atom(axis, 1, shape[dimension]),) if i == dimension else atoms
        for i, atoms in enumerate(first.origin.axes)
    )
    return Weight(
        leaf,
        first.origin._replace(axes=axes),
        shape,
        tuple(source for part in parts for source in part.sources),
    )


def _scaled(
    name: str, side: int, operands: list, values: list[Value], result_values: Value, shape: Any
) -> Weight:
    """The weight multiplied or divided by values that are constant along the contracted axes."""
    w, other = operands[side], operands[1 - side]
    if name == "div" and side == 1:
        raise UnfitError("used as a divisor")
    if w.shape != tuple(shape):
        raise UnfitError("broadcast while it is scaled")
    if jnp.ndim(other) == 0:
        scale = other
    else:
        contracted = {place for place in range(len(shape)) if "K" in w.kinds(place)}
        if not contracted <= constant_axes(values[1 - side], jnp.shape(other), shape):
            raise UnfitError("scaled by values that vary along the axis that the product sums over")
        if any(w.kinds(place) != {"K"} for place in contracted):
            raise UnfitError("scaled while its contracted axes are merged with others")
        kept = [place for place in range(len(shape)) if place not in contracted]
        scale = jnp.broadcast_to(other, shape)[
            tuple(0 if place in contracted else slice(None) for place in range(len(shape)))
        ]
        scale = ordered(scale, w.atoms(kept), w.leaf)
    leaf, scaled = w.leaf, w.leaf.values
    if leaf.scale is not None:  # scales are not negative: the signs go to the values
        scale = jnp.squeeze(scale, -1) if jnp.ndim(scale) else jnp.asarray(scale)
        signs = jnp.sign(scale).astype(jnp.int8)
        signed = leaf.values * (signs[..., None] if signs.ndim else signs)
        leaf, scaled, scale = dataclasses.replace(leaf, values=signed), leaf.scale, jnp.abs(scale)
    scaled = scaled * scale if name == "mul" else scaled / scale
    return dataclasses.replace(w, leaf=_with(leaf, scaled))
