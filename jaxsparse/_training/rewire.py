"""Optax transformations that treat non-participating weights in their own way, and the wrapper that
holds the masks.

Order matters. `rewire` is outermost and hands the masks that produced the gradient to the chain
inside it. There, `scale_nonparticipating` and `sr_ste` act on gradients, before the optimizer;
`decay_nonparticipating`, `reset_nonparticipating` and `fix_nonparticipating` act on updates, after
it.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxsparse._masks.masks import magnitude_masks, score_masks
from jaxsparse._plan.patterns import integer
from jaxsparse._plan.plan import Plan, check_plan, match
from jaxsparse._training.forward import check_gradient
from jaxsparse._training.schedules import Schedule
from jaxsparse._training.scores import Score, as_score, score_tree
from jaxsparse._training.state import Forward, RewireState, masks, packed

__all__ = ["rewire"]


def rewire(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    every: int = 1,
    begin: int = 0,
    until: int | None = None,
    earlier: Sequence[tuple[Plan, int]] = (),
    decay: Schedule | None = None,
    gradient: str = "dense",
    score: str | Score = "magnitude",
) -> optax.GradientTransformationExtraArgs:
    """Holds the masks and recomputes them from the updated weights; the outermost wrapper of the
    optimizer.

    The state after t updates holds the masks and the decay factor of forward pass t, the first
    being 0. Its masks are those of the weights at the last step that was `begin`, a number of times
    `every` after it, or the end of an `earlier` plan. The chain inside receives them, as the extra
    argument `masks`, with the gradient that they produced. Nothing may change the updates behind
    it: the weights that they result in are those that the next masks are made of.

    Args:
      inner: the optimizer, usually a chain with the transformations of this module.
      plan: which leaf follows which pattern.
      every: the updates between two rewirings (`r` in the paper).
      begin: the step before which every weight participates.
      until: the step from which on the masks stay; None for never.
      earlier: the plans before `plan`, of the same sparse leaves, each with the step at which it
        ends and the next begins.
      decay: a function from the step to the decay factor D that scales non-participating weights in
        the forward pass, such as `linear_decay` makes; None for 0.
      gradient: what `effective_params` and `flax.intercept` take for this state: `"dense"` or
        `"masked"`.
      score: what masks rank: `"magnitude"`; `"first_order"`, the magnitude of weight times
        gradient; `"fisher"`, the squared weight times what `diagonal_fisher` gives, passed as
        `update(..., fisher=...)`; `"random"`; or a function of (path, weights, gradient) to scores.
        Weights are the updated ones. Before there is a gradient it is 1 everywhere.

    Returns:
      A transformation with state `RewireState`. Its `update` needs `params`.

    Raises:
      TypeError: `plan` or one in `earlier` is no plan; in `update`, the state is none of `rewire`,
        or of another recipe.
      ValueError: no leaf of the plan is sparse, `every`, `begin`, `until` or an end in `earlier` is
        out of range or not in order, an earlier plan has other sparse leaves, or `gradient` is
        neither of the two; in `init` and `update`, the parameters or their gradients are not those
        of the plan; in `update`, the parameters are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> tx = js.rewire(optax.sgd(1.0), js.plan(params, {"w": js.NM(2, 4, axis=0)}))
      >>> grads = {"w": jnp.array([-9.0, 0.0, 0.0, 0.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> js.masks(state)["w"]
      Array([ True,  True, False, False], dtype=bool)

    References:
      Advances in Sparse Neural Model Training, section 3.1 and Algorithm 1.
    """
    check_plan("rewire", plan)
    if not plan.sparse:
        raise ValueError(f"rewire: the plan keeps every leaf dense:\n{plan}")
    _check_steps("rewire", every=every)
    _check_steps("rewire", begin=begin, least=0)
    if until is not None:
        _check_steps("rewire", until=until, least=0)
    plans, ends = [*(one for one, _ in earlier), plan], [end for _, end in earlier]
    _check_earlier(plans, ends, begin, until)
    check_gradient(gradient, "rewire")
    inner = optax.with_extra_args_support(inner)
    scored = as_score(score, "rewire")
    from_the_start = isinstance(begin, int) and begin == 0
    every_step = from_the_start and until is None and isinstance(every, int) and every == 1

    def ranked(stage, params, gradients, step):
        if scored is None:
            return packed(magnitude_masks(params, stage, step=step), plan)
        return packed(
            score_masks(score_tree(scored, params, gradients, plan, "rewire"), stage, step=step),
            plan,
        )

    def first(params):
        masks = ranked(plans[0], params, jax.tree.map(jnp.ones_like, params), 0)
        if from_the_start:
            return masks
        full = packed(_all_participate(params, plan), plan)
        return jax.tree.map(lambda bits, ones: jnp.where(begin > 0, ones, bits), masks, full)

    def renewed(params, gradients, step):
        stages = [functools.partial(ranked, stage, params, gradients, step) for stage in plans]
        return jax.lax.switch(sum(step >= end for end in ends), stages) if ends else stages[0]()

    plain = decay is None and gradient == "dense"

    def held(inner_state, step):
        return (
            inner_state
            if plain
            else Forward(
                None if decay is None else jnp.asarray(decay(step), jnp.float32),
                gradient,
                inner_state,
            )
        )

    def init(params):
        match(plan, params, "rewire")
        return RewireState(
            jnp.zeros((), jnp.int32), first(params), plan, held(inner.init(params), 0)
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "rewire: `params` is missing. Masks rank weights: call update(grads, opt_state, "
                "params)."
            )
        if not isinstance(state, RewireState):
            raise TypeError(
                f"rewire: this {type(state).__name__} is not a RewireState. Pass the optimizer "
                "state that init returned."
            )
        if isinstance(state.inner_state, Forward) is plain:
            raise TypeError(
                "rewire: this RewireState is of another recipe. Pass the optimizer state that init "
                "of this one returned."
            )
        match(plan, params, "rewire")
        match(plan, updates, "rewire")
        gradients = extra_args.pop("fisher", None) if score == "fisher" else updates
        if gradients is None:
            raise ValueError(
                "rewire: `fisher` is missing. Pass update(grads, opt_state, params, "
                "fisher=jaxsparse.diagonal_fisher(...))."
            )
        inner_state = state.inner_state if plain else state.inner_state.inner_state
        updates, inner_state = inner.update(
            updates, inner_state, params, masks=masks(state), **extra_args
        )
        count = optax.safe_increment(state.count)
        updated = optax.apply_updates(params, updates)

        if every_step:
            kept = renewed(updated, gradients, count)
        else:
            due = functools.reduce(
                jnp.logical_or, (count == end for end in ends), (count - begin) % every == 0
            )
            due &= (count >= begin) & (True if until is None else count < until)
            kept = jax.lax.cond(
                due, lambda: renewed(updated, gradients, count), lambda: state.packed
            )
        return updates, RewireState(count, kept, plan, held(inner_state, count))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_earlier(plans, ends, begin, until):
    *earlier, plan = plans
    for stage in earlier:
        check_plan("rewire", stage)
        for path in sorted(plan.sparse.keys() | stage.sparse.keys()):
            shapes = [
                leaf.shape if leaf else "dense"
                for leaf in (stage.sparse.get(path), plan.sparse.get(path))
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"rewire: {path} is {shapes[0]} in an earlier plan, but {shapes[1]} in the "
                    "last. Make the same leaves sparse in all."
                )
    for end in ends:
        _check_steps("rewire", end=end)
    steps = [
        int(step)
        for step in (begin, *ends, until)
        if step is not None and not isinstance(step, jax.Array)
    ]
    if steps != sorted(set(steps)) and steps != [0, 0]:
        raise ValueError(
            f"rewire: `begin`, the ends of earlier plans and `until` are {steps}, not in ascending "
            "order. Sort them."
        )


def _all_participate(params, plan):
    leaves, treedef = jax.tree.flatten(params)
    planned = match(plan, params, "rewire")
    return jax.tree.unflatten(
        treedef,
        [
            jnp.ones(jnp.shape(w) if leaf else (), bool)
            for w, leaf in zip(leaves, planned, strict=True)
        ],
    )


def _check_steps(call, *, least=1, **steps):
    ((name, value),) = steps.items()
    if isinstance(value, jax.Array):  # as optax.inject_hyperparams passes it
        return
    if integer(value, f"{call}: `{name}`") < least:
        raise ValueError(
            f"{call}: {name}={value} is below {least}. Pass a number of optimizer steps."
        )
