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
    """Structure Decay Gradient Flow: the pattern tightens in stages, down to the one planned; the
    gradient is dense.

    After the dense phase every leaf goes through its stages, of which the last is its pattern in
    the plan, in intervals of equal length up to `fine_tune_from`; from there on it keeps the last.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern in the end: `NM`, or `TransposableNM` where its stages
        exist.
      total_steps: the optimizer steps of the whole run.
      stages: `"stepwise"`, those of `stepwise_stages`, as 7:8, 4:8, 2:8, 1:8; `"geometric"`, those
        of `geometric_stages`, as 16:128, 8:64, 4:32, 2:16, 1:8.
      k: how much longer the groups of the first geometric stage are, a power of two.
      dense_until: the step up to which every weight participates.
      fine_tune_from: the step at which the stages end.
      every: the steps between two rewirings, counted from `dense_until`; masks are made anew where
        a stage begins, too.
      renew: how masks are renewed, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan, or an argument is no number.
      ValueError: no leaf of the plan is sparse, a leaf is planned under another pattern or cannot
        follow one of its stages, an argument is out of range, or a phase or a stage has no step.

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
      section 3.
    """
    call = "recipes.sdgf"
    begin, end = phases(call, total_steps, dense_until, fine_tune_from)
    _checks.choice(call, "stages", stages, _checks.StageKind)

    def stages_of(leaf, pattern):
        found = pattern.stages(stages, k)
        if not found:
            raise ValueError(
                f"{call}: {leaf.path} is planned {pattern}, which has no {stages} stages. Pass "
                "other `stages`. Use recipes.gradual for patterns of any density."
            )
        _check_first(call, leaf, found[0])
        return found

    renew = staged(renew, in_stages(call, plan, stages_of, begin, end))
    return rewire(inner, plan, renew=renew, every=every, begin=begin)


def _check_first(call, leaf, first):
    """Refuses a leaf that cannot follow its first stage."""
    for axis, m, last in zip(first.axes, first.multiples, leaf.pattern.multiples, strict=True):
        size = leaf.shape[axis]
        if size % m:
            raise ValueError(
                f"{call}: axis {axis} of {leaf.path} has size {size}, not a multiple of {m}, the "
                f"group of its first stage {first}. Pass k={math.gcd(size // last, m // last)}, or "
                'stages="stepwise".'
            )
