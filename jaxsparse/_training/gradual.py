"""Gradual pruning: the density falls to its planned value."""

import jax
import optax

from jaxsparse._plan.plan import Plan
from jaxsparse._training.phases import phases, with_patterns
from jaxsparse._training.renew import BY_MAGNITUDE, Renew, staged
from jaxsparse._training.rewire import rewire
from jaxsparse._training.schedules import gradual_density

__all__ = ["gradual"]


def gradual(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    initial: float = 1.0,
    dense_until: int | float = 0.05,
    fine_tune_from: int | float = 0.7,
    every: int | jax.Array = 1,
    renew: Renew = BY_MAGNITUDE,
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning: the density falls along a cubic to its planned value; then masks stay.

    It applies to `Unstructured` and `Block`. The gradient is masked: non-participating weights are
    only updated by the optimizer's own momentum and weight decay.

    Args:
      inner: any optax optimizer.
      plan: which leaf follows which pattern in the end.
      total_steps: the optimizer steps of the whole run.
      initial: the density at `dense_until`.
      dense_until: the step up to which every weight participates.
      fine_tune_from: the step at which the planned density is reached; the masks of that step stay.
      every: the steps between two changes of the masks, counted from `dense_until`; 100 to 1000 in
        the paper.
      renew: how masks are renewed, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` reads its masks from the state.

    Raises:
      TypeError: `plan` is not a plan, or an argument is not a number.
      ValueError: no leaf of the plan is sparse, a leaf is planned with another pattern or already
        follows a schedule, an argument is out of range, or no steps are left for a phase.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.arange(100.0)}
      >>> plan = js.plan(params, {"w": js.Unstructured(0.1)})
      >>> tx = js.recipes.gradual(
      ...     optax.sgd(0.0), plan, total_steps=6, dense_until=1, fine_tune_from=4
      ... )
      >>> state = tx.init(params)
      >>> for step in range(6):
      ...     print(int(js.masks(state)["w"].sum()), end=" ")
      ...     _, state = tx.update(params, state, params)
      100 100 37 13 10 10

    References:
      Zhu and Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression (arXiv:1710.01878).
    """
    call = "recipes.gradual"
    begin, end = phases(call, total_steps, dense_until, fine_tune_from)

    def falling(leaf, pattern):
        if not pattern.adjustable:
            raise ValueError(
                f"{call}: {leaf.path} is planned as {pattern}, whose density is fixed. Use "
                "recipes.sdgf."
            )
        if pattern.schedule is not None:
            raise ValueError(
                f"{call}: the density of {leaf.path} follows a schedule. Plan it with its final "
                "density, a number."
            )
        if initial < pattern.density:
            raise ValueError(
                f"{call}: initial={initial} is below {pattern.density}, the density planned for "
                f"{leaf.path}. Pass a higher density."
            )
        density = gradual_density(pattern.density, begin=begin, end=end, initial=initial)
        return pattern.with_density(density)

    renew = staged(renew, [(with_patterns(call, plan, falling), end)])
    return rewire(
        inner, plan, renew=renew, every=every, begin=begin, until=end + 1, gradient="masked"
    )
