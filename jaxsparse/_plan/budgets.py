"""Layer budgets: how a density of the whole is shared among the layers of a plan."""

import dataclasses
import math

from jaxsparse import _checks
from jaxsparse._plan.plan import Leaf, Plan, check_plan

__all__ = ["layer_budget"]


def layer_budget(plan: Plan, density: float, method: _checks.Budget) -> Plan:
    """Shares a density among the leaves that a plan makes `Unstructured` or `Block`; the others
    stay as they are.

    Layer l keeps the fraction `d_l = min(1, c * r_l)`, with c such that all of them together keep
    `density`. A layer that c would raise over 1 is dense and c is solved again for the rest. The
    axes of a stack, as under `nn.scan`, are left
    out: every weight in it is a layer of the same shape.

    Args:
      plan: which leaf follows which pattern.
      density: the fraction that these leaves keep together, in (0, 1].
      method: `"uniform"`, `r_l = 1`; `"er"`, `r_l = (n_in + n_out) / (n_in * n_out)` with the last
        two axes of the layer; `"erk"`, the sum of all its sizes over their product; `"global"`, one
        threshold for all leaves of equal pattern, which shares it by magnitude.

    Returns:
      The plan with those densities. Exact up to the rounding of each leaf's own number.

    Raises:
      TypeError: `plan` is no plan, or `density` is no number.
      ValueError: `density` is not in (0, 1], `method` is none of the four, no leaf is
        `Unstructured` or `Block`, or the density of one follows a schedule.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"a": jnp.zeros((10, 10)), "b": jnp.zeros((10, 90))}
      >>> budget = js.layer_budget(js.plan(params, {"*": js.Unstructured(0.1)}), 0.1, "er")
      >>> [round(leaf.density, 4) for leaf in budget.leaves]
      [0.1667, 0.0926]

    References:
      Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity; Evci et al., Rigging the Lottery, section 3, for ERK.
    """
    check_plan("layer_budget", plan)
    density = _checks.density("layer_budget", density)
    _checks.choice("layer_budget", "method", method, _checks.Budget)
    budgeted = [leaf for leaf in plan.sparse.values() if leaf.pattern.adjustable]
    if not budgeted:
        raise ValueError(f"layer_budget: no leaf of the plan is Unstructured or Block:\n{plan}")
    for leaf in budgeted:
        if leaf.pattern.schedule is not None:
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
