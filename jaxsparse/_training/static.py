"""Pruning once, with masks that stay."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

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
    masks: PyTree = None,
    renew: Renew = BY_MAGNITUDE,
) -> optax.GradientTransformationExtraArgs:
    """Prunes once and keeps the masks: non-participating weights are 0 from the first update on.

    It is meant for training dense, pruning, and training again: pass the trained weights and a
    fresh optimizer with the schedule of the first training. The gradient is masked, so that the
    optimizer sees a smaller model.

    Args:
      inner: any optax optimizer.
      plan: which leaf follows which pattern.
      masks: a pytree of masks of any density for the sparse leaves of the plan, or an optimizer
        state that holds them; None to compute them from the weights that `init` receives.
      renew: how masks are computed, as for `rewire`, but it must not need a gradient, since none
        exists yet. To prune by such scores, pass `masks=jaxsparse.score_masks(scores, plan)`.

    Returns:
      The transformation to use in place of `inner`; `masks` reads its masks from the state.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: no leaf of the plan is sparse, `masks` holds no masks, or its leaves or shapes do
        not match the plan, or `renew` needs a gradient.

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
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.1 (arXiv:2104.08378).
    """
    call = "recipes.static"
    check_plan(call, plan)
    if isinstance(renew, Renew) and (renew.needs_gradient or renew.extra_args):
        raise ValueError(
            f"{call}: `renew` needs {'a gradient' if renew.needs_gradient else renew.extra_args}, "
            "which does not exist yet when the masks are made. Compute the scores and pass "
            "masks=jaxsparse.score_masks(scores, plan)."
        )
    chain = optax.chain(inner, fix_nonparticipating(0))
    tx = rewire(chain, plan, renew=renew, until=0, gradient="masked")
    if masks is None:
        return tx
    initial_masks = _checked_masks(call, masks, plan)

    def init(params):
        if is_placeholder(params):
            return tx.init(params)
        leaf_masks = match_masks(initial_masks, params, call)
        state = tx.init(params)
        whole = [jnp.asarray(True) if mask is None else mask for mask in leaf_masks]
        packed = pack_masks(jax.tree.unflatten(jax.tree.structure(params), whole), plan)
        return state._replace(masks=packed)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _checked_masks(call, masks, plan):
    masks = read_state(masks, call).masks
    shapes = {path: mask.shape for path, mask in by_path(masks).items() if mask.ndim}
    for path in sorted(shapes.keys() | plan.sparse.keys()):
        if path not in shapes:
            raise ValueError(
                f"{call}: the plan makes {path} sparse, but `masks` has no mask for it. Pass one, "
                "or plan it dense."
            )
        if path not in plan.sparse:
            raise ValueError(
                f"{call}: `masks` has a mask for {path}, which the plan keeps dense. Make it "
                "sparse in the plan, or leave its mask out."
            )
        if shapes[path] != plan.sparse[path].shape:
            raise ValueError(
                f"{call}: the mask of {path} has shape {shapes[path]}, but the plan was made for "
                f"{plan.sparse[path].shape}. Pass masks of these parameters."
            )
    return masks
