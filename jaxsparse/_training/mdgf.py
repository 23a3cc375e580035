"""MDGF: mask decay gradient flow."""

import math

import jax
import optax

from jaxsparse import _checks
from jaxsparse._plan.plan import Plan
from jaxsparse._training.phases import phases
from jaxsparse._training.renew import BY_MAGNITUDE, Renew
from jaxsparse._training.rewire import rewire
from jaxsparse._training.schedules import exponential_decay, linear_decay

__all__ = ["mdgf"]

_LAST_FACTOR = 0.01  # the exponential reaches this before it is cut to 0


def mdgf(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    curve: _checks.Curve = "exponential",
    dense_until: int | float = 0.05,
    fine_tune_from: int | float = 0.7,
    gradient: _checks.Gradient = "masked",
    every: int | jax.Array = 1,
    renew: Renew = BY_MAGNITUDE,
) -> optax.GradientTransformationExtraArgs:
    """Mask Decay Gradient Flow: non-participating weights fade out of the forward pass.

    They are scaled by the decay factor D. There are three phases: dense; decay, in which D falls
    from 1; and fine-tuning, in which D is exactly 0. Masks follow the weights in the last two. D is
    kept in the optimizer state, where `effective_params` and `flax.intercept` find it.

    Args:
      inner: any optax optimizer.
      plan: which leaf follows which pattern.
      total_steps: the optimizer steps of the whole run.
      curve: how D falls, with j the steps since `dense_until`: `"linear"`, `D = 1 - beta * j`,
        which reaches 0 at `fine_tune_from`; or `"exponential"`, `D = exp(-beta * j)`, which would
        be 0.01 at `fine_tune_from` and is cut to 0 there.
      dense_until: the step up to which every weight participates; 1.25 to 10 % of training in the
        paper.
      fine_tune_from: the step from which D is 0; the paper recommends about 70 % of training.
      gradient: `"masked"`: D also scales the gradient of non-participating weights, as in the
        paper; `"dense"`: it does not, as in the authors' code.
      every: the steps between two rewirings, counted from `dense_until`.
      renew: how masks are renewed, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` reads its masks from the state.

    Raises:
      TypeError: `plan` is not a plan, or an argument is not a number.
      ValueError: no leaf of the plan is sparse, an argument is out of range, or no steps are left
        for a phase.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.recipes.mdgf(
      ...     optax.sgd(0.0), plan, total_steps=10, curve="linear", dense_until=1, fine_tune_from=5
      ... )
      >>> state = tx.init(params)
      >>> for step in range(7):
      ...     print(js.effective_params(params, state)["w"])
      ...     _, state = tx.update(params, state, params)
      [ 1. -4.  3.  2.]
      [ 1. -4.  3.  2.]
      [ 0.75 -4.    3.    1.5 ]
      [ 0.5 -4.   3.   1. ]
      [ 0.25 -4.    3.    0.5 ]
      [ 0. -4.  3.  0.]
      [ 0. -4.  3.  0.]

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3 (arXiv:2402.04744).
    """
    call = "recipes.mdgf"
    begin, end = phases(call, total_steps, dense_until, fine_tune_from)
    _checks.choice(call, "curve", curve, _checks.Curve)
    if curve == "linear":
        factor = linear_decay(1 / (end - begin), begin)
    else:
        factor = exponential_decay(-math.log(_LAST_FACTOR) / (end - begin), begin, end)
    return rewire(
        inner, plan, every=every, begin=begin, decay_factor=factor, gradient=gradient, renew=renew
    )
