"""The recipes by which a dense model becomes sparse little by little: by the decay factor, the
pattern, or the density.
"""

import dataclasses
import math

import optax

from jaxsparse._plan.patterns import NM, Block, TransposableNM, Unstructured, check_choice
from jaxsparse._plan.plan import Plan
from jaxsparse._training.phases import in_stages, phases, with_patterns
from jaxsparse._training.rewire import rewire
from jaxsparse._training.schedules import (
    Schedule,
    exponential_decay,
    geometric_stages,
    gradual_density,
    linear_decay,
    stepwise_stages,
)
from jaxsparse._training.scores import Score

__all__ = ["gradual", "mdgf", "sdgf"]

_LAST_DECAY = 0.01  # of the exponential, before it is cut to 0


def mdgf(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    decay: str = "exponential",
    dense_until: int | float = 0.05,
    fine_tune_from: int | float = 0.7,
    gradient: str = "masked",
    every: int = 1,
    score: str | Score = "magnitude",
) -> optax.GradientTransformationExtraArgs:
    """Mask Decay Gradient Flow: non-participating weights fade out of the forward pass, scaled by a
    factor D from 1 to 0.

    Three phases: dense; decay, where D falls from 1; fine-tuning, where D is exactly 0. Masks
    follow the weights in the last two. D is in the optimizer state, where `effective_params` and
    `flax.intercept` find it.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern.
      total_steps: the optimizer steps of the whole run.
      decay: with j the steps since `dense_until`: `"linear"`, `D = 1 - beta * j`, which is 0 at
        `fine_tune_from`; or `"exponential"`, `D = exp(-beta * j)`, which would be 0.01 at
        `fine_tune_from` and is cut to 0 there.
      dense_until: the step up to which every weight participates; the paper takes 1.25 to 10 % of
        training.
      fine_tune_from: the step from which on D is 0; the paper recommends about 70 % of training.
      gradient: `"masked"`, D scales the gradient of non-participating weights too, as the paper
        says; `"dense"`, it does not, as in the authors' code.
      every: the steps between two rewirings, counted from `dense_until`.
      score: what masks rank, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan, or an argument is no number.
      ValueError: no leaf of the plan is sparse, an argument is out of range, or a phase has no
        step.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.recipes.mdgf(
      ...     optax.sgd(0.0), plan, total_steps=10, decay="linear", dense_until=1, fine_tune_from=5
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
      section 3.
    """
    call = "recipes.mdgf"
    begin, end = phases(call, total_steps, dense_until, fine_tune_from)
    check_choice(call, "decay", decay, ("exponential", "linear"))
    if decay == "linear":
        factor = linear_decay(1 / (end - begin), begin)
    else:
        factor = exponential_decay(-math.log(_LAST_DECAY) / (end - begin), begin, end)
    return rewire(
        inner, plan, every=every, begin=begin, decay=factor, gradient=gradient, score=score
    )


def sdgf(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    stages: str = "stepwise",
    k: int = 16,
    dense_until: int | float = 0.05,
    fine_tune_from: int | float = 0.7,
    every: int = 1,
    score: str | Score = "magnitude",
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
      score: what masks rank, as for `rewire`.

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
    check_choice(call, "stages", stages, ("stepwise", "geometric"))

    def stages_of(leaf, pattern):
        if not isinstance(pattern, NM | TransposableNM):
            raise ValueError(
                f"{call}: {leaf.path} is planned {pattern}, which has no stages of n:m. Use "
                "recipes.gradual."
            )
        if stages == "stepwise":
            found = stepwise_stages(pattern.n, pattern.m)
        else:
            found = geometric_stages(pattern.n, pattern.m, k)
            _check_geometric(call, leaf, *found[0])
        return [dataclasses.replace(pattern, n=n, m=m) for n, m in found]

    earlier = in_stages(call, plan, stages_of, begin, end)
    return rewire(inner, plan, every=every, begin=begin, earlier=earlier, score=score)


def _check_geometric(call, leaf, n, m):
    """Refuses a leaf that cannot follow `n:m`, its first stage."""
    pattern = leaf.pattern
    if isinstance(pattern, TransposableNM) and m > pattern.m:
        raise ValueError(
            f"{call}: {leaf.path} is planned {pattern}, which has no stage {n}:{m}. Pass "
            'stages="stepwise" for it.'
        )
    size = leaf.shape[pattern.axes[0]]
    if size % m:
        raise ValueError(
            f"{call}: axis {pattern.axes[0]} of {leaf.path} has size {size}, not a multiple of "
            f"{m}, the group of its first stage {n}:{m}. "
            f'Pass k={math.gcd(size // pattern.m, m // pattern.m)}, or stages="stepwise".'
        )


def gradual(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    initial: float = 1.0,
    dense_until: int | float = 0.05,
    fine_tune_from: int | float = 0.7,
    every: int = 1,
    score: str | Score = "magnitude",
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning: the density of `Unstructured` and `Block` falls along a cubic to the one
    planned, where masks then stay.

    The gradient is masked: weights that do not participate are not updated, beyond what the
    optimizer's own momentum and weight decay do.

    Args:
      inner: the optimizer, any of optax.
      plan: which leaf follows which pattern in the end.
      total_steps: the optimizer steps of the whole run.
      initial: the density at `dense_until`.
      dense_until: the step up to which every weight participates.
      fine_tune_from: the step at which the planned density is reached; the masks of that step stay.
      every: the steps between two changes of the masks, counted from `dense_until`; the paper takes
        100 to 1000.
      score: what masks rank, as for `rewire`.

    Returns:
      The transformation to use in place of `inner`; `masks` finds its masks.

    Raises:
      TypeError: `plan` is no plan, or an argument is no number.
      ValueError: no leaf of the plan is sparse, a leaf is planned under another pattern or already
        under a schedule, an argument is out of range, or a phase has no step.

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
      Compression.
    """
    call = "recipes.gradual"
    begin, end = phases(call, total_steps, dense_until, fine_tune_from)
    # leaves of a global scope are ranked together only if their patterns, and so these, are equal
    schedules: dict[float, Schedule] = {}

    def falling(leaf, pattern):
        if not isinstance(pattern, Unstructured | Block):
            raise ValueError(
                f"{call}: {leaf.path} is planned {pattern}, which has no density to change. Use "
                "recipes.sdgf."
            )
        if pattern.schedule is not None:
            raise ValueError(
                f"{call}: the density of {leaf.path} follows a schedule. Plan it with the number "
                "to end at."
            )
        if initial < pattern.density:
            raise ValueError(
                f"{call}: initial={initial} is below {pattern.density}, the density planned for "
                f"{leaf.path}. Pass more."
            )
        if pattern.density not in schedules:
            schedules[pattern.density] = gradual_density(
                pattern.density, begin=begin, end=end, initial=initial
            )
        return dataclasses.replace(pattern, density=schedules[pattern.density])  # type: ignore[arg-type]

    earlier = ((with_patterns(call, plan, falling), end),)
    return rewire(
        inner,
        plan,
        every=every,
        begin=begin,
        until=end + 1,
        earlier=earlier,
        gradient="masked",
        score=score,
    )
