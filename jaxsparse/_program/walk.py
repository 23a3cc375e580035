"""The walk over a traced program and the programs it calls, shared by every analysis."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxsparse._program.flow import NOTHING, Value, outputs, sliced, stacked

__all__ = [
    "INLINED",
    "Call",
    "Fold",
    "bind",
    "called",
    "calls",
    "invariant",
    "open_program",
    "scan_counts",
    "walk",
]


INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")


class Call(NamedTuple):
    """A program that an equation calls.

    Attributes:
      program: the program.
      values: what is known of its inputs.
    """

    program: Jaxpr
    values: list[Value]


@runtime_checkable
class Fold(Protocol):
    """An analysis of a program: what to do at each equation and each called program."""

    def visit(self, eqn: Any, values: list[Value], outputs: list[Value]) -> None:
        """Handles an equation that calls no program, given its operands and results."""

    def lose(self, eqn: Any, values: list[Value]) -> None:
        """Handles values that the walk stops following.

        These are the carries that a loop changes, and results that differ between branches.
        """

    def enter(self, eqn: Any) -> Any:
        """Returns the fold for one program that an equation calls."""

    def leave(self, eqn: Any, inner: list) -> None:
        """Combines the folds of the programs that an equation calls."""


SomeFold = TypeVar("SomeFold", bound=Fold)


def walk(program: Jaxpr, values: Sequence[Value], fold: SomeFold) -> list[Value]:
    """Follows values through a program and those it calls; returns the values of its outputs."""
    known = dict(zip(program.invars, values, strict=True))

    def value_of(atom):
        return NOTHING if isinstance(atom, Literal) else known.get(atom, NOTHING)

    for eqn in program.eqns:
        operands = [value_of(atom) for atom in eqn.invars]
        inner = calls(eqn, operands)
        if inner is None:
            results = outputs(eqn, operands)
            fold.visit(eqn, operands, results)
        else:
            fold.lose(eqn, changed_carry(eqn, operands))
            folds = [fold.enter(eqn) for _ in inner]
            ends = [
                walk(call.program, call.values, one) for call, one in zip(inner, folds, strict=True)
            ]
            fold.leave(eqn, folds)
            results = returned(eqn, operands, ends)
            if eqn.primitive.name == "cond":
                fold.lose(
                    eqn,
                    [
                        one
                        for end in ends
                        for one, result in zip(end, results, strict=True)
                        if not result.origins
                    ],
                )
        known.update(
            (var, value) for var, value in zip(eqn.outvars, results, strict=True) if any(value)
        )
    return [value_of(atom) for atom in program.outvars]


# --- programs that equations call


def open_program(program: Any) -> Any:
    """Returns a program without its constants."""
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def scan_counts(eqn: Any) -> tuple[int, int]:
    """The numbers of constants and of carries of a scan."""
    if "num_consts" in eqn.params:  # before jax 0.12
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carries, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carries)


def invariant(program: Jaxpr, consts: int, carries: int) -> list[bool]:
    """For each carry of a loop, whether the loop body returns it unchanged."""
    inputs = program.invars[consts : consts + carries]
    return [inner is outer for inner, outer in zip(inputs, program.outvars[:carries], strict=True)]


def bind(eqn: Any, operands: Sequence) -> list:
    """Evaluates an equation on operands and returns its results."""
    # before jax 0.12, get_bind_params also returns the functions that the equation calls
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with getattr(eqn.ctx, "manager", contextlib.nullcontext()):
        out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def carry_of(eqn: Any, values: Sequence[Value]) -> tuple[list[Value], list[bool]]:
    """The carries of a loop, and for each whether the loop body returns it unchanged."""
    if eqn.primitive.name == "while":
        consts = eqn.params["body_nconsts"]
        carry = list(values[eqn.params["cond_nconsts"] + consts :])
        return carry, invariant(open_program(eqn.params["body_jaxpr"]), consts, len(carry))
    consts, carries = scan_counts(eqn)
    return list(values[consts : consts + carries]), invariant(
        open_program(eqn.params["jaxpr"]), consts, carries
    )


def kept_carry(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """What is known of a loop's carries at every step: nothing for those that it changes."""
    return [value if same else NOTHING for value, same in zip(*carry_of(eqn, values), strict=True)]


def changed_carry(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """What is known, before a loop, of the carries that it changes."""
    if eqn.primitive.name not in ("scan", "while"):
        return []
    return [value for value, same in zip(*carry_of(eqn, values), strict=True) if not same]


def calls(eqn: Any, values: Sequence[Value]) -> list[Call] | None:
    """The programs that an equation calls, with what is known of their inputs.

    None if it calls no program that can be followed.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        carry = kept_carry(eqn, values)
        return [
            Call(open_program(params["cond_jaxpr"]), [*values[:cond], *carry]),
            Call(open_program(params["body_jaxpr"]), [*values[cond : cond + body], *carry]),
        ]
    if name == "cond":
        return [Call(open_program(branch), list(values[1:])) for branch in params["branches"]]
    if name == "scan":
        consts, carries = scan_counts(eqn)
        slices = map(sliced, values[consts + carries :])
        return [
            Call(
                open_program(params["jaxpr"]), [*values[:consts], *kept_carry(eqn, values), *slices]
            )
        ]
    only = called(eqn)
    return None if only is None else [Call(only, list(values))]


def called(eqn: Any) -> Jaxpr | None:
    """The one program that an equation calls with exactly its own operands, or None."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        program: Any = open_program(eqn.params.get(key))
        if isinstance(program, Jaxpr) and len(program.invars) == len(eqn.invars):
            pairs = zip(program.invars, eqn.invars, strict=True)
            if all(
                isinstance(var.aval, ShapedArray) and var.aval.ndim == atom.aval.ndim
                for var, atom in pairs
            ):
                return program
    return None


def returned(eqn: Any, values: Sequence[Value], ends: list[list[Value]]) -> list[Value]:
    """What is known of an equation's outputs, given the outputs of the programs that it calls."""
    name = eqn.primitive.name
    if name == "while":
        return kept_carry(eqn, values)
    if name == "scan":
        consts, carries = scan_counts(eqn)
        slices = values[consts + carries :]
        return [
            *kept_carry(eqn, values),
            *(stacked(value, slices, eqn.params["length"]) for value in ends[0][carries:]),
        ]
    if name == "cond":
        return [_either(one) for one in zip(*ends, strict=True)]
    return ends[0]


def _either(values: Sequence[Value]) -> Value:
    """Joins the values of several branches: those that derive from inputs must agree."""
    derived = [value for value in values if value.origins]
    if not derived or any(value != derived[0] for value in derived):
        return NOTHING
    return derived[0] if len(derived) == len(values) else Value(derived[0].origins)
