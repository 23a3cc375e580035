"""The papers' recipes as optax chains, one call each."""

import optax

from jaxsparse.plan import Plan
from jaxsparse.scores import Score
from jaxsparse.transforms import (
    decay_nonparticipating,
    fix_nonparticipating,
    reset_nonparticipating,
    rewire,
    scale_nonparticipating,
)

__all__ = ["rewired"]


def rewired(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    every: int = 1,
    grad_scale: float = 1.0,
    reset_every: int | None = 1000,
    fix_after: int | None = None,
    decay: float = 0.0,
    score: str | Score = "magnitude",
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 1: rewire by magnitude, update all weights with dense gradients, exploit by RESET, FIX or REGULARIZE.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern.
      every: the steps between two rewirings (`r`).
      grad_scale: the factor on the gradient of non-participating weights (`s`).
      reset_every: the steps between two resets of non-participating weights to 0 (`z`); None for no RESET.
      fix_after: the step from which on masks stay and non-participating weights are 0 (`v`); None for no FIX.
      decay: what non-participating weights lose each step (`beta`, 2e-4 in the paper); 0 for no REGULARIZE.
      score: what masks rank, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan.
      ValueError: no leaf of the plan is sparse, or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> tx = js.recipes.rewired(optax.adamw(1e-3), js.plan(params, {"w": js.NM(2, 4, axis=0)}), reset_every=1000)
      >>> js.masks(tx.init(params))["w"]
      Array([False,  True,  True, False], dtype=bool)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1.
    """
    chain = [
        None if _is(grad_scale, 1) else scale_nonparticipating(grad_scale),
        inner,
        None if fix_after is None else fix_nonparticipating(fix_after),
        None if reset_every is None else reset_nonparticipating(reset_every),
        None if _is(decay, 0) else decay_nonparticipating(decay),
    ]
    return rewire(optax.chain(*(part for part in chain if part)), plan, every=every, until=fix_after, score=score)


def _is(value, number):
    return isinstance(value, (int, float)) and value == number
