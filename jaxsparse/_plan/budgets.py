"""Layer budgets: how an overall density is distributed over the layers of a plan."""

import dataclasses
import math
from typing import cast

from jaxsparse import _checks
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Leaf, Plan, check_plan

__all__ = ["layer_budget"]


def layer_budget(plan: Plan, density: float, method: _checks.Budget) -> Plan:
    """Distributes a density over the `Unstructured` and `Block` leaves of a plan.

    The other leaves do not change. Layer l keeps the fraction `d_l = min(1, c * r_l)`, with c such
    that all of these layers together keep `density`: a layer that c would raise above 1 is dense,
    and c is solved again for the rest. In a stack, as under `nn.scan`, every weight is a layer of
    the same shape.

    Args:
      plan: which leaf follows which pattern.
      density: the fraction that these leaves keep together, in (0, 1].
      method: `"uniform"`, `r_l = 1`; `"er"`, `r_l = (n_in + n_out) / (n_in * n_out)` with the last
        two axes of the layer; `"erk"`, the sum of all its sizes over their product; `"global"`, one
        threshold for all leaves with an equal pattern, so that magnitudes decide the distribution.

    Returns:
      The plan with these densities, exact up to the rounding in each leaf.

    Raises:
      TypeError: `plan` is not a plan, or `density` is not a number.
      ValueError: `density` is not in (0, 1], `method` is not one of the four, no leaf is
        `Unstructured` or `Block`, or the density of such a leaf follows a schedule.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"a": jnp.zeros((10, 10)), "b": jnp.zeros((10, 90))}
      >>> budget = js.layer_budget(js.plan(params, {"*": js.Unstructured(0.1)}), 0.1, "er")
      >>> [round(leaf.density, 4) for leaf in budget.leaves]
      [0.1667, 0.0926]

    References:
      Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity (arXiv:1707.04780); Evci et al., Rigging the Lottery, section 3, for ERK
      (arXiv:1911.11134).
    """
    check_plan("layer_budget", plan)
    density = _checks.density("layer_budget", density)
    _checks.choice("layer_budget", "method", method, _checks.Budget)
    budgeted = [leaf for leaf in plan.sparse.values() if cast(Pattern, leaf.pattern).adjustable]
    if not budgeted:
        raise ValueError(f"layer_budget: no leaf of the plan is Unstructured or Block:\n{plan}")
    for leaf in budgeted:
        if cast(Pattern, leaf.pattern).schedule is not None:
            raise ValueError(
                f"layer_budget: the density of {leaf.path} follows a schedule. Plan it with a "
                "number, which the budget replaces."
            )
    scope = "global" if method == "global" else "leaf"
    shares = (
        dict.fromkeys((leaf.path for leaf in budgeted), density)
        if method == "global"
        else _solve(budgeted, density, method)
    )

    def share(leaf):
        if leaf.path not in shares:
            return leaf
        pattern = leaf.pattern.with_density(shares[leaf.path], scope)
        return dataclasses.replace(leaf, pattern=pattern)

    return Plan(tuple(map(share, plan.leaves)))


def _solve(leaves: list[Leaf], density: float, method: str) -> dict[str, float]:
    sizes = {leaf.path: math.prod(leaf.shape) for leaf in leaves}
    raw = {leaf.path: _raw(leaf, method) for leaf in leaves}
    dense: set[str] = set()
    while True:
        rest = raw.keys() - dense
        room = density * sum(sizes.values()) - sum(sizes[path] for path in dense)
        weight = sum(raw[path] * sizes[path] for path in rest)
        factor = room / weight if weight else 1.0
        over = {path for path in rest if factor * raw[path] > 1}
        if not over:
            return {path: 1.0 if path in dense else min(factor * raw[path], 1.0) for path in raw}
        dense |= over


def _raw(leaf: Leaf, method: str) -> float:
    sizes = [
        size for axis, size in enumerate(leaf.shape, -len(leaf.shape)) if axis not in leaf.stack
    ]
    if method == "uniform" or not all(sizes):
        return 1.0
    if method == "er":
        sizes = sizes[-2:]
    return sum(sizes) / math.prod(sizes)
