"""The evaluation of a traced program in which compressed weights replace dense ones."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxsparse._execution import moves, weights
from jaxsparse._execution.fusion import Product, activation_at, bias_of
from jaxsparse._execution.report import Usage
from jaxsparse._execution.weights import Ready, UnfitError, Weight
from jaxsparse._kernels import may_run
from jaxsparse._packed.matmul import chosen, common_dtype
from jaxsparse._program.flow import Value, outputs
from jaxsparse._program.walk import bind, called, calls, invariant, open_program, scan_counts
from jaxsparse._program.windows import apart, windows

__all__ = ["Run"]


class Run:
    """One evaluation of a program; records in `rows` how it uses each weight."""

    def __init__(
        self,
        paths: Sequence[str],
        implementation: str | None,
        rows: dict[Any, Usage],
        observe: Callable[[Ready], Ready],
    ):
        self.paths, self.implementation, self.rows = paths, implementation, rows
        self.observe = observe  # sees, and may change, the operands of each product
        self.place: tuple[int, ...] = ()  # the calls around the current equation
        self.site = 0  # the current equation

    def evaluate(self, program: Jaxpr, consts: Sequence, operands: Sequence) -> list:
        """Evaluates a program; operands and outputs are arrays or `Weight`s."""
        env = dict(zip(program.constvars, consts, strict=True)) | dict(
            zip(program.invars, operands, strict=True)
        )
        known: dict[Any, Value] = {}
        readers = collections.Counter(
            atom
            for atoms in (*(eqn.invars for eqn in program.eqns), program.outvars)
            for atom in atoms
            if not isinstance(atom, Literal)
        )

        def read(atom):
            return atom.val if isinstance(atom, Literal) else env[atom]

        done = 0
        for i, eqn in enumerate(program.eqns):
            if i < done:
                continue
            values = [
                Value()
                if isinstance(atom, Literal)
                else env[atom].value
                if isinstance(env[atom], Weight)
                else known.get(atom, Value())
                for atom in eqn.invars
            ]
            result_values = (
                outputs(eqn, values) if calls(eqn, values) is None else [Value()] * len(eqn.outvars)
            )
            for var, value in zip(eqn.outvars, result_values, strict=True):
                if any(value):
                    known[var] = Value((), value.constant, value.one_hot)
            waiting = [
                atom
                for atom in eqn.invars
                if not isinstance(atom, Literal) and isinstance(env[atom], Product)
            ]
            if waiting and (fused := self.fused(program.eqns, i, waiting[0], env, values, readers)):
                result, count = fused
                env[program.eqns[i + count - 1].outvars[0]] = result
                done = i + count
                continue
            for atom in waiting:
                env[atom] = env[atom].result() if isinstance(env[atom], Product) else env[atom]
            operands = [read(atom) for atom in eqn.invars]
            some = any(isinstance(operand, Weight) for operand in operands)
            env.update(
                zip(
                    eqn.outvars,
                    self.apply(eqn, operands, values, result_values)
                    if some
                    else bind(eqn, operands),
                    strict=True,
                )
            )
        return [
            result.result() if isinstance(result := read(atom), Product) else result
            for atom in program.outvars
        ]

    def fused(
        self, eqns: Any, i: int, atom: Any, env: Any, values: Any, readers: Any
    ) -> tuple[Product, int] | None:
        """Fuses the equations from `i` on into a product; returns it and how many they are.

        None if no kernel can fuse them.
        """
        product, eqn = env[atom], eqns[i]
        if product.activation:
            return None
        if eqn.primitive.name == "add" and product.bias is None and readers[atom] == 1:
            (other,) = (j for j, one in enumerate(eqn.invars) if one is not atom)
            term = eqn.invars[other]
            if not isinstance(term, Literal) and isinstance(env[term], jax.Array):
                bias = bias_of(product, eqn, env[term], values[other])
                return None if bias is None else (dataclasses.replace(product, bias=bias), 1)
        fusion = activation_at(eqns, i, atom, readers)
        return (
            None
            if fusion is None
            else (dataclasses.replace(product, activation=fusion[0]), fusion[1])
        )

    def apply(
        self, eqn: Any, operands: list, values: list[Value], result_values: list[Value]
    ) -> list:
        """The results of an equation that has a weight among its operands."""
        name = eqn.primitive.name
        self.site = id(eqn)
        try:
            if name == "dot_general":
                return [self.dot(eqn, operands)]
            if name == "conv_general_dilated":
                return [self.convolution(eqn, operands)]
            if calls(eqn, values) is not None:
                return self.call(eqn, operands)
            return moves.move(eqn, operands, values, result_values)
        except UnfitError as unfit:
            return bind(
                eqn, [self.dense(operand, _described(eqn), str(unfit)) for operand in operands]
            )

    # --- products

    def dot(self, eqn: Any, operands: Any) -> Any:
        (summed, batch) = eqn.params["dimension_numbers"]
        side = 0 if isinstance(operands[0], Weight) else 1
        w, x = operands[side], operands[1 - side]
        x = (
            self.dense(x, _described(eqn), "multiplied by another compressed weight")
            if isinstance(x, Weight)
            else x
        )
        aval = eqn.outvars[0].aval

        def arranged(y):  # y has batches, then the free axes of x, then those of w
            if side == 1:
                return y
            batches, rows = len(batch[0]), x.ndim - len(batch[1]) - len(summed[1])
            y = y.reshape(
                *aval.shape[:batches],
                *aval.shape[aval.ndim - rows :],
                *aval.shape[batches : aval.ndim - rows],
            )
            return y.transpose(
                *range(batches), *range(batches + rows, y.ndim), *range(batches, batches + rows)
            )

        free = [
            place for place in range(len(w.shape)) if place not in (*summed[side], *batch[side])
        ]
        first = len(batch[0]) if side == 0 else aval.ndim - len(free)
        pairs = (summed[side], summed[1 - side]), (batch[side], batch[1 - side])
        return self.product(
            eqn, w, x, pairs, arranged, {first + i: place for i, place in enumerate(free)}
        )

    def convolution(self, eqn: Any, operands: Any) -> Any:
        x, w = operands
        if isinstance(x, Weight):
            raise UnfitError("the input of a convolution")
        params = eqn.params
        numbers, shape = params["dimension_numbers"], eqn.invars[1].aval.shape
        _, _, *places = numbers.lhs_spec
        outputs, channels, *window = numbers.rhs_spec
        if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
            raise UnfitError("a grouped convolution")
        aval = eqn.outvars[0].aval
        rows = math.prod(aval.shape) // aval.shape[numbers.out_spec[1]]
        run = chosen(
            self.implementation, rows, w.leaf, common_dtype(x.dtype, w.leaf.dtype), aval.dtype
        )
        if run == "dense" and not apart(params, shape):
            raise UnfitError("a convolution whose windows overlap; a named kernel takes them")
        x = windows(x, params, shape)
        count = 1 + len(places)

        def arranged(y):  # y has the batch, the places, then the outputs
            order = sorted(zip(numbers.out_spec, (0, count, *range(1, count)), strict=True))
            return y.reshape(*x.shape[:count], shape[outputs]).transpose([i for _, i in order])

        pairs = ((*window, channels), tuple(range(count, x.ndim))), ((), ())
        return self.product(eqn, w, x, pairs, arranged, {numbers.out_spec[1]: outputs})

    def product(
        self, eqn: Any, w: Weight, x: Any, pairs: Any, arranged: Callable, places: dict[int, int]
    ) -> Any:
        """The sparse product of a weight, delayed where its kernel can fuse a bias or activation.

        `pairs` holds the summed and the batched axes, each for `w` and for `x`; `places` maps axes
        of the result to axes of `w`.
        """
        ready = self.observe(weights.operands(w, x, *pairs))
        leaf, aval = ready.leaf, eqn.outvars[0].aval
        rows = math.prod(ready.x.shape[leaf.values.ndim - 2 : ready.x.ndim - len(leaf.contracting)])
        run = chosen(self.implementation, rows, leaf, common_dtype(x.dtype, leaf.dtype), aval.dtype)
        self.note(w, _described(eqn), "", run)

        def multiply(bias=None, activation=None):
            y = ready.multiply(
                bias=bias,
                activation=activation,
                implementation=self.implementation,
                precision=eqn.params["precision"],
                preferred_element_type=aval.dtype,
            )
            return arranged(y).reshape(aval.shape)

        if not may_run(self.implementation, leaf.layout) or "S" in leaf.kinds:
            return multiply()
        return Product(
            multiply, leaf, tuple((place, w.origin.axes[axis]) for place, axis in places.items())
        )

    # --- calls

    def call(self, eqn: Any, operands: Any) -> list:
        """The results of an equation that passes a weight to the programs that it calls."""
        name, params = eqn.primitive.name, eqn.params
        place, self.place = self.place, (*self.place, id(eqn))
        try:
            if name == "scan":
                return self.scan(eqn, operands)
            if name == "while":
                return self.loop(eqn, operands)
            if name == "cond":
                arrays, rebuild = weights.split(operands[1:])
                return lax.switch(
                    operands[0],
                    [
                        functools.partial(self.inner, branch, rebuild)
                        for branch in params["branches"]
                    ],
                    *arrays,
                )
            closed = next(value for value in params.values() if open_program(value) is called(eqn))
            if name in ("jit", "pjit", "closed_call", "core_call"):
                results = self.evaluate(open_program(closed), _consts(closed), operands)
                return [
                    _constrained(*pair)
                    for pair in zip(
                        results, params.get("out_shardings", [None] * len(results)), strict=True
                    )
                ]
            if name.startswith("custom_"):
                return self.custom(eqn, closed, operands)
            arrays, rebuild = weights.split(operands)
            if name in ("checkpoint", "remat", "remat2"):
                same = _PassedThrough(operands)
                run = functools.partial(self.inner, closed, rebuild, same=same)
                return same.put_back(
                    jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(
                        *arrays
                    )
                )
            raise UnfitError(f"passed to {name}")
        finally:
            self.place = place

    def inner(
        self, program: Any, rebuild: Any, *arrays: Any, same: "_PassedThrough | None" = None
    ) -> list:
        """The outputs of a called program as arrays, without the weights that `same` takes out."""
        operands = rebuild(arrays)
        results = self.evaluate(open_program(program), _consts(program), operands)
        return [
            self.dense(result, "returned")
            for result in (same.taken_out(results, operands) if same else results)
        ]

    def custom(self, eqn: Any, program: Any, operands: Any) -> list:
        """The results of a function with a custom derivative.

        Its derivative is computed as written, from decompressed weights.
        """
        kind = next(
            (
                one
                for one in (jax.custom_jvp, jax.custom_vjp)
                if eqn.primitive.name.startswith(f"{one.__name__}_call")
            ),
            None,
        )
        if kind is None:
            raise UnfitError(f"passed to {eqn.primitive.name}")
        count = eqn.params.get("num_consts", 0)
        consts = [
            self.dense(one, _described(eqn), "a constant of a function with a custom derivative")
            for one in operands[:count]
        ]
        arrays, rebuild = weights.split(operands[count:])

        def inner(*arrays):
            return self.inner(program, lambda arrays: [*consts, *rebuild(arrays)], *arrays)

        def as_written(*arrays):
            return bind(
                eqn,
                [
                    *consts,
                    *(one.dense() if isinstance(one, Weight) else one for one in rebuild(arrays)),
                ],
            )

        return _with_derivative(kind, inner, as_written)(*arrays)

    def scan(self, eqn: Any, operands: Any) -> list:
        params = eqn.params
        program, consts = open_program(params["jaxpr"]), _consts(params["jaxpr"])
        fixed, carries = scan_counts(eqn)
        full_carry, carry, is_fixed = self.loop_carry(
            program, fixed, operands[fixed : fixed + carries]
        )
        slices = []
        for operand in operands[fixed + carries :]:
            try:
                slices.append(weights.sliced(operand) if isinstance(operand, Weight) else operand)
            except UnfitError as unfit:
                slices.append(self.dense(operand, "scan", str(unfit)))
        arrays, rebuild = weights.split(slices)
        same = _PassedThrough(operands[fixed + carries :])

        def body(carry, arrays):
            inside = rebuild(arrays)
            results = self.evaluate(
                program, consts, [*operands[:fixed], *full_carry(carry), *inside]
            )
            changed = [
                result for result, keep in zip(results[:carries], is_fixed, strict=True) if not keep
            ]
            stacked = same.taken_out(results[carries:], inside)
            return [self.dense(one, "carried") for one in changed], [
                self.dense(one, "returned") for one in stacked
            ]

        carry, stacked = lax.scan(
            body,
            carry,
            arrays,
            params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*full_carry(carry), *same.put_back(stacked)]

    def loop(self, eqn: Any, operands: Any) -> list:
        params = eqn.params
        fixed, bodies = params["cond_nconsts"], params["body_nconsts"]
        test, loop = params["cond_jaxpr"], params["body_jaxpr"]
        of_test, of_body = operands[:fixed], operands[fixed : fixed + bodies]
        full_carry, carry, is_fixed = self.loop_carry(
            open_program(loop), bodies, operands[fixed + bodies :]
        )

        def condition(carry):
            (result,) = self.evaluate(
                open_program(test), _consts(test), [*of_test, *full_carry(carry)]
            )
            return result

        def body(carry):
            results = self.evaluate(
                open_program(loop), _consts(loop), [*of_body, *full_carry(carry)]
            )
            return [
                self.dense(result, "carried")
                for result, keep in zip(results, is_fixed, strict=True)
                if not keep
            ]

        return full_carry(lax.while_loop(condition, body, carry))

    def loop_carry(self, program: Jaxpr, consts: int, carry: Sequence) -> Any:
        """Splits the carry of a loop: weights that the loop returns unchanged stay outside of it.

        Returns the function that rebuilds the whole carry, the arrays that change, and for each
        operand whether it stays outside.
        """
        same = invariant(program, consts, len(carry))
        is_fixed = [keep and isinstance(one, Weight) for keep, one in zip(same, carry, strict=True)]
        changing = [
            self.dense(one, "carried", "changed by a loop")
            for one, keep in zip(carry, is_fixed, strict=True)
            if not keep
        ]

        def full_carry(changing):
            rest = iter(changing)
            return [one if keep else next(rest) for one, keep in zip(carry, is_fixed, strict=True)]

        return full_carry, changing, is_fixed

    # --- the report

    def dense(self, operand: Any, what: str, reason: str = "returned by the function") -> Any:
        """The operand as an array, decompressed if it is a weight."""
        if not isinstance(operand, Weight):
            return operand
        self.note(operand, what, reason, "")
        return operand.dense()

    def note(self, w: Weight, what: str, reason: str, implementation: str) -> None:
        path = ", ".join(self.paths[source] for source in w.sources)
        self.rows.setdefault(
            (self.place, self.site, path, what), Usage(path, what, reason, implementation)
        )


class _PassedThrough:
    """The weights that a called program returns unchanged; they bypass the call."""

    def __init__(self, operands: Sequence):
        self.operands = operands
        self.which: list[int | None] = []

    def taken_out(self, results: Sequence, inside: Sequence) -> list:
        """The other results; `inside` holds the operands as the called program sees them."""
        places = {id(one): i for i, one in enumerate(inside) if isinstance(one, Weight)}
        self.which = [places.get(id(result)) for result in results]
        return [result for result, i in zip(results, self.which, strict=True) if i is None]

    def put_back(self, results: Sequence) -> list:
        """All results, with the weights back in their positions."""
        rest = iter(results)
        return [next(rest) if i is None else self.operands[i] for i in self.which]


def _consts(program: Any) -> Sequence:
    return program.consts if isinstance(program, ClosedJaxpr) else ()


def _constrained(result, sharding):
    """The output of a compiled function, with the sharding that the function requests."""
    placed = isinstance(sharding, jax.sharding.Sharding) and not isinstance(
        result, Weight | Product
    )
    return lax.with_sharding_constraint(result, sharding) if placed else result


def _described(eqn: Any) -> str:
    return " ".join([eqn.primitive.name, *(str(atom.aval.shape) for atom in eqn.invars)])


def _with_derivative(kind: Any, run: Callable, as_written: Callable) -> Callable:
    """A function that computes `run`, with the derivative of the equivalent `as_written`."""
    function = kind(run)
    if kind is jax.custom_jvp:
        function.defjvp(lambda primals, tangents: jax.jvp(as_written, primals, tangents))
    else:
        function.defvjp(
            functools.partial(jax.vjp, as_written), lambda pull, cotangents: pull(cotangents)
        )
    return function
