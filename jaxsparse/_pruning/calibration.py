"""The evaluation of a traced program that prunes each weight on the inputs of its product."""

import collections
import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Leaf
from jaxsparse._program.flow import Origin, Value, dots, input_value, outputs, sliced
from jaxsparse._program.walk import INLINED, bind, called, calls, open_program, scan_counts
from jaxsparse._program.windows import windows
from jaxsparse._pruning.matrices import (
    Arrangement,
    HiddenError,
    Rows,
    arranged,
    is_part,
    rows,
    spread,
)
from jaxsparse._pruning.methods import Moments

__all__ = ["Calibration", "Method", "Pruned"]


class Method(NamedTuple):
    """A method of pruning.

    Attributes:
      moments: from the inputs `[*stack, R, K]` of a product to their second moments.
      prune: from a weight `[*stack, M, K]`, its pattern and the moments to the weight and its mask.
    """

    moments: Callable[[jax.Array], Moments]
    prune: Callable[[jax.Array, Pattern, Moments], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass
class Pruned:
    """A weight on its way from dense to pruned.

    Attributes:
      leaf: its entry in the plan.
      array: the weight; the parts that are pruned already are.
      mask: its mask.
      done: the positions along its stack axes that are pruned.
      waiting: the moments and the arrangement of positions that a loop is still collecting.
    """

    leaf: Leaf
    array: jax.Array
    mask: jax.Array
    done: set[tuple[int | None, ...]] = dataclasses.field(default_factory=set)
    waiting: dict[tuple, tuple[Moments, Arrangement]] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> int:
        """The number of parts that are pruned separately; 1 as long as none is."""
        cut = next(iter(self.done), ())
        return math.prod(n for n, i in zip(self.array.shape, cut, strict=False) if i is not None)


class _NothingLeftError(Exception):
    """Raised once all weights are pruned: the rest of the program does not matter."""


class _Batches(tuple):
    """A value that differs between the batches of the calibration data: one array for each."""


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A value of the program that derives from planned weights, and is computed when needed.

    Attributes:
      value: from which weights, and how.
      at: for each weight, the position along each stack axis that was cut out.
      make: computes it from the weights as they are then.
    """

    value: Value
    at: dict[int, dict[int, int]]
    make: Callable[[], jax.Array]


class Calibration:
    """One evaluation of a program on batches of calibration data, in which weights are pruned.

    A weight is pruned when the program first multiplies by it, on the inputs that the weights
    before it, which are pruned already, give it. All batches go through the program side by side,
    so memory holds the live values of each and the moments of one weight.
    """

    def __init__(self, weights: Sequence[Pruned], method: Method, progress: Callable[[str], Any]):
        self.weights, self.method, self.progress = weights, method, progress
        self.collecting: set[int] | None = None  # the weights whose moments a loop collects
        self.whole = True  # whether no product took a part of the outputs of a weight
        self.latest: tuple[Any, Rows, Moments] | None = None  # several weights may share an input

    def run(
        self, program: ClosedJaxpr, batches: Sequence[Sequence], sources: Sequence[int | None]
    ) -> None:
        """Evaluates a program.

        Args:
          program: the program.
          batches: for each batch the inputs of the program.
          sources: for each input the index of its weight; None for other inputs.
        """
        operands: list = []
        for i, source in enumerate(sources):
            values = [batch[i] for batch in batches]
            if source is not None:
                operands.append(self.weight(source))
            elif all(value is values[0] for value in values):
                operands.append(values[0])
            else:
                operands.append(_Batches(values))
        with contextlib.suppress(_NothingLeftError):
            self.evaluate(program.jaxpr, program.consts, operands)

    def weight(self, source: int) -> _Weight:
        pruned = self.weights[source]
        return _Weight(input_value(source, pruned.array.shape), {source: {}}, lambda: pruned.array)

    def evaluate(self, program: Jaxpr, consts: Sequence, operands: Sequence) -> list:
        """Evaluates a program; values are arrays, `_Batches` of arrays or `_Weight`s."""
        env = dict(zip(program.constvars, consts, strict=True)) | dict(
            zip(program.invars, operands, strict=True)
        )
        later = {atom for atom in program.outvars if not isinstance(atom, Literal)}
        dies = collections.defaultdict(list)  # what no later equation reads
        for i, eqn in reversed(list(enumerate(program.eqns))):
            for atom in eqn.invars:
                if not isinstance(atom, Literal) and atom not in later:
                    later.add(atom)
                    dies[i].append(atom)
        known: dict[Any, Value] = {}

        def read(atom):
            return atom.val if isinstance(atom, Literal) else env[atom]

        for i, eqn in enumerate(program.eqns):
            values = [read(atom) for atom in eqn.invars]
            flows = [
                value.value
                if isinstance(value, _Weight)
                else Value()
                if isinstance(atom, Literal)
                else known.get(atom, Value())
                for atom, value in zip(eqn.invars, values, strict=True)
            ]
            inner = calls(eqn, flows)
            ends = outputs(eqn, flows) if inner is None else [Value()] * len(eqn.outvars)
            for var, end in zip(eqn.outvars, ends, strict=True):
                if any(end):
                    known[var] = Value((), end.constant, end.one_hot)
            if not any(isinstance(value, _Weight) for value in values):
                results = _bound(eqn, values)
            elif eqn.primitive.name == "dot_general":
                results = self.dot(eqn, values)
            elif eqn.primitive.name == "conv_general_dilated":
                results = self.convolution(eqn, values)
            elif eqn.primitive.name == "ragged_dot_general":
                results = self.ragged(eqn, values)
            elif inner is not None:
                results = self.call(eqn, values)
            elif any(end.origins for end in ends) and not any(
                isinstance(value, _Batches) for value in values
            ):
                results = _derived(eqn, values, ends)
            else:
                results = _bound(eqn, [_made(value) for value in values])
            env.update(zip(eqn.outvars, results, strict=True))
            for atom in (*dies[i], *(var for var in eqn.outvars if var not in later)):
                del env[atom]
        return [read(atom) for atom in program.outvars]

    # --- products

    def dot(self, eqn: Any, values: list) -> list:
        batch = eqn.params["dimension_numbers"][1]
        for side, summed, batched, _ in dots(eqn):
            w, x = values[side], values[1 - side]
            if not isinstance(w, _Weight):
                continue
            x = _made(x)
            summed_x = eqn.params["dimension_numbers"][0][1 - side]
            for origin in w.value.origins:
                self.meet(w, origin, x, (summed, summed_x), (batched, batch[1 - side]))
        return _bound(eqn, [_made(value) for value in values])

    def convolution(self, eqn: Any, values: list) -> list:
        x, w = values
        numbers = eqn.params["dimension_numbers"]
        if isinstance(w, _Weight):
            _, channels, *window = numbers.rhs_spec
            shape = eqn.invars[1].aval.shape
            if eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
                return _bound(eqn, [_made(value) for value in values])
            x = _mapped(lambda x: windows(x, eqn.params, shape), _made(x))
            ndim = _batches(x)[0].ndim
            summed_x = tuple(range(ndim - len(window) - 1, ndim))
            for origin in w.value.origins:
                self.meet(w, origin, x, ((*window, channels), summed_x), ((), ()))
        return _bound(eqn, [_made(value) for value in values])

    def ragged(self, eqn: Any, values: list) -> list:
        x, w, sizes = values
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (summed, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
        if isinstance(w, _Weight) and len(groups) == 1 and not batch[0]:
            (axis,) = numbers.lhs_ragged_dimensions
            x = _mapped(lambda x, sizes: spread(x, sizes, axis), _made(x), sizes)
            for origin in w.value.origins:
                over = summed[1], tuple(axis + 1 for axis in summed[0])
                self.meet(w, origin, x, over, (groups, (0,)))
        return _bound(eqn, [_made(value) for value in values])

    def meet(self, w: _Weight, origin: Origin, x: Any, summed: Any, batch: Any) -> None:
        """Prunes a weight on the input of its product, or collects the moments of the input.

        `summed` and `batch` each hold the axes of the weight and those of x.
        """
        source = origin.source
        pruned, cut = self.weights[source], self.cut(w, source)
        if self.collecting is not None and source not in self.collecting:
            return
        same = self.latest is not None and self.latest[0] is x
        pattern = cast(Pattern, pruned.leaf.pattern)
        part = is_part(origin, pruned.array.shape, cut)
        self.whole &= not part
        try:
            if part and (self.collecting is not None or (cut in pruned.done and not same)):
                raise HiddenError("its outputs are cut apart and multiplied by different inputs")
            if cut in pruned.done:
                return
            arrangement = arranged(origin, pruned.array.shape, pattern, cut, summed[0], batch[0])
        except HiddenError as hidden:
            raise ValueError(
                f"prune: the inputs of {pruned.leaf.path} cannot be seen, since {hidden}. Plan it "
                'dense, or pass method="magnitude".'
            ) from None
        these = rows(origin, arrangement, summed, batch)
        if same and self.latest is not None and self.latest[1] == these:
            sums = self.latest[2]
        else:
            parts = [self.method.moments(these.of(one)) for one in _batches(x)]
            sums = functools.reduce(operator.add, parts)
            self.latest = x, these, sums
        if self.collecting is None:
            self.prune(pruned, sums, arrangement)
        else:
            before = pruned.waiting.get(cut)
            pruned.waiting[cut] = (before[0] + sums if before else sums), arrangement

    def prune(self, pruned: Pruned, sums: Moments, arrangement: Arrangement) -> None:
        part, order = arrangement.part, arrangement.order
        moved = pruned.array[part].transpose(order)
        stack, m = len(arrangement.stack), len(arrangement.stack) + len(arrangement.outputs)
        shape = moved.shape
        matrix = moved.reshape(*shape[:stack], math.prod(shape[stack:m]), math.prod(shape[m:]))
        pattern = cast(Pattern, pruned.leaf.pattern)
        if not jnp.isfinite(sums.sums).all():
            raise ValueError(
                f"prune: the inputs of {pruned.leaf.path} are not finite. Check the parameters and "
                "the calibration data."
            )
        kept, mask = self.method.prune(matrix, pattern, sums)
        if not jnp.isfinite(kept).all():
            raise ValueError(
                f"prune: the second moments of the inputs of {pruned.leaf.path} are singular. Use "
                "more calibration data or a larger `damping`."
            )
        kept, mask = (a.reshape(shape).transpose(np.argsort(order)) for a in (kept, mask))
        pruned.array = pruned.array.at[part].set(kept)
        pruned.mask = pruned.mask.at[part].set(mask)
        pruned.done.add(arrangement.cut)
        self.progress(pruned.leaf.path)
        if self.whole and all(one.parts == len(one.done) for one in self.weights):
            raise _NothingLeftError

    # --- calls

    def call(self, eqn: Any, values: list) -> list:
        """The results of an equation that passes a weight to the programs that it calls."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(eqn, values)
        if name == "cond" and not isinstance(values[0], _Batches):
            branch = params["branches"][int(jnp.clip(values[0], 0, len(params["branches"]) - 1))]
            return self.evaluate(open_program(branch), _consts(branch), values[1:])
        if name in ("while", "cond"):
            self.collect(values, lambda: self.apart(eqn, values))
            return _bound(eqn, [_made(value) for value in values])
        if name not in INLINED and not name.startswith("custom_"):
            return _bound(eqn, [_made(value) for value in values])
        closed = next(value for value in params.values() if open_program(value) is called(eqn))
        return self.evaluate(open_program(closed), _consts(closed), values)

    def apart(self, eqn: Any, values: list) -> None:
        """Evaluates a `while` or `cond` for one batch after the other."""
        for i in range(_count(values) or 1):
            operands = _batch(values, i)
            if eqn.primitive.name == "cond":
                self.call(eqn, operands)
            else:
                self.loop(eqn, operands)

    def loop(self, eqn: Any, values: list) -> None:
        params = eqn.params
        fixed, bodies = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body = values[:fixed], values[fixed : fixed + bodies]
        carry = values[fixed + bodies :]
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        while True:
            (more,) = self.evaluate(open_program(test), _consts(test), [*of_test, *carry])
            if not more:
                return
            carry = self.evaluate(open_program(body), _consts(body), [*of_body, *carry])

    def collect(self, values: list, run: Callable[[], Any]) -> None:
        """Prunes the weights in `values` on the inputs of all their products in `run()`."""
        sources = {
            origin.source
            for value in values
            if isinstance(value, _Weight)
            for origin in value.value.origins
        }
        if self.collecting is not None:
            sources &= self.collecting
        if not sources:
            return
        outer, self.collecting = self.collecting, sources
        run()
        self.collecting = outer
        if outer is None:
            for source in sorted(sources):
                pruned = self.weights[source]
                for sums, arrangement in pruned.waiting.values():
                    self.prune(pruned, sums, arrangement)
                pruned.waiting.clear()

    def scan(self, eqn: Any, values: list) -> list:
        fixed, carries = scan_counts(eqn)
        shared = [
            value
            for value in values[: fixed + carries]
            if isinstance(value, _Weight) and self.unpruned(value)
        ]
        if shared and self.collecting is None:
            self.collect(shared, lambda: self.steps(eqn, values))
        return self.steps(eqn, values)

    def unpruned(self, w: _Weight) -> bool:
        """Whether a weight, or the part of it that was cut out, is still to be pruned."""
        return any(
            self.cut(w, one.source) not in self.weights[one.source].done for one in w.value.origins
        )

    def cut(self, w: _Weight, source: int) -> tuple[int | None, ...]:
        """The position along each axis of a weight that was cut out; None for the others."""
        return tuple(w.at[source].get(axis) for axis in range(self.weights[source].array.ndim))

    def steps(self, eqn: Any, values: list) -> list:
        """The results of a scan, step by step."""
        params = eqn.params
        program, consts = open_program(params["jaxpr"]), _consts(params["jaxpr"])
        fixed, carries = scan_counts(eqn)
        carry, slices = values[fixed : fixed + carries], values[fixed + carries :]
        length = params["length"]
        stacked: list[list] = []
        for i in range(length)[:: -1 if params["reverse"] else 1]:
            results = self.evaluate(
                program,
                consts,
                [*values[:fixed], *carry, *(self.slice(value, i) for value in slices)],
            )
            carry = results[:carries]
            stacked.append([_made(result) for result in results[carries:]])
        if params["reverse"]:
            stacked.reverse()
        if not stacked:
            return _bound(eqn, [_made(value) for value in values])
        return [*carry, *map(_stacked, zip(*stacked, strict=True))]

    def slice(self, value: Any, i: int) -> Any:
        """The slice of a value along its first axis."""
        if not isinstance(value, _Weight):
            return _mapped(lambda x: x[i], value)
        at = {source: dict(places) for source, places in value.at.items()}
        for origin in value.value.origins:
            atoms = [atom for atom in origin.axes[0] if atom.size != 1]
            if len(atoms) > 1 or any(atom.axis < 0 for atom in atoms):
                raise ValueError(
                    f"prune: a loop slices {self.weights[origin.source].leaf.path} along several "
                    'of its axes at once. Plan it dense, or pass method="magnitude".'
                )
            for axis in origin.places(0):
                at[origin.source][axis] = i
        return _Weight(sliced(value.value), at, lambda: value.make()[i])


def _derived(eqn: Any, values: list, ends: list[Value]) -> list:
    """The results of an equation that moves or scales weights, to be computed when needed."""
    at: dict[int, dict[int, int]] = {}
    for value in values:
        for source, places in value.at.items() if isinstance(value, _Weight) else ():
            at.setdefault(source, {}).update(places)
    if eqn.primitive.name in ("slice", "dynamic_slice"):
        starts = eqn.params["start_indices"] if eqn.primitive.name == "slice" else values[1:]
        sizes = eqn.outvars[0].aval.shape
        for origin in values[0].value.origins:
            for place, (before, after) in enumerate(
                zip(eqn.invars[0].aval.shape, sizes, strict=True)
            ):
                if after == 1 != before and len(origin.axes[place]) == 1:
                    (atom,) = origin.axes[place]
                    start = int(jnp.clip(starts[place], 0, before - 1))
                    if atom.axis >= 0:
                        at[origin.source][atom.axis] = start

    def at_output(i):
        if eqn.primitive.name != "unstack":
            return at
        axis = eqn.params["axis"]
        return at | {
            origin.source: at[origin.source] | dict.fromkeys(origin.places(axis), i)
            for origin in values[0].value.origins
        }

    def one(i):
        return lambda: bind(eqn, [_made(value) for value in values])[i]

    return [
        _Weight(end, at_output(i), one(i)) if end.origins else one(i)()
        for i, end in enumerate(ends)
    ]


def _made(value: Any) -> Any:
    return value.make() if isinstance(value, _Weight) else value


def _batches(value: Any) -> Sequence:
    return value if isinstance(value, _Batches) else (value,)


def _mapped(f: Callable, *values: Any) -> Any:
    """Applies a function, once for each batch if an argument differs between batches."""
    count = _count(values)
    return f(*values) if count is None else _Batches(f(*_batch(values, i)) for i in range(count))


def _count(values: Iterable) -> int | None:
    """The number of batches; None if no value differs between them."""
    return next((len(value) for value in values if isinstance(value, _Batches)), None)


def _batch(values: Iterable, i: int) -> list:
    """The values of one batch."""
    return [value[i] if isinstance(value, _Batches) else value for value in values]


def _stacked(values: Sequence) -> Any:
    return _mapped(lambda *values: jnp.stack(values), *values)


def _bound(eqn: Any, values: Sequence) -> list:
    """Evaluates an equation, once for each batch if an operand differs between batches."""
    count = _count(values)
    if count is None:
        return bind(eqn, values)
    results = [bind(eqn, _batch(values, i)) for i in range(count)]
    return [_Batches(parts) for parts in zip(*results, strict=True)]


def _consts(program: Any) -> Sequence:
    return program.consts if isinstance(program, ClosedJaxpr) else ()
