"""How masks are renewed: by a score, in stages, or by a custom rule."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxsparse._plan.masks import magnitude_masks, score_masks
from jaxsparse._plan.paths import by_path
from jaxsparse._plan.plan import Plan, check_plan, map_planned
from jaxsparse._training.scores import SCORES, Score, as_score

__all__ = ["BY_MAGNITUDE", "Renew", "by_score", "staged"]


@dataclasses.dataclass(frozen=True)
class Renew:
    """How `rewire` renews the masks.

    Args:
      masks: a function `(plan, params, gradients, masks, step, key, extra)` that returns new masks,
        a pytree as `magnitude_masks` returns it. `params` are the updated weights; `gradients`
        those that `update` received; `masks` the current ones; `step` the number of updates so far,
        int32; `key` a random key for this step; `extra` a dict of the extra arguments by name, with
        the state under `"state"` if there is one. When the optimizer is initialised, `gradients`
        and `masks` are None and `extra` holds no extra arguments.
      needs_gradient: whether it needs the gradients, which do not exist at initialisation.
      extra_args: the names of the extra arguments of `update` that it takes.
      changes_at: further steps at which masks are renewed, besides every `every` steps.
      init: a function `(plan, params)` that returns the initial state; None if it keeps no state.
      observe: a function `(plan, state, params, gradients, extra)` that returns the new state;
        called at every update.
      check: a function of the plan that raises an error if it does not fit.
      seed: the seed of the random keys.

    Example:
      >>> import jax
      >>> import optax
      >>> import jaxsparse as js
      >>> def shuffled(plan, params, gradients, masks, step, key, extra):
      ...     scores = {"w": jax.random.uniform(key, params["w"].shape)}
      ...     return js.score_masks(scores, plan)
      >>> params = {"w": jax.numpy.arange(4.0)}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.rewire(optax.sgd(0.1), plan, renew=js.Renew(shuffled))
      >>> int(js.masks(tx.init(params))["w"].sum())
      2
    """

    masks: Callable[..., Any]
    needs_gradient: bool = False
    extra_args: tuple[str, ...] = ()
    changes_at: tuple[int, ...] = ()
    init: Callable[..., Any] | None = None
    observe: Callable[..., Any] | None = None
    check: Callable[[Plan], None] | None = None
    seed: int = 0


def by_score(score: str | Score = "magnitude") -> Renew:
    """Renews masks so that the weights of highest score participate.

    A score that needs a gradient or an extra argument is replaced by the magnitude at
    initialisation.

    Args:
      score: `"magnitude"`; `"first_order"`, the magnitude of weight times gradient; `"fisher"`, the
        squared weight times the result of `diagonal_fisher`, passed as `update(..., fisher=...)`;
        `"random"`, a fixed random mask; or a `Score`.

    Returns:
      The argument `renew` of `rewire` and the recipes.

    Raises:
      TypeError: `score` is neither a name nor a `Score`.
      ValueError: there is no score of that name.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.rewire(optax.sgd(0.0), plan, renew=js.by_score("first_order"))
      >>> grads = {"w": jnp.array([9.0, 0.0, 0.0, 1.0])}
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> js.masks(state)["w"]
      Array([ True, False, False,  True], dtype=bool)

    References:
      Hoefler et al., Sparsity in Deep Learning, sections 3.2 to 3.5 (arXiv:2102.00554).
    """
    score = as_score(score, "by_score")
    late = score.needs_gradient or bool(score.extra_args)

    def arguments(params, gradients, extra):
        """For each path, the positional and the keyword arguments of the score."""
        trees = [params, gradients] if score.needs_gradient else [params]
        positional = [by_path(tree) for tree in trees]
        named = {name: by_path(extra[name]) for name in score.extra_args}

        def of_leaf(path):
            args = [leaves[path] for leaves in positional]
            return (path, *args), {name: leaves[path] for name, leaves in named.items()}

        return of_leaf

    def masks(plan, params, gradients, masks, step, key, extra):
        if score is SCORES["magnitude"] or (late and gradients is None):
            return magnitude_masks(params, plan, step=step)
        of_leaf = arguments(params, gradients, extra)

        def score_leaf(leaf, w):
            args, kwargs = of_leaf(leaf.path)
            if score.init is not None:
                kwargs["state"] = extra["state"][leaf.path]
            scores = score.rank(*args, **kwargs)
            if jnp.shape(scores) != jnp.shape(w):
                raise ValueError(
                    f"rewire: the score of {leaf.path} has shape {jnp.shape(scores)}, but its "
                    f"weights have {jnp.shape(w)}. Score each weight."
                )
            return scores

        return score_masks(map_planned(score_leaf, plan, params, call="rewire"), plan, step=step)

    def init(plan, params):
        weights = by_path(params)
        return {path: cast(Callable, score.init)(path, weights[path]) for path in plan.sparse}

    def observe(plan, state, params, gradients, extra):
        of_leaf = arguments(params, gradients, extra)
        new_state = {}
        for path in plan.sparse:
            (_, *args), kwargs = of_leaf(path)
            new_state[path] = cast(Callable, score.observe)(path, state[path], *args, **kwargs)
        return new_state

    return Renew(
        masks,
        score.needs_gradient,
        score.extra_args,
        init=init if score.init else None,
        observe=observe if score.observe else None,
    )


BY_MAGNITUDE = by_score("magnitude")


def staged(renew: Renew, earlier: Sequence[tuple[Plan, int]]) -> Renew:
    """Renews masks under earlier plans first, each up to a step, and then under the last plan.

    Args:
      renew: how the masks of each stage are renewed.
      earlier: the plans before the last, with the same sparse leaves, each with the step at which
        it ends and the next one begins.

    Returns:
      The argument `renew` of `rewire`; the last plan is that of `rewire`.

    Raises:
      TypeError: a plan is not a plan, or an end is not an integer.
      ValueError: the ends are not in ascending order; in `rewire`, an earlier plan has different
        sparse leaves than the last.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> first, last = (js.plan(params, {"w": js.NM(n, 4, axis=0)}) for n in (3, 2))
      >>> tx = js.rewire(optax.sgd(0.0), last, renew=js.staged(js.by_score(), [(first, 1)]))
      >>> state = tx.init(params)
      >>> _, after = tx.update(params, state, params)
      >>> int(js.masks(state)["w"].sum()), int(js.masks(after)["w"].sum())
      (3, 2)

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3, for structure decay (arXiv:2402.04744).
    """
    for plan, _ in earlier:
        check_plan("staged", plan)
    plans, ends = [plan for plan, _ in earlier], tuple(end for _, end in earlier)

    def masks(plan, params, gradients, masks, step, key, extra):
        def under(stage):
            return lambda: renew.masks(stage, params, gradients, masks, step, key, extra)

        stage = sum((jnp.asarray(step >= end, jnp.int32) for end in ends), jnp.int32(0))
        return jax.lax.switch(stage, [under(stage) for stage in (*plans, plan)])

    def check(plan):
        if renew.check is not None:
            renew.check(plan)
        for stage in plans:
            for path in sorted(plan.sparse.keys() | stage.sparse.keys()):
                before, last = (
                    one.sparse[path].shape if path in one.sparse else "dense"
                    for one in (stage, plan)
                )
                if before != last:
                    raise ValueError(
                        f"rewire: {path} is {before} in an earlier plan, but {last} in the last. "
                        "Make the same leaves sparse in all plans."
                    )

    return dataclasses.replace(
        renew, masks=masks, changes_at=(*renew.changes_at, *ends), check=check
    )
