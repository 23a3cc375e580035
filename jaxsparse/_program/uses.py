"""How a traced program uses each weight: which axes its products and convolutions sum over."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr
from jaxtyping import PyTree

from jaxsparse._program.flow import (
    REPEATED,
    UNKNOWN,
    Origin,
    Value,
    dots,
    input_value,
    is_looked_up,
)
from jaxsparse._program.walk import walk

__all__ = ["Use", "uses"]

TABLE = "an embedding table: its rows are looked up"


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight by a program.

    Attributes:
      summed: the axes of the weight that the product sums over, ending with the one that groups run
        along; empty where the weight is not an operand of a product.
      stack: the axes that run over separate weights: a loop or an index takes one of them at a
        time, or a batched product keeps them apart.
      reason: why this use rules out groups; empty where it does not.
      decides: whether the reason overrides other uses. An embedding table stays one even if it is
        also multiplied, while a weight that is also logged is still multiplied.
    """

    summed: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    reason: str = ""
    decides: bool = True


def uses(program: Jaxpr, shapes: Sequence[tuple[int, ...]]) -> list[set[Use]]:
    """Finds how a program uses each of its leading inputs, which have these shapes."""
    fold = _Uses([set() for _ in shapes])
    others = len(program.invars) - len(shapes)
    for value in walk(
        program,
        [*(input_value(i, shape) for i, shape in enumerate(shapes)), *[Value()] * others],
        fold,
    ):
        for origin in value.origins:
            if origin.looked_up:
                fold.note(origin, Use(reason=TABLE))
    return fold.uses_by_source


@dataclasses.dataclass(frozen=True)
class _Uses:
    """The fold that records the uses of each input."""

    uses_by_source: list[set[Use]]

    def enter(self, eqn):
        return self

    def leave(self, eqn, inner):
        pass

    def lose(self, eqn: Any, values: list[Value]) -> None:
        for value in values:
            for origin in value.origins:
                changed = Use(
                    reason=f"differs between the steps or branches of a {eqn.primitive.name}"
                )
                self.note(origin, Use(reason=TABLE) if origin.looked_up else changed)

    def visit(self, eqn: Any, values: list[Value], outputs: list[Value]) -> None:
        name = eqn.primitive.name
        if name == "dot_general":
            for (i, summed, batch, free), other in zip(
                dots(eqn), (values[1], values[0]), strict=True
            ):
                row = dict(zip(summed, eqn.params["dimension_numbers"][0][1 - i], strict=True))
                looked_up = [axis for axis in summed if row[axis] in other.one_hot]
                for origin in values[i].origins:
                    self.note(
                        origin,
                        Use(reason=TABLE)
                        if looked_up
                        else _product(origin, summed, batch, free, other),
                    )
        elif name == "conv_general_dilated":
            for origin in values[0].origins:
                self.note(
                    origin, Use(reason=TABLE if origin.looked_up else "the input of a convolution")
                )
            for origin in values[1].origins:
                self.note(origin, _convolution(origin, eqn.params))
        elif name == "ragged_dot_general":
            self.ragged(eqn, values)
        else:
            kept = {origin.source for value in outputs for origin in value.origins}
            for value in values:
                for origin in value.origins:
                    if origin.source not in kept:
                        self.other(origin, f"used by {name}")

    def note(self, origin: Origin, use: Use) -> None:
        self.uses_by_source[origin.source].add(use)

    def other(self, origin: Origin, what: str) -> None:
        """Records a use other than a product."""
        table = what == "used by gather" or origin.looked_up
        self.note(
            origin,
            Use(reason=TABLE)
            if table
            else Use(reason=f"{what}, not by a matrix product", decides=False),
        )

    def ragged(self, eqn: Any, values: list[Value]) -> None:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (summed, batch), groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
        for i, dims in enumerate(((), groups)):
            for origin in values[i].origins:
                separate = (*batch[i], *dims)
                free = [
                    axis for axis in range(len(origin.axes)) if axis not in (*summed[i], *separate)
                ]
                self.note(origin, _product(origin, summed[i], separate, free, values[1 - i]))


def _product(
    origin: Origin, summed: Sequence[int], batch: Sequence[int], free: Sequence[int], other: Value
) -> Use:
    """Describes how a product with `other` uses a weight.

    The product sums over the axes `summed` of the value that derives from the weight, batches over
    `batch` and keeps `free`.
    """
    summed_axes = {axis for i in summed for axis in origin.places(i)}
    kept_axes = {axis for i in (*batch, *free) for axis in origin.places(i)}
    if is_looked_up(origin, summed, free, other):
        return Use(reason=TABLE)
    sliced_axes = {atom.axis for atoms in origin.axes for atom in atoms if atom.stride == 0}
    stack = origin.stack.union(sliced_axes, *(origin.places(i) for i in batch))
    if summed_axes & (kept_axes | stack | origin.hidden) or origin.runs_over(UNKNOWN, summed):
        return Use(reason="reshaped before its matrix product, so its axes cannot be identified")
    if not summed_axes:
        return Use(reason="an operand of an outer product")
    if summed_axes & origin.varies:
        return Use(reason="combined before its product with values that vary along the summed axis")
    if origin.runs_over(REPEATED, free) and not any(map(origin.places, free)):
        return Use(reason="broadcast, so that all outputs of its matrix product are equal")
    return Use(tuple(sorted(summed_axes)), tuple(sorted(stack)))


def _convolution(kernel: Origin, params: PyTree) -> Use:
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return Use(
            reason="the kernel of a grouped convolution, which sums over some input channels only"
        )
    _, channels, *window = params["dimension_numbers"].rhs_spec
    places = [sorted(kernel.places(i)) for i in (*window, channels)]
    untracked = kernel.hidden | kernel.stack & {axis for axes in places for axis in axes}
    if (
        untracked
        or any(len(axes) > 1 for axes in places)
        or kernel.runs_over(UNKNOWN, range(len(kernel.axes)))
    ):
        return Use(reason="reshaped before its convolution, so its axes cannot be identified")
    if not places[-1]:
        return Use(reason="the kernel of a convolution over a single input channel")
    if set(places[-1]) & kernel.varies:
        return Use(
            reason="combined before its convolution with values that vary along the summed axis"
        )
    order = [axis for axes in places for axis in axes]
    return Use(
        tuple(axis for i, axis in enumerate(order) if axis not in order[i + 1 :]),
        tuple(sorted(kernel.stack)),
    )
