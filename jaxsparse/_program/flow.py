"""How values flow through the equations of a traced program: which inputs they derive from."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

__all__ = [
    "LOOKED_UP",
    "NOTHING",
    "N_ARY",
    "REPEATED",
    "SAME_PLACES",
    "UNARY",
    "UNKNOWN",
    "Atom",
    "Origin",
    "Value",
    "constant_axes",
    "dots",
    "input_value",
    "is_looked_up",
    "outputs",
    "parts",
    "sliced",
    "stacked",
]


class Atom(NamedTuple):
    """A strided run along one axis of an input: `size` positions, `stride` apart.

    A stride of 0 marks a single position that was cut out. The axis is that of the input, or one of
    `REPEATED` (the elements repeat along it), `LOOKED_UP` (it runs over rows chosen by indices) and
    `UNKNOWN`.
    """

    axis: int
    stride: int
    size: int


REPEATED, LOOKED_UP, UNKNOWN = -1, -2, -3


class Origin(NamedTuple):
    """An input that a value derives from, and where its elements are in the value.

    Attributes:
      source: the index of the input.
      axes: for each axis of the value, the atoms that it runs over, in row-major order; atoms of
        size 1 may be missing.
      stack: the axes of the input along which a loop or an index takes one position.
      hidden: the axes of the input whose position in the value is unknown.
      varies: the axes of the input along which the value was combined with another that is not
        constant.
      share: the fraction of the value's elements that come from this input.
    """

    source: int
    axes: tuple[tuple[Atom, ...], ...]
    stack: frozenset[int] = frozenset()
    hidden: frozenset[int] = frozenset()
    varies: frozenset[int] = frozenset()
    share: float = 1.0

    def places(self, axis: int) -> frozenset[int]:
        """The axes of the input that an axis of the value runs over."""
        return frozenset(atom.axis for atom in self.axes[axis] if atom.axis >= 0)

    @property
    def looked_up(self) -> bool:
        """Whether the value consists of rows chosen by indices."""
        return self.runs_over(LOOKED_UP, range(len(self.axes)))

    def runs_over(self, kind: int, axes: Iterable[int]) -> bool:
        """Whether any of these axes of the value runs over atoms of a kind, such as `REPEATED`."""
        return any(atom.axis == kind for axis in axes for atom in self.axes[axis])


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
      origins: the inputs that it derives from; several after a concatenation.
      constant: the axes along which all elements are known to be equal.
      one_hot: the axes along which it compares indices with positions, so that a product over one
        of them looks up rows.
    """

    origins: tuple[Origin, ...] = ()
    constant: frozenset[int] = frozenset()
    one_hot: frozenset[int] = frozenset()


NOTHING = Value()


def input_value(source: int, shape: Sequence[int]) -> Value:
    """The value of an input itself."""
    return Value((Origin(source, tuple((Atom(axis, 1, n),) for axis, n in enumerate(shape))),))


def sliced(value: Value, axis: int = 0) -> Value:
    """What is known of a slice along an axis, as a loop takes it along the first."""
    origins = tuple(
        origin._replace(
            axes=origin.axes[:axis] + origin.axes[axis + 1 :],
            stack=origin.stack | origin.places(axis),
        )
        for origin in value.origins
    )
    return Value(origins, *(_without(axis, axes) for axes in value[1:]))


def stacked(value: Value, slices: Sequence[Value], length: int) -> Value:
    """What is known of the stack of a loop's results; `slices` are the values that it slices."""

    def stack(origin: Origin) -> Origin:
        whole = [one for outer in slices for one in outer.origins if one.source == origin.source]
        first = whole[0].axes[0] if whole else (Atom(REPEATED, 1, length),)
        stacked_axes = frozenset(atom.axis for atom in first)
        return origin._replace(
            axes=(first if length != 1 else (), *origin.axes), stack=origin.stack - stacked_axes
        )

    return Value(tuple(map(stack, value.origins)))


def _without(left_out: int, axes: frozenset[int]) -> frozenset[int]:
    """The axes, counted without one of them."""
    return frozenset(axis - (axis > left_out) for axis in axes if axis != left_out)


SAME_PLACES = {
    "all_gather_invariant",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pbroadcast",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "rev",
    "sharding_constraint",
    "stop_gradient",
}
_RESIZES = {"all_gather", "dynamic_slice", "pad", "slice", "split"}
UNARY = {
    *("abs", "cbrt", "ceil", "cos", "erf", "exp", "exp2", "expm1", "floor", "integer_pow"),
    *("is_finite", "log", "log1p", "logistic", "neg", "not", "round", "rsqrt", "sign", "sin"),
    *("sqrt", "square", "tan", "tanh"),
}
N_ARY = {
    "add",
    "add_any",
    "and",
    "atan2",
    "clamp",
    "div",
    "eq",
    "ge",
    "gt",
    "le",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "nextafter",
    "or",
}
N_ARY |= {"pow", "rem", "select_n", "sub", "xor"}
_COMPARES = {"eq", "ge", "gt", "le", "lt", "ne"}


def outputs(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """What is known of the results of an equation that calls no program."""
    name = eqn.primitive.name
    if name == "iota":
        return [
            Value(constant=frozenset(range(eqn.outvars[0].aval.ndim)) - {eqn.params["dimension"]})
        ]
    if name == "broadcast_in_dim":
        return [_broadcast(values[0], eqn)]
    if name in N_ARY:
        return [_combined(eqn, values)]
    if not any(map(any, values)):
        return [NOTHING] * len(eqn.outvars)
    if name in SAME_PLACES:
        return list(values[: len(eqn.outvars)])
    if name in UNARY:
        return [Value(values[0].origins, values[0].constant)]
    if name == "transpose":
        return [_transposed(values[0], eqn.params["permutation"])]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [_reshaped(values[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)]
    if name in _RESIZES:
        return [_cut(eqn, values[0], out.aval.shape) for out in eqn.outvars]
    if name == "unstack":
        return [sliced(values[0], eqn.params["axis"])] * len(eqn.outvars)
    if name == "concatenate":
        return [_concatenated(eqn, values)]
    if name == "gather":
        return [_gathered(eqn, values[0])]
    return [NOTHING] * len(eqn.outvars)


def _transposed(value: Value, order: Any) -> Value:
    place = {old: new for new, old in enumerate(order)}
    origins = tuple(
        origin._replace(axes=tuple(origin.axes[i] for i in order)) for origin in value.origins
    )
    return Value(origins, *(frozenset(place[axis] for axis in axes) for axes in value[1:]))


def _broadcast(value: Value, eqn: Any) -> Value:
    shape, places = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    before = eqn.invars[0].aval.shape
    kept = {place: axis for axis, place in enumerate(places) if before[axis] == shape[place]}
    grown = frozenset(axis for axis in range(len(shape)) if axis not in kept)
    repeated = tuple((Atom(REPEATED, 1, n),) if n != 1 else () for n in shape)
    origins = tuple(
        origin._replace(
            axes=tuple(
                origin.axes[kept[i]] if i in kept else repeated[i] for i in range(len(shape))
            )
        )
        for origin in value.origins
    )
    constant, one_hot = (
        frozenset(place for place, axis in kept.items() if axis in axes) for axes in value[1:]
    )
    return Value(origins, grown | constant, one_hot)


def _reshaped(value: Value, before: PyTree, after: PyTree) -> Value:
    places = _same_axes(before, after)
    origins = tuple(_regrouped(origin, before, after) for origin in value.origins)
    return Value(
        origins, *(frozenset(places[axis] for axis in axes if axis in places) for axes in value[1:])
    )


def _same_axes(before: PyTree, after: PyTree) -> dict[int, int]:
    """Maps the axes that a reshape leaves whole, old to new."""
    starts = {(math.prod(after[:i]), n): i for i, n in enumerate(after) if n != 1}
    return {
        i: starts[key]
        for i, n in enumerate(before)
        if n != 1 and (key := (math.prod(before[:i]), n)) in starts
    }


def _regrouped(origin: Origin, before: PyTree, after: PyTree) -> Origin:
    """The origin after a reshape.

    Within each part that the reshape keeps together, the atoms are redistributed over the axes,
    and split where an axis is split.
    """
    axes: list[tuple[Atom, ...]] = []
    hidden = origin.hidden
    sliced_axes = frozenset(
        atom.axis for atoms in origin.axes for atom in atoms if atom.stride == 0
    )
    for old, new in parts(before, after):
        sizes = [after[i] for i in new]
        new_axes = (
            _distributed([atom for i in old for atom in origin.axes[i] if atom.size != 1], sizes)
            if 0 not in sizes
            else None
        )
        if new_axes is None:
            hidden = hidden.union(*map(origin.places, old))
            new_axes = [(Atom(UNKNOWN, 1, n),) if n != 1 else () for n in sizes]
        axes += new_axes
    return origin._replace(axes=tuple(axes), hidden=hidden, stack=origin.stack | sliced_axes)


def parts(before: PyTree, after: PyTree) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes, old and new, that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        while (have := math.prod(before[k] for k in old)) != (
            want := math.prod(after[k] for k in new)
        ):
            if have < want:
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        yield old, new


def _distributed(atoms: list[Atom], sizes: list[int]) -> list[tuple[Atom, ...]] | None:
    """Distributes atoms, in order, over axes of these sizes; None if one would split unevenly."""
    queue = atoms[::-1]
    axes = []
    for n in sizes:
        axis_atoms: list[Atom] = []
        while n > 1:
            if not queue:
                return None
            atom = queue.pop()
            if n % atom.size == 0:
                n //= atom.size
            elif atom.size % n == 0:  # the outer positions here, the inner ones on the next axes
                inner = atom.size // n
                queue.append(atom._replace(size=inner))
                atom, n = Atom(atom.axis, atom.stride * inner, n), 1
            else:
                return None
            if (
                axis_atoms
                and axis_atoms[-1].axis == atom.axis
                and axis_atoms[-1].stride == atom.stride * atom.size
            ):
                atom = Atom(atom.axis, atom.stride, atom.size * axis_atoms.pop().size)
            axis_atoms.append(atom)
        axes.append(tuple(axis_atoms))
    return None if queue else axes


def _cut(eqn: Any, value: Value, after: PyTree) -> Value:
    """What is known of a value that an equation cuts, pads or gathers across devices."""
    name, params = eqn.primitive.name, eqn.params
    before = eqn.invars[0].aval.shape
    moved = {axis for axis, (n, m) in enumerate(zip(before, after, strict=True)) if n != m}
    uneven: set[int] = set()
    if name == "pad":
        moved |= {axis for axis, config in enumerate(params["padding_config"]) if any(config)}
        uneven = {axis for axis, (_, _, inside) in enumerate(params["padding_config"]) if inside}
    if name == "slice" and params["strides"]:
        uneven = {axis for axis, stride in enumerate(params["strides"]) if stride != 1}
    origins = tuple(
        origin._replace(hidden=origin.hidden.union(*map(origin.places, uneven)))
        for origin in value.origins
    )
    return _resized(value._replace(origins=origins), after, moved)


def _resized(value: Value, after: PyTree, changed: Iterable[int]) -> Value:
    """What is known of a value whose size changes along the axes `changed`."""

    def resize(origin: Origin) -> Origin:
        axes, hidden = list(origin.axes), set(origin.hidden)
        for i in changed:
            atoms, m = axes[i], after[i]
            alone = (
                len(atoms) == 1
                and sum(atom.axis == atoms[0].axis for axis in origin.axes for atom in axis) == 1
            )
            if not atoms or alone:
                kind = atoms[0].axis if atoms else REPEATED
                axes[i] = (Atom(kind, 0 if m == 1 and kind >= 0 else 1, m),)
            else:
                hidden |= origin.places(i)
                axes[i] = (Atom(UNKNOWN, 1, m),) if m != 1 else ()
        return origin._replace(axes=tuple(axes), hidden=frozenset(hidden))

    return Value(
        tuple(map(resize, value.origins)),
        value.constant - set(changed),
        value.one_hot - set(changed),
    )


def _concatenated(eqn: Any, values: Sequence[Value]) -> Value:
    axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    origins = []
    for value, atom in zip(values, eqn.invars, strict=True):
        long = _resized(value, shape, [axis])
        origins += [
            origin._replace(share=origin.share * atom.aval.shape[axis] / shape[axis])
            for origin in long.origins
        ]
    constant = frozenset.intersection(*(value.constant for value in values)) - {axis}
    return Value(tuple(origins), constant)


def _gathered(eqn: Any, value: Value) -> Value:
    """What is known of rows of an input chosen by indices.

    The rows are whole along every axis except the indexed ones, which are left out.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    left_out = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    whole = [axis for axis in range(len(before)) if axis not in left_out]
    if not set(numbers.start_index_map) <= left_out or any(
        sizes[axis] != before[axis] for axis in whole
    ):
        return NOTHING

    def rows(origin: Origin) -> Origin:
        places = dict(zip(numbers.offset_dims, whole, strict=True))
        axes = tuple(
            origin.axes[places[i]] if i in places else (Atom(LOOKED_UP, 1, after[i]),)
            for i in range(len(after))
        )
        return origin._replace(
            axes=axes, stack=origin.stack.union(*(origin.places(axis) for axis in left_out))
        )

    return Value(tuple(map(rows, value.origins)))


def constant_axes(value: Value, shape: Sequence[int], combined: Sequence[int]) -> frozenset[int]:
    """The axes of an elementwise combination along which an operand of `shape` is constant."""
    if not shape:
        return frozenset(range(len(combined)))
    return value.constant | {
        axis for axis, (n, m) in enumerate(zip(shape, combined, strict=True)) if n == 1 and m != 1
    }


def _combined(eqn: Any, values: Sequence[Value]) -> Value:
    """Combines values elementwise, where operands may repeat along axes of size 1."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    every = frozenset(range(len(shape)))
    shapes = [atom.aval.shape for atom in eqn.invars]
    constants = [
        constant_axes(value, one, shape) for value, one in zip(values, shapes, strict=True)
    ]
    one_hot: frozenset[int] = frozenset()
    if name == "eq":
        one_hot = frozenset(
            i
            for i in every
            for a, b in itertools.permutations(constants)
            if i in a and b >= every - {i} and i not in b
        )
    first = 1 if name == "select_n" else 0
    parts = [
        () if name in _COMPARES else _repeated(value, one, shape)
        for value, one in zip(values, shapes, strict=True)
    ][first:]
    around = constants[first:]
    origins: list[Origin] = []
    for i, part in enumerate(parts):
        others = [j for j in range(len(parts)) if j != i]
        for origin in part:
            alike = [j for j in others if any(_alike(origin, other) for other in parts[j])]
            same = frozenset.intersection(every, *(around[j] for j in others if j not in alike))
            varies = origin.varies.union(*(origin.places(axis) for axis in every - same))
            if _lives(origin, varies) and not any(_alike(origin, one) for one in origins):
                origins.append(origin._replace(varies=varies))
    return Value(tuple(origins), frozenset.intersection(*constants), one_hot)


def _repeated(value: Value, shape: Sequence[int], combined: Sequence[int]) -> tuple[Origin, ...]:
    """The origins of an operand that repeats along its axes of size 1."""
    grown = [axis for axis, (n, m) in enumerate(zip(shape, combined, strict=False)) if n != m]
    if not grown or not shape:
        return value.origins
    axes = {axis: (Atom(REPEATED, 1, combined[axis]),) for axis in grown}
    return tuple(
        origin._replace(axes=tuple(axes.get(i, atoms) for i, atoms in enumerate(origin.axes)))
        for origin in value.origins
    )


def _alike(a: Origin, b: Origin) -> bool:
    return a.source == b.source and a.axes == b.axes


def _lives(origin: Origin, varies: Any) -> bool:
    """Whether a product could still sum over the input's own elements along some axis."""
    return any(origin.places(axis) - varies for axis in range(len(origin.axes)))


def dots(eqn: Any) -> Iterator[tuple[int, Sequence[int], Sequence[int], Sequence[int]]]:
    """Yields the index of each operand of a matrix product, and its summed, batched, free axes."""
    (summed, batch) = eqn.params["dimension_numbers"]
    for i, atom in enumerate(eqn.invars[:2]):
        fixed = {*summed[i], *batch[i]}
        yield i, summed[i], batch[i], [axis for axis in range(atom.aval.ndim) if axis not in fixed]


def is_looked_up(origin: Origin, summed: Sequence[int], free: Sequence[int], other: Value) -> bool:
    """Whether a product takes looked-up rows as its input, not weights chosen for each row."""
    if origin.runs_over(LOOKED_UP, summed):
        return True
    return origin.runs_over(LOOKED_UP, free) and bool(
        other.origins or not any(map(origin.places, free))
    )
