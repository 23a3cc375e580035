"""Weights, mask and decay factor to the effective weights that a forward pass uses."""

import jax
import jax.numpy as jnp

from jaxsparse._plan.patterns import array
from jaxsparse._plan.plan import leaf_paths
from jaxsparse._training.state import Forward, forwards, merged_masks

__all__ = ["apply_masks", "check_gradient", "masks_by_path", "effective_weight", "effective_params"]


def effective_weight(w, mask, decay=0.0, *, gradient: str = "dense") -> jax.Array:
    """The effective weight `w * (M + D * (1 - M))`: `w` where the mask participates, `D * w`
    elsewhere.

    Selects rather than multiplies, so that inf and NaN in a weight that is dropped (`D = 0`) stay
    out.

    Args:
      w: weights, floating array of any shape.
      mask: boolean array of the shape of `w`, or a boolean scalar; True = participates.
      decay: the decay factor D in [0, 1], a float or a traced scalar.
      gradient: `"dense"`, the straight-through estimator: every weight receives the gradient with
        respect to the effective weight, unscaled. `"masked"`, the chain rule: scaled as the weight
        is.

    Returns:
      Array of the shape and dtype of `w`.

    Raises:
      TypeError: the mask is not boolean, or `w` is not floating.
      ValueError: the mask has another shape than `w`, `decay` is no scalar, or `gradient` is
        neither of the two.

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
      al., Progressive Gradient Flow, section 3, for the decay factor and the masked one.
    """
    w, mask = array(w, "effective_weight: `w`"), array(mask, "effective_weight: `mask`")
    check_gradient(gradient, "effective_weight")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"effective_weight: `w` is {w.dtype}. Pass floating-point weights.")
    if mask.dtype != bool:
        raise TypeError(
            f"effective_weight: `mask` is {mask.dtype}, not boolean. True marks a weight that "
            "participates."
        )
    if mask.shape not in ((), w.shape):
        raise ValueError(
            f"effective_weight: `mask` has shape {mask.shape}, but `w` has shape {w.shape}. Make "
            "the mask of these weights."
        )
    if not isinstance(decay, (int, float)) and array(decay, "effective_weight: `decay`").shape:
        raise ValueError(
            f"effective_weight: `decay` has shape {jnp.shape(decay)}, but it is one factor for all "
            "weights. Pass a scalar."
        )
    return (_straight_through if gradient == "dense" else _effective)(w, mask, decay)


def check_gradient(gradient: str, call: str):
    if gradient not in ("dense", "masked"):
        raise ValueError(
            f'{call}: gradient={gradient!r} is neither "dense" (straight-through) nor "masked" '
            "(chain rule). Pass one of them."
        )


def _effective(w, mask, decay):
    if isinstance(decay, (int, float)) and decay == 0:
        return jnp.where(mask, w, 0)
    decay = jnp.asarray(decay, w.dtype)
    return jnp.where(mask, w, jnp.where(decay == 0, 0, decay * w))


@jax.custom_jvp
def _straight_through(w, mask, decay):
    return _effective(w, mask, decay)


@_straight_through.defjvp
def _(primals, tangents):
    # not _effective: a second derivative goes straight through, too
    return _straight_through(*primals), tangents[0]


def masks_by_path(
    masks, params, call: str, *, prefix: str = "", partial: bool = False
) -> list[jax.Array | None]:
    """For every leaf of `params`, in tree order, its mask in `masks`, or None where it is dense.

    `params` is what the masks were made for, or its subtree under the path `prefix`; `partial`
    allows it to lack leaves.

    Raises:
      ValueError: the masks mark a leaf that `params` lacks or has in another shape.
    """
    found = {
        path: mask
        for path, mask in zip(leaf_paths(masks), jax.tree.leaves(masks), strict=True)
        if mask.ndim
    }
    paths = [prefix + path for path in leaf_paths(params)]
    missing = {path for path in found if path.startswith(prefix)} - set(paths)
    if missing and not partial:
        raise ValueError(
            f"{call}: the masks have a leaf {min(missing)} that the parameters lack; they have: "
            f"{', '.join(paths)}. Pass the masks that were made for these parameters."
        )
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        if path in found and found[path].shape != jnp.shape(leaf):
            raise ValueError(
                f"{call}: {path} has shape {jnp.shape(leaf)}, but its mask has shape "
                f"{found[path].shape}. Pass the masks that were made for these parameters."
            )
    return [found.get(path) for path in paths]


def effective_params(params, opt_state, *, gradient: str | None = None):
    """The effective parameters: every sparse leaf masked, the dense ones as they are.

    The masks, the decay factor and the gradient are those that the optimizer state holds for the
    next forward pass.

    Args:
      params: pytree of weights.
      opt_state: an optimizer state that holds masks (see `masks`), or a pytree of masks.
      gradient: `"dense"` or `"masked"`, as for `effective_weight`. None means what the recipe in
        `opt_state` asks for, and `"dense"` where it asks for nothing.

    Returns:
      A pytree of the structure of `params`. A function of the dense weights: differentiate through
      it.

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
        params,
        merged_masks(opt_state, "effective_params"),
        forwards(opt_state),
        "effective_params",
        gradient=gradient,
    )


def apply_masks(
    params,
    masks,
    treated: dict[str, Forward],
    call: str,
    *,
    prefix: str = "",
    gradient: str | None = None,
):
    """`params`, or their subtree under the path `prefix`, with every sparse leaf masked; `treated`
    is what `forwards` gives.
    """
    if gradient is not None:
        check_gradient(gradient, call)
    leaves, treedef = jax.tree.flatten(params)
    found = masks_by_path(masks, params, call, prefix=prefix)

    def effective(path, w, mask):
        if mask is None:
            return w
        if not jnp.issubdtype(jnp.result_type(w), jnp.floating):
            raise TypeError(f"{call}: {path} is {jnp.result_type(w)}. Pass floating-point weights.")
        forward = treated.get(path, Forward())
        return effective_weight(
            w,
            mask,
            0.0 if forward.decay is None else forward.decay,
            gradient=gradient or forward.gradient,
        )

    masked = [
        effective(prefix + path, w, mask)
        for path, w, mask in zip(leaf_paths(params), leaves, found, strict=True)
    ]
    return jax.tree.unflatten(treedef, masked)
