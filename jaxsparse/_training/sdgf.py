"""SDGF: structure decay gradient flow."""

import math

import jax
import optax

from jaxsparse import _checks
from jaxsparse._plan.plan import Plan
from jaxsparse._training.phases import in_stages, phases
from jaxsparse._training.renew import BY_MAGNITUDE, Renew, staged
from jaxsparse._training.rewire import rewire

__all__ = ["sdgf"]


def sdgf(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    stages: _checks.StageKind = "stepwise",
    k: int = 16,
    dense_until: int | float = 0.05,
    fine_tune_from: int | float = 0.7,
    every: int | jax.Array = 1,
    renew: Renew = BY_MAGNITUDE,
) -> optax.GradientTransformationExtraArgs:
    """Structure Decay Gradient Flow: the pattern tightens in stages, with dense gradients.

    After the dense phase every leaf goes through its stages in intervals of equal length, up to
    `fine_tune_from`. The last stage is its pattern in the plan, which it then keeps.

    Args:
      inner: any optax optimizer.
      plan: which leaf follows which pattern in the end: `NM`, or `TransposableNM` if it has stages.
      total_steps: the optimizer steps of the whole run.
      stages: `"stepwise"`, those of `stepwise_stages`, such as 7:8, 4:8, 2:8, 1:8; or
        `"geometric"`, those of `geometric_stages`, such as 16:128, 8:64, 4:32, 2:16, 1:8.
      k: the ratio of the group length of the first geometric stage to the last, a power of two.
      dense_until: the step up to which every weight participates.
      fine_tune_from: the step at which the stages end.
      every: the steps between two rewirings, counted from `dense_until`; masks are also renewed
        where a stage begins.
      renew: how masks are renewed, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` reads its masks from the state.

    Raises:
      TypeError: `plan` is not a plan, or an argument is not a number.
      ValueError: no leaf of the plan is sparse, a leaf is planned with another pattern or cannot
        follow one of its stages, an argument is out of range, or no steps are left for a phase or a
        stage.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(1, 4, axis=0)})
      >>> tx = js.recipes.sdgf(optax.sgd(0.0), plan, total_steps=6, dense_until=1, fine_tune_from=4)
      >>> state = tx.init(params)
      >>> for step in range(5):
      ...     print(js.effective_params(params, state)["w"])
      ...     _, state = tx.update(params, state, params)
      [ 1. -4.  3.  2.]
      [ 0. -4.  3.  2.]
      [ 0. -4.  3.  0.]
      [ 0. -4.  0.  0.]
      [ 0. -4.  0.  0.]

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3 (arXiv:2402.04744).
    """
    call = "recipes.sdgf"
    begin, end = phases(call, total_steps, dense_until, fine_tune_from)
    _checks.choice(call, "stages", stages, _checks.StageKind)

    def stages_of(leaf, pattern):
        patterns = pattern.stages(stages, k)
        if not patterns:
            raise ValueError(
                f"{call}: {leaf.path} is planned as {pattern}, which has no {stages} stages. Pass "
                "other `stages`. Use recipes.gradual for patterns of any density."
            )
        _check_first(call, leaf, patterns[0])
        return patterns

    renew = staged(renew, in_stages(call, plan, stages_of, begin, end))
    return rewire(inner, plan, renew=renew, every=every, begin=begin)


def _check_first(call, leaf, first):
    """Refuses a leaf that cannot follow its first stage."""
    for axis, m, last in zip(first.axes, first.multiples, leaf.pattern.multiples, strict=True):
        size = leaf.shape[axis]
        if size % m:
            raise ValueError(
                f"{call}: axis {axis} of {leaf.path} has size {size}, not a multiple of {m}, the "
                f"group length of its first stage {first}. Pass "
                f'k={math.gcd(size // last, m // last)}, or stages="stepwise".'
            )
