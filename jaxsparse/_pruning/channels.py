"""Which axes of the weights of a program run over the same channels."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxsparse._program.flow import N_ARY, SAME_PLACES, UNARY, parts
from jaxsparse._program.walk import INLINED, called, open_program, scan_counts
from jaxsparse._pruning.alignment import Alignment, Axes

__all__ = ["Channels", "Place", "channels"]


class Place(NamedTuple):
    """Where channels are in a leaf of the parameters.

    Attributes:
      leaf: the index of the leaf.
      whole: the axis of the leaf.
      shape: the shape of the leaf, with axes split as reshapes of the program split them.
      axis: the axis of `shape` that runs over the channels.
      stack: the axes of `shape` over separate sets of channels, each with an order of its own.
    """

    leaf: int
    whole: int
    shape: tuple[int, ...]
    axis: int
    stack: tuple[int, ...]


class Channels(NamedTuple):
    """Channels that keep their meaning if all their places are reordered alike.

    Attributes:
      places: all axes of leaves that run over them.
      wanted: those that were asked for.
      reason: why their order matters to the program; empty if it does not.
    """

    places: tuple[Place, ...]
    wanted: tuple[Place, ...]
    reason: str


def channels(
    program: ClosedJaxpr, shapes: Sequence[tuple[int, ...]], wanted: Iterable[tuple[int, int]]
) -> tuple[list[Channels], float]:
    """Finds the channels that axes of the leading inputs of a program run over.

    Args:
      program: the program.
      shapes: the shapes of its leading inputs, the leaves of the parameters.
      wanted: the leaf and the axis of each place whose channels are to be found; where the program
        splits the axis, the innermost part.

    Returns:
      The channels, in the order in which `wanted` first mentions them, and the largest machine
      epsilon of the types in the program.
    """
    analysis = _Analysis()
    leaves = [analysis.fresh(shape) for shape in shapes]
    others = [
        analysis.fresh(var.aval.shape, "an argument of the function has them")
        for var in program.jaxpr.invars[len(shapes) :]
    ]
    analysis.note(leaves, ())
    outputs = analysis.follow(program.jaxpr, [*leaves, *others], ())
    analysis.freeze(outputs, "they reach an output of the function")

    # for each leaf, the axis of each factor, its channels and their number
    factors = [
        [
            (axis, *factor)
            for axis, (node, n) in enumerate(zip(axes, shape, strict=True))
            for factor in analysis.factors(node, n)
        ]
        for axes, shape in zip(leaves, shapes, strict=True)
    ]
    last = {
        (leaf, axis): i for leaf, some in enumerate(factors) for i, (axis, *_) in enumerate(some)
    }
    ends = [(leaf, last[leaf, axis]) for leaf, axis in wanted]
    roots = list(dict.fromkeys(factors[leaf][i][1] for leaf, i in ends))
    reasons, used = analysis.frozen(), set(analysis.roots(analysis.used))
    stacks = analysis.stacks({root for root in roots if root is not None and root not in reasons})

    def places(root):
        for leaf, some in enumerate(factors):
            over = [one for _, one, _ in some]
            shape = tuple(n for *_, n in some)
            for i, (axis, one, _) in enumerate(some):
                if one == root:
                    stack = tuple(over.index(other) for other in stacks[root])
                    yield (leaf, i), Place(leaf, axis, shape, i, stack)

    result = []
    for root in roots:
        if root is not None:
            every = dict(places(root))
            reason = reasons.get(root, "" if root in used else "the function does not use them")
            wanted_places = tuple(every[end] for end in ends if end in every)
            result.append(Channels(tuple(every.values()), wanted_places, reason))
    return result, analysis.epsilon


class _Analysis(Alignment):
    """A walk over a program that aligns the axes of its values.

    An operation for which the order along an axis matters freezes the axis, and what it returns
    along that axis are other channels, which are frozen too.
    """

    def __init__(self):
        super().__init__()
        self.epsilon = 0.0

    # --- programs

    def follow(self, program: Any, operands: Sequence[Axes], loops: tuple[int, ...]) -> list[Axes]:
        """Follows values through a program; returns the axes of its outputs."""
        known = dict(zip(program.invars, operands, strict=True))
        constant = "a constant array of the program has them"
        known |= {var: self.fresh(var.aval.shape, constant) for var in program.constvars}

        def axes_of(atom):
            if isinstance(atom, Literal):
                return self.fresh(jnp.shape(atom.val), constant)
            return known[atom]

        for eqn in program.eqns:
            inputs = list(map(axes_of, eqn.invars))
            results = self.results(eqn, inputs, loops)
            self.note((*inputs, *results), loops)
            known.update(zip(eqn.outvars, results, strict=True))
            for var in eqn.outvars:
                dtype = getattr(var.aval, "dtype", jnp.int32)
                if jnp.issubdtype(dtype, jnp.inexact):
                    self.epsilon = max(self.epsilon, float(jnp.finfo(dtype).eps))
        return [axes_of(atom) for atom in program.outvars]

    def results(self, eqn: Any, operands: list[Axes], loops: tuple[int, ...]) -> list[Axes]:
        """The axes of the results of an equation."""
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, operands, loops)
        if name == "while":
            return self.while_loop(eqn, operands, loops)
        if name == "cond":
            ends = [
                self.follow(open_program(branch), operands[1:], loops)
                for branch in eqn.params["branches"]
            ]
            return [self.aligned(values) for values in zip(*ends, strict=True)]
        if name in INLINED or name in ("custom_jvp_call", "custom_vjp_call"):
            inner = called(eqn)
            if inner is not None:
                return self.follow(inner, operands, loops)
        self.used.update(node for axes in operands for node in axes if node is not None)
        if name in ("dot_general", "ragged_dot_general"):
            return self.product(eqn, operands, loops)
        if name == "conv_general_dilated":
            return self.convolution(eqn, operands, loops)
        return _RULES.get(name, _Analysis.unknown)(self, eqn, operands)

    def scan(self, eqn, operands, loops):
        consts, carries = scan_counts(eqn)
        position = self.new("a scan loops over them")
        shared, carry, sliced = (
            operands[:consts],
            operands[consts : consts + carries],
            operands[consts + carries :],
        )
        self.join(position, *(axes[0] for axes in sliced))
        around = self.carried(eqn.outvars[:carries], carry)
        ends = self.follow(
            open_program(eqn.params["jaxpr"]),
            [*shared, *around, *(axes[1:] for axes in sliced)],
            (*loops, position),
        )
        first = position if eqn.params["length"] != 1 else None
        return [
            *map(self.aligned, zip(around, ends[:carries], strict=True)),
            *((first, *axes) for axes in ends[carries:]),
        ]

    def while_loop(self, eqn, operands, loops):
        cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        around = self.carried(eqn.outvars, operands[cond + body :])
        self.follow(open_program(eqn.params["cond_jaxpr"]), [*operands[:cond], *around], loops)
        ends = self.follow(
            open_program(eqn.params["body_jaxpr"]),
            [*operands[cond : cond + body], *around],
            loops,
        )
        return list(map(self.aligned, zip(around, ends, strict=True)))

    def carried(self, variables, values):
        """The axes of the carries of a loop in all its steps."""
        return [
            self.aligned((self.fresh(var.aval.shape), axes))
            for var, axes in zip(variables, values, strict=True)
        ]

    # --- operations

    def aligned(self, values: Iterable[Axes]) -> Axes:
        """Joins values of equal shapes axis by axis."""
        return tuple(self.join(*nodes) for nodes in zip(*values, strict=True))

    def summed(self, pairs: Sequence[Axes], aligned: Axes) -> None:
        """Joins axes of two operands that a product sums over, given other axes that it aligns."""
        nodes = [self.join(*pair) for pair in pairs]
        self.sums |= {
            (node, (*aligned, *nodes))
            for node, pair in zip(nodes, pairs, strict=True)
            if node is not None and None not in pair
        }

    def kept(self, eqn: Any, axes: Axes, moved: Iterable[int], reason: str) -> list[Axes]:
        """The results of an operation that keeps all axes but those that it moves along."""
        moved = set(moved)
        self.freeze([tuple(axes[i] for i in moved)], reason)
        return [
            tuple(
                None if n == 1 else self.new(reason) if i in moved else axes[i]
                for i, n in enumerate(var.aval.shape)
            )
            for var in eqn.outvars
        ]

    def unknown(self, eqn, operands):
        reason = f"{eqn.primitive.name}, which is not followed, uses or makes them"
        self.freeze(operands, reason)
        return [self.fresh(getattr(var.aval, "shape", ()), reason) for var in eqn.outvars]

    def elementwise(self, eqn, operands):
        shape = eqn.outvars[0].aval.shape
        full = [axes for axes in operands if axes]
        if any(len(axes) != len(shape) for axes in full):
            return self.unknown(eqn, operands)
        return [self.aligned([*full, (None,) * len(shape)])]

    def same(self, eqn, operands):
        return operands[: len(eqn.outvars)]

    def iota(self, eqn, operands):
        shape, dimension = eqn.outvars[0].aval.shape, eqn.params["dimension"]
        reason = "iota counts them"
        return [tuple(self.new(reason) if i == dimension else None for i in range(len(shape)))]

    def transpose(self, eqn, operands):
        return [tuple(operands[0][i] for i in eqn.params["permutation"])]

    def broadcast(self, eqn, operands):
        places = dict(zip(eqn.params["broadcast_dimensions"], operands[0], strict=True))
        return [tuple(places.get(i) for i in range(len(eqn.outvars[0].aval.shape)))]

    def reshape(self, eqn, operands):
        (axes,), before, after = operands[:1], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        if 0 in before:
            return self.unknown(eqn, operands)
        nodes: dict[int, int | None] = {}
        for run, split in parts(before, after):
            old, new = [i for i in run if before[i] != 1], [i for i in split if after[i] != 1]
            node = axes[old[0]] if old else None
            for i in old[1:]:
                node = self.merge(node, axes[i], before[i])
            for i in new[:0:-1]:
                node, nodes[i] = self.split(node, after[i])
            nodes |= dict.fromkeys(new[:1], node)
        return [tuple(map(nodes.get, range(len(after))))]

    def reduce(self, eqn, operands):
        gone = set(eqn.params["axes"])
        return [
            tuple(node for i, node in enumerate(axes) if i not in gone)
            for axes in operands[: len(eqn.outvars)]
        ]

    def argument_of_extremum(self, eqn, operands):
        reason = f"{eqn.primitive.name} returns their places"
        self.freeze([tuple(operands[0][i] for i in eqn.params["axes"])], reason)
        return self.reduce(eqn, operands)

    def along(self, eqn, operands):
        """Operations whose result depends on the order along one axis."""
        params = eqn.params
        if "dimensions" in params:
            moved = params["dimensions"]
        else:
            moved = [params["dimension"] if "dimension" in params else params["axis"]]
        reason = f"{eqn.primitive.name} depends on their order"
        return self.kept(eqn, self.aligned(operands), moved, reason)

    def cut(self, eqn, operands):
        """Operations that return a part along some axes."""
        axes, before = operands[0], eqn.invars[0].aval.shape
        moved = {
            i
            for var in eqn.outvars
            for i, (n, m) in enumerate(zip(before, var.aval.shape, strict=True))
            if n != m and axes[i] is not None
        }
        if eqn.primitive.name == "pad":
            moved |= {i for i, config in enumerate(eqn.params["padding_config"]) if any(config)}
        return self.kept(
            eqn, axes, moved, f"{eqn.primitive.name} takes a part of them or adds some"
        )

    def unstack(self, eqn, operands):
        axis, axes = eqn.params["axis"], operands[0]
        self.freeze([axes[axis : axis + 1]], "unstack takes them apart")
        return [axes[:axis] + axes[axis + 1 :]] * len(eqn.outvars)

    def concatenate(self, eqn, operands):
        axis = eqn.params["dimension"]
        reason = "concatenate joins them to others"
        self.freeze([axes[axis : axis + 1] for axes in operands], reason)
        rest = self.aligned([(*axes[:axis], None, *axes[axis + 1 :]) for axes in operands])
        return self.kept(eqn, rest, [axis], reason)

    def gather(self, eqn, operands):
        (axes, indices), numbers = operands, eqn.params["dimension_numbers"]
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        if numbers.operand_batching_dims:
            return self.unknown(eqn, operands)
        whole = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
        kept = {
            place: i
            for place, i in zip(numbers.offset_dims, whole, strict=True)
            if sizes[i] == shape[i] and i not in numbers.start_index_map
        }
        reason = "gather looks them up by index"
        looked_up = [node for i, node in enumerate(axes) if i not in kept.values()]
        self.freeze([(*looked_up, *indices[-1:])], reason)
        rows = iter(indices[:-1])
        return [
            tuple(
                axes[kept[i]]
                if i in kept
                else next(rows)
                if i not in numbers.offset_dims
                else self.new(reason)
                for i in range(len(eqn.outvars[0].aval.shape))
            )
        ]

    def scatter(self, eqn, operands):
        (axes, indices, updates), numbers = operands, eqn.params["dimension_numbers"]
        shape, written = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
        inside = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        window = [i for i in range(len(shape)) if i not in inside]
        whole = {
            i: j
            for i, j in zip(window, numbers.update_window_dims, strict=True)
            if shape[i] == written[j] and i not in numbers.scatter_dims_to_operand_dims
        }
        reason = "scatter writes to them by index"
        left = tuple(node for j, node in enumerate(updates) if j not in whole.values())
        self.freeze([indices, left], reason)
        rest = tuple(updates[whole[i]] if i in whole else None for i in range(len(shape)))
        return self.kept(eqn, self.aligned((axes, rest)), set(range(len(shape))) - {*whole}, reason)

    def update(self, eqn, operands):
        axes, updates = operands[:2]
        before, written = (atom.aval.shape for atom in eqn.invars[:2])
        moved = {i for i, (n, m) in enumerate(zip(before, written, strict=True)) if n != m}
        reason = "dynamic_update_slice overwrites a part of them"
        self.freeze([tuple(updates[i] for i in moved)], reason)
        rest = tuple(None if i in moved else node for i, node in enumerate(updates))
        return self.kept(eqn, self.aligned((axes, rest)), moved, reason)

    def top_k(self, eqn, operands):
        (axes,) = operands
        axis = eqn.params.get("axis", -1) % len(axes)
        return self.kept(eqn, axes, [axis], "top_k depends on their order")

    def pool(self, eqn, operands):
        params = eqn.params
        windows = zip(
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            params["base_dilation"],
            strict=True,
        )
        moved = [
            i
            for i, (window, stride, padding, dilation) in enumerate(windows)
            if (window, stride, *padding, dilation) != (1, 1, 0, 0, 1)
        ]
        return self.kept(eqn, operands[0], moved, f"{eqn.primitive.name} slides along them")

    def product(self, eqn, operands, loops):
        groups: tuple[int, ...] = ()
        if eqn.primitive.name == "dot_general":
            summed, batch = eqn.params["dimension_numbers"]
        else:
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            (summed, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
            ragged = numbers.lhs_ragged_dimensions
            if set(ragged) & {*summed[0], *batch[0]}:
                return self.unknown(eqn, operands)
            reason = "ragged_dot_general divides them into groups"
            self.freeze([tuple(operands[0][i] for i in ragged)], reason)
            self.freeze([tuple(operands[1][i] for i in groups), *operands[2:]], reason)
        left, right = operands[:2]
        batched = [self.join(left[i], right[j]) for i, j in zip(*batch, strict=True)]
        pairs = [(left[i], right[j]) for i, j in zip(*summed, strict=True)]
        self.summed(pairs, (*batched, *loops))
        return [
            (
                *batched,
                *(node for i, node in enumerate(left) if i not in (*summed[0], *batch[0])),
                *(
                    node
                    for i, node in enumerate(right)
                    if i not in (*summed[1], *batch[1], *groups)
                ),
            )
        ]

    def convolution(self, eqn, operands, loops):
        (x, kernel), params = operands, eqn.params
        (rows, features, *space), (outputs, inputs, *window), places = params["dimension_numbers"]
        shapes = [atom.aval.shape for atom in eqn.invars]
        sliding = "a convolution slides along them"
        self.freeze([tuple(x[i] for i in space), tuple(kernel[i] for i in window)], sliding)
        result = list(self.fresh(eqn.outvars[0].aval.shape, sliding))
        result[places[0]] = x[rows]
        groups = params["feature_group_count"]
        if params["batch_group_count"] != 1:
            return self.unknown(eqn, operands)
        if groups == 1:
            self.summed([(x[features], kernel[inputs])], loops)
            result[places[1]] = kernel[outputs]
        elif groups == shapes[0][features] == shapes[1][outputs]:
            result[places[1]] = self.join(x[features], kernel[outputs])
        else:
            return self.unknown(eqn, operands)
        return [tuple(result)]


_MORE = {"acos", "asin", "atan", "complex", "cosh", "erf_inv", "erfc", "imag", "real", "sinh"}
_Rule = Callable[[_Analysis, Any, list[Axes]], list[Axes]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(UNARY | N_ARY | _MORE, _Analysis.elementwise),
    **dict.fromkeys(SAME_PLACES - {"rev", "all_gather_invariant"}, _Analysis.same),
    **dict.fromkeys(
        (f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or", "xor")),
        _Analysis.reduce,
    ),
    **dict.fromkeys(("argmax", "argmin"), _Analysis.argument_of_extremum),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev"), _Analysis.along
    ),
    **dict.fromkeys(("slice", "dynamic_slice", "split", "pad", "tile"), _Analysis.cut),
    **dict.fromkeys((f"reduce_window_{kind}" for kind in ("sum", "max", "min")), _Analysis.pool),
    "broadcast_in_dim": _Analysis.broadcast,
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_mul", "scatter_min", "scatter_max"), _Analysis.scatter
    ),
    "concatenate": _Analysis.concatenate,
    "dynamic_update_slice": _Analysis.update,
    "gather": _Analysis.gather,
    "iota": _Analysis.iota,
    "reshape": _Analysis.reshape,
    "squeeze": lambda analysis, eqn, operands: [
        tuple(node for i, node in enumerate(operands[0]) if i not in eqn.params["dimensions"])
    ],
    "top_k": _Analysis.top_k,
    "transpose": _Analysis.transpose,
    "unstack": _Analysis.unstack,
}
