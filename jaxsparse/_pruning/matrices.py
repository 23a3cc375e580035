"""Weights as matrices, and the inputs of their products as rows."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._plan.pattern import Pattern, axes_in
from jaxsparse._program.flow import Atom, Origin

__all__ = ["Arrangement", "HiddenError", "Rows", "arranged", "is_part", "rows", "spread"]


class HiddenError(Exception):
    """Raised where a product does not show the inputs of a weight; the message says why."""


class Arrangement(NamedTuple):
    """How a weight becomes a matrix `[*stack, M, K]`.

    Attributes:
      cut: the position along each axis that was cut out; None for the others.
      stack: the other axes over separate weights.
      outputs: the other axes of outputs.
      contracted: the other axes that the product sums over, ending with that of the pattern.
    """

    cut: tuple[int | None, ...]
    stack: tuple[int, ...]
    outputs: tuple[int, ...]
    contracted: tuple[int, ...]

    @property
    def part(self) -> tuple:
        """The index of the part of the weight that is not cut off."""
        return tuple(slice(None) if i is None else i for i in self.cut)

    @property
    def order(self) -> list[int]:
        """The order of the axes of that part in the matrix."""
        left = [axis for axis, i in enumerate(self.cut) if i is None]
        return [left.index(axis) for axis in (*self.stack, *self.outputs, *self.contracted)]


class Rows(NamedTuple):
    """How an input becomes rows `[*stack, R, K]`.

    Attributes:
      stack: its axes that run over separate weights.
      summed: its axes that the product sums over.
      sizes: the sizes that those are split into.
      order: the order of the split axes in K.
    """

    stack: tuple[int, ...]
    summed: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def of(self, x: jax.Array) -> jax.Array:
        """The rows of an input."""
        free = [axis for axis in range(x.ndim) if axis not in (*self.stack, *self.summed)]
        x = x.transpose(*self.stack, *free, *self.summed)
        first = len(self.stack)
        x = x.reshape(*x.shape[:first], -1, *self.sizes)
        x = x.transpose(*range(first + 1), *(first + 1 + i for i in self.order))
        return x.reshape(*x.shape[: first + 1], -1)


def arranged(
    origin: Origin,
    shape: tuple[int, ...],
    pattern: Pattern,
    cut: Sequence[int | None],
    summed: Sequence[int],
    batch: Sequence[int],
) -> Arrangement:
    """The arrangement of a weight under a pattern, given how a product uses it.

    Args:
      origin: where the elements of the weight are in the operand of the product.
      shape: the shape of the weight.
      pattern: its pattern.
      cut: the position along each axis of the weight that was cut out; None for the others.
      summed: the axes of the operand that the product sums over.
      batch: those that it batches over.

    Raises:
      HiddenError: the operand does not run over whole axes of the weight where it is summed.
    """
    axes = axes_in(pattern, len(shape))
    over = {axis for place in summed for axis in origin.places(place)}
    stack = {axis for place in batch for axis in origin.places(place)}
    sizes = dict.fromkeys(over, 1)
    for place in summed:
        for atom in origin.axes[place]:
            if atom.axis in over:
                sizes[atom.axis] *= atom.size
    if over & origin.varies:
        raise HiddenError("it is combined with values that vary along the summed axis")
    if over & origin.hidden or any(sizes[axis] != shape[axis] for axis in over):
        raise HiddenError("it is reshaped or cut along the axis that its product sums over")
    if any(len(origin.places(place)) > 1 for place in batch):
        raise HiddenError("its product batches over several of its axes at once")
    first, second = [*axes, None, None][:2]
    if first is not None and first not in over:
        raise HiddenError(
            f"its product sums over {sorted(over)}, but its pattern runs along axis {first}"
        )
    left = [axis for axis, i in enumerate(cut) if i is None]
    outputs = [axis for axis in left if axis not in over and axis not in stack]
    if second is not None and second not in outputs:
        raise HiddenError(f"axis {second} of its pattern is not an output of its product")
    return Arrangement(
        tuple(cut),
        tuple(axis for axis in left if axis in stack),
        tuple(sorted(outputs, key=lambda axis: (axis == second, axis))),
        tuple(sorted(over, key=lambda axis: (axis == first, axis))),
    )


def is_part(origin: Origin, shape: tuple[int, ...], cut: Sequence[int | None]) -> bool:
    """Whether the operand of a product lacks outputs of what is left of a weight after a cut."""
    sizes = [atom.size for atoms in origin.axes for atom in atoms if atom.axis >= 0]
    left = [n for n, i in zip(shape, cut, strict=True) if i is None]
    return math.prod(sizes) < math.prod(left)


def rows(origin: Origin, arrangement: Arrangement, summed: Any, batch: Any) -> Rows:
    """How the input of a product becomes rows in the order of the matrix of its weight."""
    atoms = [atom for place in summed[0] for atom in origin.axes[place] or (Atom(-1, 1, 1),)]
    place_of = {
        axis: x_axis for place, x_axis in zip(*batch, strict=True) for axis in origin.places(place)
    }
    places = {axis: i for i, axis in enumerate(arrangement.contracted)}
    return Rows(
        tuple(place_of[axis] for axis in arrangement.stack),
        tuple(summed[1]),
        tuple(atom.size for atom in atoms),
        tuple(
            sorted(
                range(len(atoms)),
                key=lambda i: (places.get(atoms[i].axis, -1), -atoms[i].stride),
            )
        ),
    )


def spread(x: jax.Array, sizes: jax.Array, axis: int) -> jax.Array:
    """One copy of x for each group of `sizes` rows along an axis, with 0 in place of other rows."""
    groups = jnp.repeat(jnp.arange(sizes.size), sizes, total_repeat_length=x.shape[axis])
    inside = groups[None] == jnp.arange(sizes.size)[:, None]
    shape = [sizes.size, *(n if i == axis else 1 for i, n in enumerate(x.shape))]
    return jnp.where(inside.reshape(shape), x[None], jnp.zeros((), x.dtype))
