"""Compressed weights inside a program: moved, cut, scaled, and prepared for products."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._packed.matmul import sparse_matmul
from jaxsparse._packed.sparse24 import Sparse24, decompress
from jaxsparse._program.flow import Atom, Origin, Value, input_value

__all__ = [
    "Ready",
    "UnfitError",
    "Weight",
    "closed",
    "cut_along",
    "opened",
    "operands",
    "ordered",
    "place_of",
    "regrouped",
    "sliced",
    "split",
]


class UnfitError(Exception):
    """Raised where a weight cannot stay compressed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A compressed weight as a value of a program; its axes may be reordered, merged or split.

    Attributes:
      leaf: the compressed weight.
      origin: for each axis of the value, the atoms of the dense weight that it runs over; they
        cover the weight exactly once.
      shape: the shape of the value.
      sources: the indices of the arguments that it derives from.
    """

    leaf: Sparse24
    origin: Origin
    shape: tuple[int, ...]
    sources: tuple[int, ...]

    @classmethod
    def of(cls, leaf: Sparse24, source: int) -> "Weight":
        """The weight that an argument holds."""
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
        """The atoms of the dense weight that some axes of the value run over, in order."""
        return [atom for place in places for atom in self.origin.axes[place]]

    def axis(self, place: int) -> int | None:
        """The axis of the dense weight that an axis of the value equals, or None."""
        atoms = self.origin.axes[place]
        return (
            atoms[0].axis
            if len(atoms) == 1 and atoms[0].size == self.leaf.shape[atoms[0].axis]
            else None
        )

    def kinds(self, place: int) -> set[str]:
        """The kinds of axes that an axis of the value runs over: "K", "O" and "S"."""
        return {self.leaf.kinds[atom.axis] for atom in self.origin.axes[place]}

    def dense(self) -> jax.Array:
        """The value as an array."""
        atoms = self.atoms(range(len(self.shape)))
        places = sorted(range(len(atoms)), key=lambda i: _in_order(atoms[i]))
        split = decompress(self.leaf).reshape([atoms[i].size for i in places])
        return split.transpose([places.index(i) for i in range(len(atoms))]).reshape(self.shape)

    def viewed(
        self, origin: Origin, shape: Sequence[int], leaf: Sparse24 | None = None
    ) -> "Weight":
        """The weight with its axes reordered, merged or split as `origin` says.

        Raises `UnfitError` if the value does not cover the weight exactly once.
        """
        leaf, origin = self.leaf if leaf is None else leaf, _without_ones(origin)
        left = {axis: n for axis, n in enumerate(leaf.shape) if n != 1}
        for atom in sorted((atom for atoms in origin.axes for atom in atoms), key=_in_order):
            if atom.axis not in left or left[atom.axis] != atom.stride * atom.size:
                raise UnfitError("reshaped, so its axes cannot be identified")
            left[atom.axis] = atom.stride
        if any(stride != 1 for stride in left.values()):
            raise UnfitError("reshaped, so its axes cannot be identified")
        return Weight(leaf, origin, tuple(shape), self.sources)


def _without_ones(origin: Origin) -> Origin:
    """The origin without its atoms of size 1, which do not affect where an element is."""
    return origin._replace(
        axes=tuple(tuple(atom for atom in atoms if atom.size != 1) for atoms in origin.axes)
    )


def _in_order(atom: Atom) -> tuple[int, int]:
    """A key that sorts atoms in the order of the dense weight."""
    return atom.axis, -atom.stride


def split(values: Sequence) -> tuple[list, Callable]:
    """Splits values into arrays, those of each weight, and a function that rejoins them."""
    arrays: list = []
    for value in values:
        arrays += jax.tree.leaves(value.leaf) if isinstance(value, Weight) else [value]

    def rebuild(arrays):
        rest = iter(arrays)

        def one(value):
            if not isinstance(value, Weight):
                return next(rest)
            return dataclasses.replace(value, leaf=jax.tree.map(lambda _: next(rest), value.leaf))

        return list(map(one, values))

    return arrays, rebuild


# --- a compressed weight as arrays [*stack, *output, ...]


def opened(leaf: Sparse24) -> list[jax.Array]:
    """Values, canonical metadata and scales, all `[*stack, *output, ...]`."""
    arrays = [leaf.values, leaf.with_layout("canonical").metadata]
    if leaf.scale is not None:
        arrays.append(leaf.scale[..., None])
    if leaf.input_scale is not None:
        arrays.append(jnp.broadcast_to(leaf.input_scale[..., None, None], arrays[-1].shape))
    return [a.reshape(*a.shape[:-2], *leaf.output, a.shape[-1]) for a in arrays]


def closed(
    leaf: Sparse24, arrays: Sequence[jax.Array], kinds: str, *, transposable: bool = False
) -> Sparse24:
    """Builds a weight from such arrays, whose leading axes are the stacks and outputs of `kinds`.

    Its layout is that of `leaf`. Outputs that come together share the largest input scale.
    """
    stacks = kinds.count("S")
    output = arrays[0].shape[stacks:-1]
    values, metadata, *scales = (
        a.reshape(*a.shape[:stacks], math.prod(output), a.shape[-1]) for a in arrays
    )
    scale, input_scale = [*(a[..., 0] for a in scales), None, None][:2]
    return Sparse24(
        values,
        metadata,
        leaf.contracting,
        output,
        kinds,
        transposable=transposable,
        scale=scale,
        input_scale=None if input_scale is None else input_scale.max(-1),
        activations=leaf.activations,
    ).with_layout(leaf.layout)


def place_of(kinds: str, axis: int) -> int:
    """The position of an axis of the dense weight among its stacks and outputs."""
    kind = kinds[axis]
    return kinds[:axis].count(kind) + (kinds.count("S") if kind == "O" else 0)


def regrouped(leaf: Sparse24, kinds: str) -> Sparse24:
    """The weight with a different choice of stack and output axes."""
    before = leaf.kinds
    if before == kinds:
        return leaf
    axes = [i for i, kind in enumerate(kinds) if kind == "S"] + [
        i for i, kind in enumerate(kinds) if kind == "O"
    ]
    order = [place_of(before, axis) for axis in axes]
    arrays = [a.transpose(*order, a.ndim - 1) for a in opened(leaf)]
    innermost = before.rfind("O") == kinds.rfind("O")
    return closed(leaf, arrays, kinds, transposable=leaf.transposable and innermost)


def cut_along(leaf: Sparse24, axis: int, cut: Callable) -> Sparse24:
    """Cuts a weight along a stack or output axis, by `cut(array, place)` for each of its arrays."""
    if leaf.kinds[axis] == "K":
        raise UnfitError("cut along the axis that the product sums over")
    place = place_of(leaf.kinds, axis)
    return closed(
        leaf,
        [cut(a, place) for a in opened(leaf)],
        leaf.kinds,
        transposable=leaf.transposable and leaf.kinds.rfind("O") != axis,
    )


def sliced(w: Weight) -> Weight:
    """Prepares a weight for a loop over its first axis.

    Returns the weight that each step sees; its arrays still have the axis that the loop slices, as
    their first.
    """
    if w.shape[0] == 1:
        leaf = dataclasses.replace(jax.tree.map(lambda a: a[None], w.leaf), axes=w.leaf.kinds)
        return Weight(leaf, w.origin._replace(axes=w.origin.axes[1:]), w.shape[1:], w.sources)
    axis = w.axis(0)
    if axis is None or w.leaf.kinds[axis] == "K":
        raise UnfitError(
            "sliced by a loop along the axis that its product sums over, or along several at once"
        )
    kinds = w.leaf.kinds
    leaf = regrouped(w.leaf, kinds[:axis] + "S" + kinds[axis + 1 :])
    place = place_of(leaf.kinds, axis)
    first = jax.tree.map(lambda a: jnp.moveaxis(a, place, 0), leaf)
    kinds = leaf.kinds[:axis] + leaf.kinds[axis + 1 :]
    inside = tuple(
        tuple(atom._replace(axis=atom.axis - (atom.axis > axis)) for atom in atoms)
        for atoms in w.origin.axes[1:]
    )
    leaf = dataclasses.replace(first, axes=kinds)
    return Weight(leaf, w.origin._replace(axes=inside), w.shape[1:], w.sources)


# --- products


def ordered(a: jax.Array, atoms: list[Atom], leaf: Sparse24) -> jax.Array:
    """Rearranges an array over stacks and outputs of a dense weight as `[*stack, M, 1]`.

    `atoms` are the runs that its axes stand for, in order.
    """
    kinds, shape = leaf.kinds, leaf.shape
    places = sorted(
        range(len(atoms)), key=lambda i: (place_of(kinds, atoms[i].axis), -atoms[i].stride)
    )
    stacks = [n for kind, n in zip(kinds, shape, strict=True) if kind == "S"]
    return (
        a.reshape([atom.size for atom in atoms])
        .transpose(places)
        .reshape(*stacks, math.prod(leaf.output), 1)
    )


class Ready(NamedTuple):
    """The operands of a sparse product.

    Attributes:
      leaf: the compressed weight.
      x: the other operand, as `sparse_matmul` takes it.
      made: the shape of the result with each axis separate, and the permutation to apply to it.
    """

    leaf: Sparse24
    x: jax.Array
    arrangement: tuple[tuple[int, ...], tuple[int, ...]]

    def multiply(self, **options: Any) -> jax.Array:
        """Computes the product, with every axis of the dense weight separate.

        The axes are the batches, then the free axes of x, then those of the weight.
        """
        shape, order = self.arrangement
        return sparse_matmul(self.x, self.leaf, **options).reshape(shape).transpose(order)


def operands(
    w: Weight,
    x: Any,
    summed: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
) -> Ready:
    """Prepares the operands of a product.

    `summed` and `batch` each hold the axes of `w` and those of `x`.
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
            "the product does not sum over exactly the axes that the weight is compressed along"
        )
    if any(atom.size != sizes[atom.axis] for atom in stacks):
        raise UnfitError("batched over part of an axis")
    batched = [atom.axis for atom in stacks]
    leaf = regrouped(
        w.leaf,
        "".join(
            "K" if kind == "K" else "S" if axis in batched else "O"
            for axis, kind in enumerate(kinds)
        ),
    )
    # the other batch axes have size 1 and count as rows
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
