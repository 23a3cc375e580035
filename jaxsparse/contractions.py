"""A traced program to how it uses each of its inputs: which axes a matrix product or a convolution sums over."""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["Use", "uses"]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of an input by a program.

    Attributes:
      summed: the axes of the input that a product sums over, the one along which groups run last; empty where it is not
        an operand of a product.
      stack: the axes that run over separate weights: what a scan slices, what a batched product does not mix.
      reason: why the use allows no groups, if so.
    """

    summed: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    reason: str = ""


class Origin(NamedTuple):
    """Which input a value is made of, its elements only moved about.

    Attributes:
      source: the number of the input.
      axes: for each axis of the value, the axes of the input that it runs over in row-major order (none for an axis of
        size 1 that was added), or None if that cannot be told.
      stack: the axes of the input that a scan slices.
    """

    source: int
    axes: tuple[tuple[int, ...] | None, ...]
    stack: tuple[int, ...] = ()


_SAME_SHAPE = {
    "convert_element_type",
    "copy",
    "copy_p",
    "reduce_precision",
    "stop_gradient",
    "sharding_constraint",
    "optimization_barrier",
    "name",
}
_PARTS = {"slice", "dynamic_slice", "split"}


def uses(program: ClosedJaxpr, count: int) -> list[set[Use]]:
    """How a program uses each of its first `count` inputs."""
    found: list[set[Use]] = [set() for _ in range(count)]
    inputs = program.jaxpr.invars[:count]
    origins: list[Origin | None] = [Origin(i, tuple((axis,) for axis in range(len(var.aval.shape)))) for i, var in enumerate(inputs)]
    _follow(program.jaxpr, [*origins, *[None] * (len(program.jaxpr.invars) - count)], found)
    return found


def _follow(jaxpr: Jaxpr, origins: Iterable[Origin | None], found: list[set[Use]]) -> list[Origin | None]:
    known = {var: origin for var, origin in zip(jaxpr.invars, origins, strict=True) if origin is not None}

    def origin_of(atom):
        return None if isinstance(atom, Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        operands = [origin_of(atom) for atom in eqn.invars]
        if any(operands):
            outputs = _equation(eqn, operands, found)
            known.update((var, origin) for var, origin in zip(eqn.outvars, outputs, strict=True) if origin is not None)
    return [origin_of(atom) for atom in jaxpr.outvars]


def _equation(eqn, operands, found) -> list[Origin | None]:
    """Notes how an equation uses its tracked operands; returns what its outputs are made of."""
    name, params = eqn.primitive.name, eqn.params
    none: list[Origin | None] = [None] * len(eqn.outvars)

    if name in _SAME_SHAPE:
        return operands[: len(eqn.outvars)]
    if name in _PARTS and operands[0]:
        return [operands[0]] * len(eqn.outvars)
    if name == "transpose":
        return [operands[0]._replace(axes=tuple(operands[0].axes[i] for i in params["permutation"]))]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [operands[0]._replace(axes=_reshaped(operands[0].axes, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape))]
    if name == "dot_general":
        for operand, summed, batch in zip(operands, *params["dimension_numbers"], strict=True):
            if operand:
                found[operand.source].add(_product(operand, summed, batch))
        return none
    if name == "conv_general_dilated":
        lhs, kernel = operands
        if lhs:
            found[lhs.source].add(Use(reason="the input of a convolution"))
        if kernel:
            found[kernel.source].add(_convolution(kernel, params))
        return none
    if name == "gather" and operands[0]:
        found[operands[0].source].add(Use(reason="a table that rows are looked up in"))
        return none

    inner = _calls(eqn, operands)
    if inner is None:
        for operand in operands:
            if operand:
                found[operand.source].add(Use(reason=f"used by {name}, not by a matrix product"))
        return none
    outputs = [_follow(jaxpr, origins, found) for jaxpr, origins in inner]
    return none if name in ("scan", "while", "cond") else outputs[0]


def _calls(eqn, operands):
    """The programs that an equation calls, each with the origins of its inputs; None if it calls none that is understood."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        carry = operands[cond + body :]
        return [
            (_open(params["cond_jaxpr"]), operands[:cond] + carry),
            (_open(params["body_jaxpr"]), operands[cond : cond + body] + carry),
        ]
    if name == "cond":
        return [(_open(branch), operands[1:]) for branch in params["branches"]]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        jaxpr = _open(params.get(key))
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == len(operands):
            if name == "scan":  # an input with one axis less inside is sliced along its first
                operands = [
                    origin
                    and (
                        origin._replace(axes=origin.axes[1:], stack=origin.stack + (origin.axes[0] or ()))
                        if inner.aval.ndim < outer.aval.ndim  # type: ignore[attr-defined]
                        else origin
                    )
                    for origin, outer, inner in zip(operands, eqn.invars, jaxpr.invars, strict=True)
                ]
            return [(jaxpr, operands)]
    return None


def _open(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _product(operand: Origin, summed, batch) -> Use:
    sources = [operand.axes[i] for i in summed]
    if any(source is None for source in sources):
        return Use(reason="reshaped before its matrix product, so that its axes cannot be told")
    if not any(sources):  # no axis is summed over, or only ones of size 1 that were added
        return Use(reason="an operand of an outer product")
    stack = operand.stack + tuple(axis for i in batch for axis in operand.axes[i] or ())
    return Use(tuple(sorted(axis for source in sources for axis in source)), tuple(sorted(stack)))


def _convolution(kernel: Origin, params) -> Use:
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return Use(reason="the kernel of a grouped convolution, which sums over a part of the input channels only")
    _, channels, *window = params["dimension_numbers"].rhs_spec
    sources = [kernel.axes[i] for i in (*window, channels)]
    if any(source is None or len(source) != 1 for source in sources):
        return Use(reason="reshaped before its convolution, so that its axes cannot be told")
    return Use(tuple(axis for (axis,) in sources), kernel.stack)


def _reshaped(axes, before, after):
    """The origins of the axes after a reshape: kept and merged axes are followed, parts of an axis are not."""
    result, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        taken: list[int] = []
        made: list[int] = []
        while True:  # the shortest runs of axes with the same number of elements
            have, want = math.prod(before[k] for k in taken), math.prod(after[k] for k in made)
            if taken and made and have == want:
                break
            if (have <= want and i < len(before)) or j >= len(after):
                if i >= len(before):
                    break
                taken.append(i)
                i += 1
            else:
                made.append(j)
                j += 1
        merged = tuple(axis for k in taken for axis in (axes[k] or ())) if all(axes[k] is not None for k in taken) else None
        long = [k for k in made if after[k] != 1]
        if len(long) > 1:
            merged = None
        result += [merged if after[k] != 1 or len(made) == 1 else () for k in made]
    return tuple(result)
