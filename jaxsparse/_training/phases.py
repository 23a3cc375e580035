"""The phases of a training run: their boundaries as steps, and plans that change at them."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from jaxsparse import _checks
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Leaf, Plan, check_plan

__all__ = ["as_step", "in_stages", "phases", "with_patterns"]


def as_step(call: str, name: str, value: Any, total_steps: int | None) -> int:
    """Converts a boundary to an optimizer step.

    An int is a step; a float is a fraction of `total_steps`, rounded half up.

    Raises:
      TypeError: the boundary is not a number.
      ValueError: it is below 0 or beyond the end of training, or it is a fraction that rounds to 0.
    """
    if isinstance(value, numbers.Integral):
        step = int(value)
        if step < 0 or (total_steps is not None and step > total_steps):
            bound = "below 0" if step < 0 else f"above total_steps={total_steps}"
            raise ValueError(
                f"{call}: {name}={step} is {bound}. Pass a step as an int, or a fraction as a "
                "float."
            )
        return step
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{call}: `{name}` must be a step or a fraction of total_steps, not {value!r}. Under "
            "optax.inject_hyperparams, name it in `static_args`."
        )
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(
            f"{call}: {name}={value} is not in [0, 1]. Pass a fraction of total_steps as a float, "
            "or a step as an int."
        )
    if total_steps is None:
        raise ValueError(
            f"{call}: {name}={value} is a fraction of total_steps, which is missing. Pass "
            f"total_steps, or {name} as an int."
        )
    step = math.floor(value * total_steps + 0.5)
    if value and not step:
        raise ValueError(
            f"{call}: {name}={value} of total_steps={total_steps} rounds to step 0. Pass 0, or "
            "train longer."
        )
    return step


def phases(call: str, total_steps: int, dense_until: Any, fine_tune_from: Any) -> tuple[int, int]:
    """The steps at which the dense phase ends and fine-tuning begins; every phase has a step.

    Raises:
      TypeError: `total_steps` is not an integer, or a boundary is not a number.
      ValueError: a boundary is out of range, the boundaries are not in order, or no steps are left
        for a phase.
    """
    total = _checks.integer(total_steps, f"{call}: `total_steps`")
    begin = as_step(call, "dense_until", dense_until, total)
    end = as_step(call, "fine_tune_from", fine_tune_from, total)
    for phase, first, last in (
        ("sparsification, from dense_until to fine_tune_from", begin, end),
        ("the fine-tune phase", end, total),
    ):
        if first >= last:
            raise ValueError(
                f"{call}: no steps are left for {phase}: dense_until is step {begin}, "
                f"fine_tune_from step {end}, total_steps {total}. Pass them in increasing order."
            )
    return begin, end


def with_patterns(call: str, plan: Plan, change: Callable[[Leaf, Pattern], Pattern]) -> Plan:
    """Replaces the pattern of each sparse leaf of a plan by `change(leaf, pattern)`."""
    check_plan(call, plan)
    return Plan(
        tuple(
            dataclasses.replace(leaf, pattern=change(leaf, leaf.pattern)) if leaf.pattern else leaf
            for leaf in plan.leaves
        )
    )


def in_stages(
    call: str, plan: Plan, stages: Callable[[Leaf, Pattern], list[Pattern]], begin: int, end: int
) -> tuple[tuple[Plan, int], ...]:
    """The plans that lead to `plan`, each with the step at which it ends.

    Every leaf goes through its stages in equal intervals.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: a leaf has more stages than there are steps from `begin` to `end`.
    """
    check_plan(call, plan)
    stages_by_path = {leaf.path: stages(leaf, leaf.pattern) for leaf in plan.leaves if leaf.pattern}
    for path, patterns in stages_by_path.items():
        if len(patterns) > end - begin:
            raise ValueError(
                f"{call}: {path} goes through {len(patterns)} stages, "
                f"{', '.join(map(str, patterns))}, but there are only {end - begin} steps from "
                f"step {begin} to {end}. Train longer, or move the boundaries."
            )
    starts = {
        path: [begin + i * (end - begin) // len(patterns) for i in range(len(patterns))]
        for path, patterns in stages_by_path.items()
    }
    cuts = sorted({start for one in starts.values() for start in one[1:]})

    def before(cut):
        return with_patterns(
            call,
            plan,
            lambda leaf, _: stages_by_path[leaf.path][
                sum(start < cut for start in starts[leaf.path]) - 1
            ],
        )

    return tuple((before(cut), cut) for cut in cuts)
