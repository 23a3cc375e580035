"""Metrics of masks, weights, gradients and optimizer states: one number for each leaf."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._plan.paths import by_path
from jaxsparse._training.forward import match_masks
from jaxsparse._training.state import read_state

__all__ = ["mask_churn", "mask_density", "retained_magnitude", "second_moments"]


def mask_density(opt_state: PyTree) -> dict[str, jax.Array]:
    """The fraction of weights that participate, for every sparse leaf.

    Args:
      opt_state: an optimizer state that holds masks (see `masks`), or a pytree of masks.

    Returns:
      Dict from the path of a leaf to a float32 scalar.

    Raises:
      ValueError: `opt_state` holds no masks.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.analysis.mask_density({"w": jnp.array([True, False, False, False])})
      {'w': Array(0.25, dtype=float32)}
    """
    return {path: _share(mask) for path, mask in _sparse_masks(opt_state, "mask_density").items()}


def mask_churn(before: PyTree, after: PyTree) -> dict[str, jax.Array]:
    """The fraction of weights whose mask differs between two sets of masks, for every sparse leaf.

    Where both sets keep the same number of weights, half of the changes are weights that start to
    participate and half are weights that stop. Two independent masks of density d differ in `2 * d
    * (1 - d)` of the weights on average.

    Args:
      before: an optimizer state that holds masks (see `masks`), or a pytree of masks.
      after: the same for the later step.

    Returns:
      Dict from the path of a leaf to a float32 scalar.

    Raises:
      ValueError: one of the two holds no masks, or they belong to different parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> before = {"w": jnp.array([True, True, False, False])}
      >>> after = {"w": jnp.array([True, False, True, False])}
      >>> js.analysis.mask_churn(before, after)
      {'w': Array(0.5, dtype=float32)}

    References:
      Advances in Sparse Neural Model Training, section 3.1, for rewiring.
    """
    old, new = _sparse_masks(before, "mask_churn"), _sparse_masks(after, "mask_churn")
    for path in sorted(old.keys() | new.keys()):
        shapes = [masks[path].shape if path in masks else None for masks in (old, new)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"mask_churn: the mask of {path} has shape {shapes[0]} before, but {shapes[1]} "
                "after. Pass masks of the same parameters."
            )
    return {path: _share(mask != new[path]) for path, mask in old.items()}


def retained_magnitude(params: PyTree, opt_state: PyTree) -> dict[str, jax.Array]:
    """The participating share of the magnitude, `sum |w * M| / sum |w|`, for every sparse leaf.

    Sums are taken in float32. The share is 1 where all weights are 0.

    Args:
      params: pytree of weights.
      opt_state: an optimizer state that holds masks (see `masks`), or a pytree of masks.

    Returns:
      Dict from the path of a leaf to a float32 scalar.

    Raises:
      ValueError: `opt_state` holds no masks, or they were made for other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 2.0, 1.0])}
      >>> masks = {"w": jnp.array([False, True, True, False])}
      >>> js.analysis.retained_magnitude(params, masks)
      {'w': Array(0.75, dtype=float32)}

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 5, where permutations raise
      it (arXiv:2104.08378).
    """
    masked = read_state(opt_state, "retained_magnitude")
    masks = match_masks(masked.masks, params, "retained_magnitude")
    leaves = zip(masks, by_path(params).items(), strict=True)
    return {path: _retained(w, mask) for mask, (path, w) in leaves if mask is not None}


def second_moments(opt_state: PyTree) -> dict[str, jax.Array]:
    """The second moments of Adam by path, from any optimizer state with a field `nu`."""

    def has_one(node):
        return isinstance(node, tuple) and "nu" in getattr(node, "_fields", ())

    opt_state = getattr(opt_state, "opt_state", opt_state)  # an nnx.Optimizer
    moments = [node.nu for node in jax.tree.leaves(opt_state, is_leaf=has_one) if has_one(node)]
    return {path: nu for one in moments for path, nu in by_path(one).items()}


def _sparse_masks(source, call):
    masks = by_path(read_state(source, call).masks)
    return {path: mask for path, mask in masks.items() if mask.ndim}


def _share(mask):
    # a sum in float32 would stop counting at 2^24
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32) / jnp.float32(mask.size)


def _retained(w, mask):
    magnitude = jnp.abs(w.astype(jnp.float32))
    total = magnitude.sum()
    kept = jnp.where(mask, magnitude, 0.0).sum()
    return jnp.where(total == 0, 1.0, kept / total)
