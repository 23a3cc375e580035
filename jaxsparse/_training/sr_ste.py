"""SR-STE: the sparse-refined straight-through estimator."""

import jax
import optax

from jaxsparse._plan.plan import Plan, check_plan
from jaxsparse._training.phases import as_step
from jaxsparse._training.pieces import add_decayed_nonparticipating
from jaxsparse._training.renew import BY_MAGNITUDE, Renew
from jaxsparse._training.rewire import rewire

__all__ = ["sr_ste"]


def sr_ste(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    weight_decay: float | jax.Array = 2e-4,
    dense_until: int | float = 0,
    total_steps: int | None = None,
    every: int | jax.Array = 1,
    renew: Renew = BY_MAGNITUDE,
) -> optax.GradientTransformationExtraArgs:
    """SR-STE: trains with dense gradients and pulls non-participating weights towards zero.

    The gradient of a non-participating weight becomes `g + weight_decay * w`, before the optimizer.

    Args:
      inner: any optax optimizer.
      plan: which leaf follows which pattern.
      weight_decay: the strength of the pull (`lambda` in the paper).
      dense_until: the step up to which every weight participates.
      total_steps: the optimizer steps of the whole run; needed if `dense_until` is a fraction.
      every: the steps between two rewirings, counted from `dense_until`.
      renew: how masks are renewed, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` reads its masks from the state.

    Raises:
      TypeError: `plan` is not a plan, or an argument is not a number.
      ValueError: no leaf of the plan is sparse, an argument is out of range, or no steps are left
        for the sparse phase.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.recipes.sr_ste(optax.sgd(1.0), plan, weight_decay=0.25)
      >>> updates, _ = tx.update({"w": jnp.zeros(4)}, tx.init(params), params)
      >>> updates["w"]
      Array([-0.25, -0.  , -0.  , -0.5 ], dtype=float32)

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
      (arXiv:2102.04010); the dense phase as in Bambhaniya et al., Progressive Gradient Flow for
      Robust N:M Sparsity Training in Transformers, table 12 (arXiv:2402.04744).
    """
    check_plan("recipes.sr_ste", plan)
    begin = as_step("recipes.sr_ste", "dense_until", dense_until, total_steps)
    if begin == total_steps:
        raise ValueError(
            f"recipes.sr_ste: no steps are left for the sparse phase: dense_until is step {begin} "
            f"of {total_steps}. Pass an earlier step."
        )
    return rewire(
        optax.chain(add_decayed_nonparticipating(weight_decay), inner),
        plan,
        every=every,
        begin=begin,
        renew=renew,
    )
