"""Compressed weights on their way through a program: moved, cut and scaled as they are, and made
ready for a product.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._packed.matmul import sparse_matmul
from jaxsparse._packed.sparse24 import Sparse24, decompress
from jaxsparse._program.flow import Atom, Origin, Value, constant_axes, input_value
from jaxsparse._program.walk import bind

__all__ = ["Ready", "UnfitError", "Weight", "move", "operands", "ordered", "sliced", "split"]


class UnfitError(Exception):
    """A weight cannot stay compressed here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value of a program that is a compressed weight, perhaps with its axes in another order,
    merged or split.

    Attributes:
      leaf: the compressed weight.
      origin: for each axis of the value, the places of the dense weight that it runs over, all of
        them once.
      shape: the shape of the value.
      sources: the numbers of the arguments that it is made of.
    """

    leaf: Sparse24
    origin: Origin
    shape: tuple[int, ...]
    sources: tuple[int, ...]

    @classmethod
    def of(cls, leaf: Sparse24, source: int) -> "Weight":
        """An argument itself."""
        (origin,) = input_value(source, leaf.shape).origins
        return cls(leaf, _without_ones(origin), leaf.shape, (source,))

    @property
    def dtype(self):
        """The dtype of the value."""
        return self.leaf.dtype

    @property
    def value(self) -> Value:
        """What is known of the value."""
        return Value((self.origin,))

    def atoms(self, places: Sequence[int]) -> list[Atom]:
        """The runs of places of the dense weight that some axes of the value run over, in their
        order.
        """
        return [atom for place in places for atom in self.origin.axes[place]]

    def axis(self, place: int) -> int | None:
        """The one axis of the dense weight that an axis of the value is; None where it is not just
        one, whole.
        """
        atoms = self.origin.axes[place]
        return (
            atoms[0].axis
            if len(atoms) == 1 and atoms[0].size == self.leaf.shape[atoms[0].axis]
            else None
        )

    def kinds(self, place: int) -> set[str]:
        """What an axis of the value runs over: contracted axes, outputs, stacks."""
        return {self.leaf.kinds[atom.axis] for atom in self.origin.axes[place]}

    def dense(self) -> jax.Array:
        """The value as an array."""
        atoms = self.atoms(range(len(self.shape)))
        places = sorted(range(len(atoms)), key=lambda i: _in_order(atoms[i]))
        split = decompress(self.leaf).reshape([atoms[i].size for i in places])
        return split.transpose([places.index(i) for i in range(len(atoms))]).reshape(self.shape)

    def seen(self, origin: Origin, shape: Sequence[int], leaf: Sparse24 | None = None) -> "Weight":
        """The weight with its axes in another order, merged or split; `UnfitError` if the value is
        not just that.
        """
        leaf, origin = self.leaf if leaf is None else leaf, _without_ones(origin)
        left = {axis: n for axis, n in enumerate(leaf.shape) if n != 1}
        for atom in sorted((atom for atoms in origin.axes for atom in atoms), key=_in_order):
            if atom.axis not in left or left[atom.axis] != atom.stride * atom.size:
                raise UnfitError("reshaped so that its axes cannot be told")
            left[atom.axis] = atom.stride
        if any(stride != 1 for stride in left.values()):
            raise UnfitError("reshaped so that its axes cannot be told")
        return Weight(leaf, origin, tuple(shape), self.sources)


def _without_ones(origin: Origin) -> Origin:
    """The origin without its atoms of size 1, which say nothing of where an element is."""
    return origin._replace(
        axes=tuple(tuple(atom for atom in atoms if atom.size != 1) for atoms in origin.axes)
    )


def _in_order(atom: Atom) -> tuple[int, int]:
    """Sorts atoms as their places stand in the dense weight."""
    return atom.axis, -atom.stride


def split(values: Sequence) -> tuple[list, Callable]:
    """Splits values into arrays, two for each weight, and a function that rejoins them."""
    arrays: list = []
    for value in values:
        arrays += [value.leaf.values, value.leaf.metadata] if isinstance(value, Weight) else [value]

    def rebuild(arrays):
        rest = iter(arrays)

        def one(value):
            if not isinstance(value, Weight):
                return next(rest)
            return dataclasses.replace(
                value, leaf=dataclasses.replace(value.leaf, values=next(rest), metadata=next(rest))
            )

        return list(map(one, values))

    return arrays, rebuild


# --- a compressed weight as arrays [*stack, *output, ...]


def _open(leaf: Sparse24) -> list[jax.Array]:
    """Values and canonical metadata `[*stack, *output, ...]`."""
    arrays = (leaf.values, leaf.with_layout("canonical").metadata)
    return [a.reshape(*a.shape[:-2], *leaf.output, a.shape[-1]) for a in arrays]


def _close(
    leaf: Sparse24, arrays: Sequence[jax.Array], kinds: str, *, transposable: bool = False
) -> Sparse24:
    """The weight of such arrays, whose leading axes are the stacks and outputs of `kinds`; its
    layout is that of `leaf`.
    """
    stacks = kinds.count("S")
    output = arrays[0].shape[stacks:-1]
    values, metadata = (
        a.reshape(*a.shape[:stacks], math.prod(output), a.shape[-1]) for a in arrays
    )
    return Sparse24(
        values, metadata, leaf.contracting, output, kinds, transposable=transposable
    ).with_layout(leaf.layout)


def _place(kinds: str, axis: int) -> int:
    """Where an axis of the dense weight stands among its stacks and outputs."""
    kind = kinds[axis]
    return kinds[:axis].count(kind) + (kinds.count("S") if kind == "O" else 0)


def regrouped(leaf: Sparse24, kinds: str) -> Sparse24:
    """The weight with other of its axes taken for stacks and outputs."""
    before = leaf.kinds
    if before == kinds:
        return leaf
    axes = [i for i, kind in enumerate(kinds) if kind == "S"] + [
        i for i, kind in enumerate(kinds) if kind == "O"
    ]
    order = [_place(before, axis) for axis in axes]
    arrays = [a.transpose(*order, a.ndim - 1) for a in _open(leaf)]
    innermost = before.rfind("O") == kinds.rfind("O")
    return _close(leaf, arrays, kinds, transposable=leaf.transposable and innermost)


def _cut(leaf: Sparse24, axis: int, cut: Callable) -> Sparse24:
    """The weight with `cut(array, place)` in place of its arrays; `place` is that of a stack or
    output axis.
    """
    if leaf.kinds[axis] == "K":
        raise UnfitError("cut along the axis that the product sums over")
    place = _place(leaf.kinds, axis)
    return _close(
        leaf,
        [cut(a, place) for a in _open(leaf)],
        leaf.kinds,
        transposable=leaf.transposable and leaf.kinds.rfind("O") != axis,
    )


def sliced(w: Weight) -> Weight:
    """What a loop over the first axis of a weight takes: the weight whose arrays are to be sliced
    along theirs.
    """
    if w.shape[0] == 1:
        leaf = dataclasses.replace(
            w.leaf, values=w.leaf.values[None], metadata=w.leaf.metadata[None], axes=w.leaf.kinds
        )
        return Weight(leaf, w.origin._replace(axes=w.origin.axes[1:]), w.shape[1:], w.sources)
    axis = w.axis(0)
    if axis is None or w.leaf.kinds[axis] == "K":
        raise UnfitError(
            "a loop runs over the axis that the product sums over, or over several at once"
        )
    kinds = w.leaf.kinds
    leaf = regrouped(w.leaf, kinds[:axis] + "S" + kinds[axis + 1 :])
    place = _place(leaf.kinds, axis)
    values, metadata = (jnp.moveaxis(a, place, 0) for a in (leaf.values, leaf.metadata))
    kinds = leaf.kinds[:axis] + leaf.kinds[axis + 1 :]
    inside = tuple(
        tuple(atom._replace(axis=atom.axis - (atom.axis > axis)) for atom in atoms)
        for atoms in w.origin.axes[1:]
    )
    leaf = dataclasses.replace(leaf, values=values, metadata=metadata, axes=kinds)
    return Weight(leaf, w.origin._replace(axes=inside), w.shape[1:], w.sources)


# --- equations that move weights

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


def move(eqn, operands: list, values: list[Value], moved: list[Value]) -> list:
    """The results of an equation that moves, cuts or scales weights; `UnfitError` if it does
    something else.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [var.aval.shape for var in eqn.outvars]
    known = [isinstance(operand, Weight) for operand in operands]
    if any(0 in shape for shape in shapes):
        raise UnfitError("empty")
    if name == "optimization_barrier":
        arrays, rebuild = split(operands)
        return rebuild(lax.optimization_barrier(arrays))
    if name in ("mul", "div") and sum(known) == 1:
        return [_scaled(name, known.index(True), operands, values, moved[0], shapes[0])]
    if name == "concatenate" and all(known):
        return [_concatenated(operands, params["dimension"], shapes[0])]
    if not known[0] or not moved[0].origins:
        raise UnfitError(f"used by {name}")
    w: Weight = operands[0]
    if name in _VIEWS:
        return [w.seen(moved[0].origins[0], shapes[0])]
    if name in _OF_VALUES:
        (values_,) = bind(eqn, [w.leaf.values])
        return [dataclasses.replace(w, leaf=dataclasses.replace(w.leaf, values=values_))]
    if name == "convert_element_type":
        dtype = jnp.dtype(params["new_dtype"])
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UnfitError(f"cast to {dtype}")
        leaf = w.leaf if dtype.itemsize == w.dtype.itemsize else w.leaf.with_layout("canonical")
        return [
            dataclasses.replace(w, leaf=dataclasses.replace(leaf, values=leaf.values.astype(dtype)))
        ]
    if name == "slice":
        starts, strides = params["start_indices"], params["strides"] or (1,) * len(w.shape)
        cuts = list(zip(starts, params["limit_indices"], strides, strict=True))
        return [
            _parts(
                w,
                moved[0],
                shapes[0],
                lambda a, place, axis: lax.slice_in_dim(a, *cuts[axis], axis=place),
            )
        ]
    if name == "dynamic_slice":
        starts, sizes = operands[1:], params["slice_sizes"]
        return [
            _parts(
                w,
                moved[0],
                shapes[0],
                lambda a, place, axis: _dynamic_slice(a, starts[axis], sizes[axis], place),
            )
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
            for value, shape, end in zip(moved, shapes, ends, strict=True)
        ]
    raise UnfitError(f"used by {name}")


def _dynamic_slice(a: jax.Array, start, size: int, axis: int) -> jax.Array:
    """A part of an array along one axis; `start` is counted from the front, as the program has seen
    to already.
    """
    starts = [start if i == axis else jnp.zeros_like(start) for i in range(a.ndim)]
    sizes = [size if i == axis else n for i, n in enumerate(a.shape)]
    return lax.dynamic_slice(a, starts, sizes, allow_negative_indices=False)


def _parts(w: Weight, value: Value, shape: tuple[int, ...], cut: Callable) -> Weight:
    """The weight cut along the axes of the value that change their size, by `cut(array, place,
    axis)`.
    """
    leaf = w.leaf
    for axis, (before, after) in enumerate(zip(w.shape, shape, strict=True)):
        if before == after:
            continue
        held = w.axis(axis)
        if held is None:
            raise UnfitError("cut along several of its axes at once")
        leaf = _cut(leaf, held, lambda a, place, axis=axis: cut(a, place, axis))
    return w.seen(value.origins[0], shape, leaf)


def _concatenated(parts: list[Weight], dimension: int, shape: tuple[int, ...]) -> Weight:
    first = parts[0]
    axis = first.axis(dimension)
    kinds = [part.leaf.kinds for part in parts]
    alike = all(
        part.leaf.contracting == first.leaf.contracting and part.dtype == first.dtype
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
        raise UnfitError("concatenated in another way than along an output axis")
    place = _place(kinds[0], axis)
    arrays = [
        jnp.concatenate(pair, place)
        for pair in zip(*(_open(part.leaf) for part in parts), strict=True)
    ]
    leaf = _close(first.leaf, arrays, kinds[0])
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
    name: str, side: int, operands: list, values: list[Value], moved: Value, shape
) -> Weight:
    """The weight times, or over, what is constant along the contracted axes."""
    w, other = operands[side], operands[1 - side]
    if name == "div" and side == 1:
        raise UnfitError("divided by")
    if w.shape != tuple(shape):
        raise UnfitError("repeated while it is scaled")
    if jnp.ndim(other) == 0:
        scale = other
    else:
        contracted = {place for place in range(len(shape)) if "K" in w.kinds(place)}
        if not contracted <= constant_axes(values[1 - side], jnp.shape(other), shape):
            raise UnfitError("scaled by what varies along the axis that the product sums over")
        if any(w.kinds(place) != {"K"} for place in contracted):
            raise UnfitError("scaled while its contracted and other axes are merged")
        kept = [place for place in range(len(shape)) if place not in contracted]
        scale = jnp.broadcast_to(other, shape)[
            tuple(0 if place in contracted else slice(None) for place in range(len(shape)))
        ]
        scale = ordered(scale, w.atoms(kept), w.leaf)
    values_ = w.leaf.values
    values_ = values_ * scale if name == "mul" else values_ / scale
    return dataclasses.replace(w, leaf=dataclasses.replace(w.leaf, values=values_))


def ordered(a: jax.Array, atoms: list[Atom], leaf: Sparse24) -> jax.Array:
    """An array over stacks and outputs of a dense weight, in the order of the atoms, as `[*stack,
    M, 1]`.
    """
    kinds, shape = leaf.kinds, leaf.shape
    places = sorted(
        range(len(atoms)), key=lambda i: (_place(kinds, atoms[i].axis), -atoms[i].stride)
    )
    stacks = [n for kind, n in zip(kinds, shape, strict=True) if kind == "S"]
    return (
        a.reshape([atom.size for atom in atoms])
        .transpose(places)
        .reshape(*stacks, math.prod(leaf.output), 1)
    )


# --- products


class Ready(NamedTuple):
    """The operands of a sparse product.

    Attributes:
      leaf: the compressed weight.
      x: the other operand, as `sparse_matmul` takes it.
      made: the shape of the result with every axis by itself, and the order into which they go.
    """

    leaf: Sparse24
    x: jax.Array
    made: tuple[tuple[int, ...], tuple[int, ...]]

    def multiply(self, **options: Any) -> jax.Array:
        """The product: batches, then the free axes of x, then those of the weight, every axis of
        the dense weight by itself.
        """
        shape, order = self.made
        return sparse_matmul(self.x, self.leaf, **options).reshape(shape).transpose(order)


def operands(
    w: Weight,
    x,
    summed: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
) -> Ready:
    """Makes a weight and the other operand ready, given the pairs of axes that are summed over and
    batched, of w and of x.
    """
    (of_w, of_x), (batch_w, batch_x) = summed, batch
    kinds, sizes = w.leaf.kinds, w.leaf.shape
    contracted, stacks = w.atoms(of_w), w.atoms(batch_w)
    elsewhere = {
        atom.axis for atom in w.atoms([place for place in range(len(w.shape)) if place not in of_w])
    }
    summed_over = {atom.axis for atom in contracted}
    if summed_over & elsewhere or summed_over != {
        axis for axis, kind in enumerate(kinds) if kind == "K" and sizes[axis] != 1
    }:
        raise UnfitError(
            "the product sums over other axes than those that the weight is compressed along"
        )
    if any(atom.size != sizes[atom.axis] for atom in stacks):
        raise UnfitError("batched over a part of an axis")
    batched = [atom.axis for atom in stacks]
    leaf = regrouped(
        w.leaf,
        "".join(
            "K" if kind == "K" else "S" if axis in batched else "O"
            for axis, kind in enumerate(kinds)
        ),
    )
    # the others are of size 1: rows
    batches = [i for i, place in enumerate(batch_w) if w.origin.axes[place]]
    rows = [
        axis
        for axis in range(x.ndim)
        if axis not in of_x and axis not in [batch_x[i] for i in batches]
    ]
    x = x.transpose(*(batch_x[i] for i in batches), *rows, *of_x)
    row_sizes = x.shape[len(batches) : len(batches) + len(rows)]
    x = x.reshape(*(atom.size for atom in stacks), *row_sizes, *(atom.size for atom in contracted))
    ends = len(stacks) + len(rows)
    x = x.transpose(
        *sorted(range(len(stacks)), key=lambda i: _in_order(stacks[i])),
        *range(len(stacks), ends),
        *(ends + i for i in sorted(range(len(contracted)), key=lambda i: _in_order(contracted[i]))),
    )
    x = x.reshape(*x.shape[:ends], *leaf.contracting)
    outputs = w.atoms(
        [place for place in range(len(w.shape)) if place not in of_w and place not in batch_w]
    )
    first, last = sorted(stacks, key=_in_order), sorted(outputs, key=_in_order)
    in_order = [*first, *rows, *last]
    shape = (*(atom.size for atom in first), *row_sizes, *(atom.size for atom in last))
    wanted: list[Atom | int] = []
    for place, row in zip(batch_w, batch_x, strict=True):
        wanted += w.origin.axes[place] or [row]
    wanted += [axis for axis in rows if axis not in batch_x]
    return Ready(leaf, x, (shape, tuple(map(in_order.index, [*wanted, *outputs]))))
