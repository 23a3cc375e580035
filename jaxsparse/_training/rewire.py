"""The optimizer wrapper that holds the masks and renews them."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxsparse import _checks
from jaxsparse._plan.plan import Plan, check_plan, map_planned, match
from jaxsparse._training.renew import BY_MAGNITUDE, Renew
from jaxsparse._training.schedules import Schedule
from jaxsparse._training.state import (
    Forward,
    RewireState,
    is_placeholder,
    pack_masks,
    unpack_masks,
)

__all__ = ["rewire"]


def rewire(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    renew: Renew = BY_MAGNITUDE,
    every: int | jax.Array = 1,
    begin: int | jax.Array = 0,
    until: int | jax.Array | None = None,
    decay_factor: Schedule | None = None,
    gradient: _checks.Gradient = "dense",
) -> optax.GradientTransformationExtraArgs:
    """Holds the masks and renews them from the updated weights; wraps the whole optimizer.

    After t updates, the state holds the masks and the decay factor for forward pass t, starting
    from 0. The masks are those of the weights at the last step that was `begin`, a multiple of
    `every` after it, or one at which `renew` changes. The transformations inside receive the masks
    that produced the gradient, as the extra argument `masks`. Nothing may transform the updates
    after `rewire`: the next masks are computed from the weights those updates produce.

    Args:
      inner: the optimizer, usually a chain with the transformations for non-participating weights.
      plan: which leaf follows which pattern.
      renew: how masks are renewed, as `by_score` and `staged` return it.
      every: the updates between two rewirings (`r` in the paper).
      begin: the step before which every weight participates.
      until: the step from which the masks stay; None to keep rewiring.
      decay_factor: a function from the step to the factor D that scales non-participating weights
        in the forward pass, such as `linear_decay` returns; None for 0.
      gradient: the gradient that `effective_params` and `flax.intercept` use for this state:
        `"dense"` or `"masked"`.

    Returns:
      A transformation with state `RewireState`. Its `update` needs `params`.

    Raises:
      TypeError: `plan` is not a plan, or `renew` is not a `Renew`; in `update`, `state` was not
        created by `rewire`, or was created by a different recipe.
      ValueError: no leaf of the plan is sparse; `every`, `begin`, `until` or a step at which
        `renew` changes is out of range or not in order; `gradient` is not one of the two; in `init`
        and `update`, the parameters or gradients do not match the plan; in `update`, `params` or an
        extra argument of `renew` is missing, or the state was made for a different plan.

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
    if not isinstance(renew, Renew):
        raise TypeError(
            f'rewire: `renew` is {renew!r}. Pass jaxsparse.by_score("magnitude") or another Renew.'
        )
    _checks.choice("rewire", "gradient", gradient, _checks.Gradient)
    _check_order(every, begin, until, renew.changes_at)
    if renew.check is not None:
        renew.check(plan)
    inner = optax.with_extra_args_support(inner)
    dense_start = not (isinstance(begin, int) and begin == 0)
    every_step = not dense_start and until is None and isinstance(every, int) and every == 1

    def new_masks(params, gradients, masks, step, state, extra, like=None):
        key = jax.random.fold_in(jax.random.key(renew.seed), step)
        extra = extra if renew.init is None else {**extra, "state": state}
        masks = renew.masks(plan, params, gradients, masks, step, key, extra)
        return pack_masks(masks, plan, like)

    @jax.jit  # which keeps the two branches for calls outside of jit
    def renewed_if(due, *arguments):
        return jax.lax.cond(due, lambda: new_masks(*arguments), lambda: arguments[-1])

    def forward(step):
        factor = None if decay_factor is None else jnp.asarray(decay_factor(step), jnp.float32)
        return Forward(factor, gradient)

    def init(params):
        count = jnp.zeros((), jnp.int32)
        if is_placeholder(params):  # called by optax.tree_utils.tree_map_params
            state = None if renew.init is None else count
            return RewireState(count, count, plan, forward(0), state, inner.init(params))
        match(plan, params, "rewire")
        state = None if renew.init is None else renew.init(plan, params)
        masks = new_masks(params, None, None, count, state, {})
        if dense_start:
            full = pack_masks(_all_participate(params, plan), plan)
            masks = jax.tree.map(lambda bits, ones: jnp.where(begin > 0, ones, bits), masks, full)
        return RewireState(count, masks, plan, forward(0), state, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        _check_update(plan, gradient, decay_factor, state, params)
        match(plan, params, "rewire")
        match(plan, updates, "rewire", "gradients")
        extra = {name: _extra(extra_args, name) for name in renew.extra_args}
        masks, gradients = unpack_masks(state), updates
        inner_args = {**_accepting_masks(extra_args), "masks": masks}
        updates, inner_state = inner.update(gradients, state.inner_state, params, **inner_args)
        count = optax.safe_increment(state.count)
        with jax.numpy_dtype_promotion("standard"):  # as optax adds, whatever the dtypes
            updated = optax.apply_updates(params, updates)
        renew_state = state.renew_state
        if renew.observe is not None:
            renew_state = renew.observe(plan, renew_state, updated, gradients, extra)
        arguments = (updated, gradients, masks, count, renew_state, extra, state.masks)
        if every_step:
            words = new_masks(*arguments)
        else:
            due = (count - begin) % every == 0
            due = functools.reduce(jnp.logical_or, (count == at for at in renew.changes_at), due)
            due &= (count >= begin) & (True if until is None else count < until)
            words = renewed_if(due, *arguments)
        return updates, RewireState(count, words, plan, forward(count), renew_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_order(every, begin, until, changes_at):
    _checks.steps("rewire", "every", every)
    _checks.steps("rewire", "begin", begin, least=0)
    for step in changes_at:
        _checks.steps("rewire", "end", step)
    if until is not None:
        _checks.steps("rewire", "until", until, least=0)
    steps = (begin, *changes_at, until)
    order = [int(step) for step in steps if step is not None and not isinstance(step, jax.Array)]
    if order != sorted(set(order)) and order != [0, 0]:
        raise ValueError(
            f"rewire: `begin`, the steps at which `renew` changes and `until` are {order}, not in "
            "ascending order. Sort them."
        )


def _check_update(plan, gradient, decay_factor, state, params):
    if params is None:
        raise ValueError(
            "rewire: `params` is missing, but masks are computed from weights. Call update(grads, "
            "opt_state, params)."
        )
    if not isinstance(state, RewireState):
        raise TypeError(
            f"rewire: this {type(state).__name__} is not a RewireState. Pass the optimizer state "
            "that init returned."
        )
    if state.plan != plan:
        raise ValueError(
            "rewire: the state was made for a different plan: "
            f"{_difference(state.plan, plan)}. Pass the state that init of this transformation "
            "returned."
        )
    theirs = (state.forward.gradient, state.forward.decay_factor is None)
    if theirs != (gradient, decay_factor is None):
        raise TypeError(
            "rewire: this RewireState was created by a different recipe. Pass the optimizer state "
            "that init of this one returned."
        )


def _difference(theirs: Plan, ours: Plan) -> str:
    """Describes the first leaf in which two plans differ."""

    def described(plan, path):
        leaf = plan.sparse.get(path)
        if leaf is None:
            return "dense"
        axes = ", ".join(map(str, leaf.pattern.axes or ()))
        return f"{leaf.pattern}{f' along axis {axes}' if axes else ''} of shape {leaf.shape}"

    paths = dict.fromkeys((*theirs.sparse, *ours.sparse))
    differ = [path for path in paths if theirs.sparse.get(path) != ours.sparse.get(path)]
    if not differ:
        return "its dense leaves differ"
    path = differ[0]
    return f"{path} is {described(theirs, path)} there, and {described(ours, path)} here"


def _extra(extra_args: dict, name: str) -> Any:
    if extra_args.get(name) is None:
        hint = "jaxsparse.diagonal_fisher(...)" if name == "fisher" else "..."
        raise ValueError(
            f"rewire: `{name}` is missing. Pass update(grads, opt_state, params, {name}={hint})."
        )
    return extra_args.pop(name)


def _accepting_masks(extra_args: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments, with a loss that accepts `masks`; line searches pass them all to it."""
    loss = extra_args.get("value_fn")
    if loss is None:
        return extra_args
    signature = inspect.signature(loss)
    if "masks" in signature.parameters:
        return extra_args

    def value_fn(*args, masks=None, **kwargs):
        return loss(*args, **kwargs)

    extra = inspect.Parameter("masks", inspect.Parameter.KEYWORD_ONLY, default=None)
    others = list(signature.parameters.values())
    last = len(others) - any(one.kind is inspect.Parameter.VAR_KEYWORD for one in others)
    named = signature.replace(parameters=[*others[:last], extra, *others[last:]])
    value_fn.__signature__ = named  # type: ignore[attr-defined]
    return {**extra_args, "value_fn": value_fn}


def _all_participate(params: PyTree, plan: Plan) -> Any:
    return map_planned(
        lambda leaf, w: jnp.ones(jnp.shape(w), bool),
        plan,
        params,
        call="rewire",
        dense=lambda w: jnp.asarray(True),
    )
