"""The papers' recipes as optax chains, one call each.

In each, step t is the forward pass and the update t, the first being 0. A boundary between two
phases is the first step of the
second: an int is an optimizer step, a float in [0, 1] the fraction of `total_steps`, rounded to the
nearest step.
"""

import jax
import jax.numpy as jnp
import optax

from jaxsparse._plan.patterns import integer
from jaxsparse._plan.plan import Plan, check_plan, leaf_paths
from jaxsparse._training.forward import masks_by_path
from jaxsparse._training.phases import as_step
from jaxsparse._training.pieces import (
    add_decayed_nonparticipating,
    decay_nonparticipating,
    fix_nonparticipating,
    reset_nonparticipating,
    scale_nonparticipating,
)
from jaxsparse._training.progressive import gradual, mdgf, sdgf
from jaxsparse._training.rewire import rewire
from jaxsparse._training.scores import BY_GRADIENT, Score
from jaxsparse._training.state import merged_masks, packed

__all__ = ["gradual", "mdgf", "explore_exploit", "sdgf", "sr_ste", "static"]


def explore_exploit(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    every: int = 1,
    grad_scale: float = 1.0,
    reset_every: int | None = 1000,
    fix_after: int | float | None = None,
    total_steps: int | None = None,
    decay: float = 0.0,
    score: str | Score = "magnitude",
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 1: rewire by magnitude, update all weights with dense gradients, exploit by RESET,
    FIX or REGULARIZE.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern.
      every: the steps between two rewirings (`r`).
      grad_scale: the factor on the gradient of non-participating weights (`s`).
      reset_every: the steps between two resets of non-participating weights to 0 (`z`); None for no
        RESET.
      fix_after: the step from which on masks stay and non-participating weights are 0 (`v`, half of
        training in the paper); None for no FIX.
      total_steps: the optimizer steps of the whole run; needed where `fix_after` is a fraction.
      decay: what non-participating weights lose each step (`beta`, 2e-4 in the paper); 0 for no
        REGULARIZE.
      score: what masks rank, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan, or an argument is no number.
      ValueError: no leaf of the plan is sparse, an argument is out of range, or no step is left
        after `fix_after`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.recipes.explore_exploit(optax.adamw(1e-3), plan, reset_every=1000)
      >>> js.masks(tx.init(params))["w"]
      Array([False,  True,  True, False], dtype=bool)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1.
    """
    call = "recipes.explore_exploit"
    check_plan(call, plan)
    # as optax.inject_hyperparams passes it
    if not (reset_every is None or isinstance(reset_every, jax.Array)):
        integer(reset_every, f"{call}: `reset_every`")
    if not (fix_after is None or isinstance(fix_after, jax.Array)):
        fix_after = as_step(call, "fix_after", fix_after, total_steps)
        if fix_after == total_steps:
            raise ValueError(
                f"{call}: the fixed phase has no step: fix_after is step {fix_after} of "
                f"{total_steps}. Fix earlier."
            )
    chain = [
        None if _is(grad_scale, 1) else scale_nonparticipating(grad_scale),
        inner,
        None if fix_after is None else fix_nonparticipating(fix_after),
        None if reset_every is None else reset_nonparticipating(reset_every),
        None if _is(decay, 0) else decay_nonparticipating(decay),
    ]
    return rewire(
        optax.chain(*(part for part in chain if part)),
        plan,
        every=every,
        until=fix_after,
        score=score,
    )


def _is(value, number):
    return isinstance(value, (int, float)) and value == number


def sr_ste(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    decay: float = 2e-4,
    dense_until: int | float = 0,
    total_steps: int | None = None,
    every: int = 1,
    score: str | Score = "magnitude",
) -> optax.GradientTransformationExtraArgs:
    """SR-STE: the dense gradient, and for non-participating weights a pull towards zero, `g + decay
    * w`, before the optimizer.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern.
      decay: the pull (`lambda` in the paper).
      dense_until: the step up to which every weight participates.
      total_steps: the optimizer steps of the whole run; needed where `dense_until` is a fraction.
      every: the steps between two rewirings, counted from `dense_until`.
      score: what masks rank, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan, or an argument is no number.
      ValueError: no leaf of the plan is sparse, an argument is out of range, or no step is left for
        the sparse phase.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.recipes.sr_ste(optax.sgd(1.0), plan, decay=0.25)
      >>> updates, _ = tx.update({"w": jnp.zeros(4)}, tx.init(params), params)
      >>> updates["w"]
      Array([-0.25, -0.  , -0.  , -0.5 ], dtype=float32)

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch; the
      dense phase as in Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity
      Training in Transformers, table 12.
    """
    check_plan("recipes.sr_ste", plan)
    begin = as_step("recipes.sr_ste", "dense_until", dense_until, total_steps)
    if begin == total_steps:
        raise ValueError(
            f"recipes.sr_ste: the sparse phase has no step: dense_until is step {begin} of "
            f"{total_steps}. Begin it earlier."
        )
    return rewire(
        optax.chain(add_decayed_nonparticipating(decay), inner),
        plan,
        every=every,
        begin=begin,
        score=score,
    )


def static(
    inner: optax.GradientTransformation, plan: Plan, *, masks=None, score: str | Score = "magnitude"
) -> optax.GradientTransformationExtraArgs:
    """Prunes once and keeps the masks: weights that do not participate are 0 after the first
    update, and stay 0.

    For the workflow that trains dense, prunes, and trains again: give it the trained weights and a
    fresh optimizer, with the schedule of the first training. The gradient is masked, so that the
    optimizer sees a smaller model.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern.
      masks: a pytree of masks, or an optimizer state that holds some, for the sparse leaves of the
        plan, of any density; None for those of the weights that `init` is called with.
      score: what masks rank, as for `rewire`, but for what needs a gradient, of which there is none
        yet. To prune by such scores pass `masks=jaxsparse.magnitude_masks(scores, plan)`, with
        scores of 0 and above like the parameters.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan.
      ValueError: no leaf of the plan is sparse, `masks` are none, or of other leaves or shapes than
        those of the plan, or `score` needs a gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> tx = js.recipes.static(optax.sgd(1.0), js.plan(params, {"w": js.NM(2, 4, axis=0)}))
      >>> updates, _ = tx.update({"w": jnp.ones(4)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([ 0., -5.,  2.,  0.], dtype=float32)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.1.
    """
    check_plan("recipes.static", plan)
    if isinstance(score, str) and score in BY_GRADIENT:
        raise ValueError(
            f"recipes.static: score={score!r} needs a gradient, and masks are made before there is "
            "one. Compute the scores and pass masks=jaxsparse.magnitude_masks(scores, plan)."
        )
    tx = rewire(
        optax.chain(inner, fix_nonparticipating(0)), plan, until=0, gradient="masked", score=score
    )
    if masks is None:
        return tx
    given = _given_masks("recipes.static", masks, plan)

    def init(params):
        found = masks_by_path(given, params, "recipes.static")
        whole = jax.tree.unflatten(
            jax.tree.structure(params),
            [jnp.asarray(True) if mask is None else mask for mask in found],
        )
        return tx.init(params)._replace(packed=packed(whole, plan))

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _given_masks(call, masks, plan):
    masks = merged_masks(masks, call)
    given = {
        path: mask.shape
        for path, mask in zip(leaf_paths(masks), jax.tree.leaves(masks), strict=True)
        if mask.ndim
    }
    for path in sorted(given.keys() | plan.sparse.keys()):
        if path not in given:
            raise ValueError(
                f"{call}: the plan makes {path} sparse, but `masks` have no mask of it. Pass one, "
                "or plan it dense."
            )
        if path not in plan.sparse:
            raise ValueError(
                f"{call}: `masks` have a mask of {path}, which the plan keeps dense. Plan it, or "
                "leave its mask out."
            )
        if given[path] != plan.sparse[path].shape:
            raise ValueError(
                f"{call}: the mask of {path} has shape {given[path]}, but the plan was made for "
                f"{plan.sparse[path].shape}. Pass masks of these parameters."
            )
    return masks
