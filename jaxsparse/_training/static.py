"""Pruning once: masks that stay."""

import jax
import jax.numpy as jnp
import optax

from jaxsparse._plan.paths import by_path
from jaxsparse._plan.plan import Plan, check_plan
from jaxsparse._training.forward import match_masks
from jaxsparse._training.pieces import fix_nonparticipating
from jaxsparse._training.renew import BY_MAGNITUDE, Renew
from jaxsparse._training.rewire import rewire
from jaxsparse._training.state import is_placeholder, pack_masks, read_state

__all__ = ["static"]


def static(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    masks=None,
    renew: Renew = BY_MAGNITUDE,
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
      renew: how masks are renewed, as for `rewire`, but for what needs a gradient, of which there
        is none yet. To prune by such scores pass `masks=jaxsparse.score_masks(scores, plan)`.

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
    call = "recipes.static"
    check_plan(call, plan)
    if isinstance(renew, Renew) and (renew.needs_gradient or renew.extra_args):
        raise ValueError(
            f"{call}: `renew` needs {'a gradient' if renew.needs_gradient else renew.extra_args}, "
            "and masks are made before there is one. Compute the scores and pass "
            "masks=jaxsparse.score_masks(scores, plan)."
        )
    chain = optax.chain(inner, fix_nonparticipating(0))
    tx = rewire(chain, plan, renew=renew, until=0, gradient="masked")
    if masks is None:
        return tx
    given = _given_masks(call, masks, plan)

    def init(params):
        if is_placeholder(params):
            return tx.init(params)
        found = match_masks(given, params, call)
        state = tx.init(params)
        whole = [jnp.asarray(True) if mask is None else mask for mask in found]
        packed = pack_masks(jax.tree.unflatten(jax.tree.structure(params), whole), plan)
        return state._replace(masks=packed)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _given_masks(call, masks, plan):
    masks = read_state(masks, call).masks
    given = {path: mask.shape for path, mask in by_path(masks).items() if mask.ndim}
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
