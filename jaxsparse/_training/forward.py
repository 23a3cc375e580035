"""Effective weights, which the forward pass uses, from weights, mask and decay factor."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real

from jaxsparse import _checks
from jaxsparse._plan.paths import by_path
from jaxsparse._training.state import Forward, Masked, read_state

__all__ = ["apply_masks", "effective_params", "effective_weight", "map_masked", "match_masks"]


def effective_weight(
    w: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"] | Bool[ArrayLike, ""],
    decay_factor: Real[ArrayLike, ""] = 0.0,
    *,
    gradient: _checks.Gradient = "dense",
) -> Float[Array, "*shape"]:
    """The effective weight `w * (M + D * (1 - M))`: `w` where it participates, `D * w` elsewhere.

    It is computed by selection rather than multiplication, so that inf and NaN in a dropped weight
    (`D = 0`) do not reach the result.

    Args:
      w: weights, floating array of any shape.
      mask: boolean array of the shape of `w`, or a boolean scalar; True = participates.
      decay_factor: the factor D in [0, 1], a float or a traced scalar.
      gradient: `"dense"`, the straight-through estimator: every weight receives the gradient with
        respect to the effective weight, unscaled. `"masked"`, the chain rule: the gradient is
        scaled as the weight is.

    Returns:
      Array of the shape and dtype of `w`.

    Raises:
      TypeError: the mask is not boolean, or `w` is not floating.
      ValueError: the shapes of the mask and of `w` differ, `decay_factor` is not a scalar, or
        `gradient` is not one of the two.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> mask = jnp.array([False, False, True, True])
      >>> js.effective_weight(jnp.array([1.0, 2.0, 3.0, 4.0]), mask, 0.75)
      Array([0.75, 1.5 , 3.  , 4.  ], dtype=float32)
      >>> jax.grad(lambda w: js.effective_weight(w, mask).sum())(jnp.ones(4))
      Array([1., 1., 1., 1.], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, for the dense gradient; Bambhaniya et
      al., Progressive Gradient Flow, section 3, for the decay factor and the masked gradient
      (arXiv:2402.04744).
    """
    w = _checks.array(w, "effective_weight: `w`")
    mask = _checks.array(mask, "effective_weight: `mask`")
    _checks.choice("effective_weight", "gradient", gradient, _checks.Gradient)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"effective_weight: `w` is {w.dtype}. Pass floating-point weights.")
    if mask.dtype != bool:
        raise TypeError(
            f"effective_weight: `mask` is {mask.dtype}, not boolean. True marks a weight that "
            "participates."
        )
    if mask.shape not in ((), w.shape):
        raise ValueError(
            f"effective_weight: `mask` has shape {mask.shape}, but `w` has shape {w.shape}. Pass "
            "the mask of these weights."
        )
    if jnp.shape(_checks.array(decay_factor, "effective_weight: `decay_factor`")):
        raise ValueError(
            f"effective_weight: `decay_factor` has shape {jnp.shape(decay_factor)}, but it applies "
            "to all weights. Pass a scalar."
        )
    return (_straight_through if gradient == "dense" else _effective)(w, mask, decay_factor)


def _effective(w, mask, decay_factor):
    zero = jnp.zeros((), w.dtype)
    if isinstance(decay_factor, (int, float)) and decay_factor == 0:
        return jnp.where(mask, w, zero)
    factor = jnp.asarray(decay_factor, w.dtype)
    return jnp.where(mask, w, jnp.where(factor == 0, zero, factor * w))


@jax.custom_jvp
def _straight_through(w, mask, decay_factor):
    return _effective(w, mask, decay_factor)


@_straight_through.defjvp
def _(primals, tangents):
    # not _effective, so that second derivatives also go straight through
    return _straight_through(*primals), tangents[0]


def match_masks(
    masks: PyTree, params: PyTree, call: str, *, partial: bool = False
) -> list[jax.Array | None]:
    """The mask of every leaf of `params`, in tree order, or None where it is dense.

    Args:
      masks: pytree of masks.
      params: the parameters that the masks were made for.
      call: the name of the public function, for errors.
      partial: whether `params` may lack leaves, as under `optax.masked`.

    Raises:
      ValueError: `params` lacks a leaf that the masks were made for, or has it with another shape.
    """
    known, leaves = by_path(masks), by_path(params)
    sparse = {path: mask for path, mask in known.items() if mask.ndim}
    missing = leaves.keys() - known.keys() if partial else sparse.keys() - leaves.keys()
    if missing and sparse:
        where = ("parameters", "masks") if partial else ("masks", "parameters")
        raise ValueError(
            f"{call}: the {where[0]} have a leaf {min(missing)} that the {where[1]} lack; they "
            f"have: {', '.join(known if partial else leaves)}. Pass the masks that were made for "
            "these parameters."
        )
    for path in sparse.keys() & leaves.keys():
        if sparse[path].shape != jnp.shape(leaves[path]):
            raise ValueError(
                f"{call}: {path} has shape {jnp.shape(leaves[path])}, but its mask has shape "
                f"{sparse[path].shape}. Pass the masks that were made for these parameters."
            )
    return [sparse.get(path) for path in leaves]


def map_masked(
    f: Any, masks: PyTree, tree: PyTree, *rest: PyTree, call: str, partial: bool = False
) -> Any:
    """Replaces the masked leaves of a tree by `f(path, mask, leaf, *others)`.

    Args:
      f: a function of a path, the mask, the leaf of the tree and those of the other trees.
      masks: pytree of masks.
      tree: the tree that the masks were made for.
      *rest: pytrees of the same structure.
      call: the name of the public function, for errors.
      partial: whether `tree` may lack leaves, as under `optax.masked`.
    """
    leaf_masks = match_masks(masks, tree, call, partial=partial)
    structure = jax.tree.structure(tree)
    others = [jax.tree.leaves(one) for one in rest]
    joined = zip(leaf_masks, by_path(tree).items(), *others, strict=True)
    return jax.tree.unflatten(
        structure,
        [x if mask is None else f(path, mask, x, *xs) for mask, (path, x), *xs in joined],
    )


def effective_params(
    params: PyTree, opt_state: PyTree, *, gradient: _checks.Gradient | None = None
) -> Any:
    """The effective params: the effective weight of every sparse leaf; dense leaves are unchanged.

    The masks, the decay factor and the gradient are those that the optimizer state holds for the
    next forward pass.

    Args:
      params: pytree of weights.
      opt_state: an optimizer state that holds masks (see `masks`), or a pytree of masks.
      gradient: `"dense"` or `"masked"`, as for `effective_weight`. None selects the gradient of the
        recipe in `opt_state`, or `"dense"` for bare masks.

    Returns:
      A pytree of the structure of `params`. Differentiate through this function to get the gradient
      of the dense weights.

    Raises:
      TypeError: a sparse leaf is not floating.
      ValueError: there are no masks in `opt_state`, or they were made for other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> tx = js.rewire(optax.sgd(0.1), js.plan(params, {"w": js.NM(2, 4, axis=0)}))
      >>> js.effective_params(params, tx.init(params))
      {'w': Array([ 0., -4.,  3.,  0.], dtype=float32)}

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, lines 4 to 6.
    """
    return apply_masks(
        params, read_state(opt_state, "effective_params"), "effective_params", gradient
    )


def apply_masks(
    params: PyTree, masked: Masked, call: str, gradient: _checks.Gradient | None = None
) -> Any:
    """Replaces every sparse leaf of the parameters by its effective weight."""
    if gradient is not None:
        _checks.choice(call, "gradient", gradient, _checks.Gradient)

    def effective(path, mask, w):
        if not jnp.issubdtype(jnp.result_type(w), jnp.floating):
            raise TypeError(f"{call}: {path} is {jnp.result_type(w)}. Pass floating-point weights.")
        forward = masked.forwards.get(path, Forward())
        factor = 0.0 if forward.decay_factor is None else forward.decay_factor
        return effective_weight(w, mask, factor, gradient=gradient or forward.gradient)

    return map_masked(effective, masked.masks, params, call=call)
