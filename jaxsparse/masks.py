"""Scores to masks. A mask is boolean; True marks a weight that participates."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.groups import mask_groups
from jaxsparse.patterns import array, group_axis, integer
from jaxsparse.plan import Plan, match
from jaxsparse.ranking import magnitude_keys, order_keys

__all__ = ["magnitude_masks", "nm_mask", "score_masks"]


def nm_mask(scores, n, m: int, *, axis: int) -> jax.Array:
    """Marks the `n` highest scores of every group of `m` as participating.

    Groups are runs of `m` neighbours along `axis`; they never wrap into the next row. Equal scores keep the
    lower index, so exactly `n` stay. NaN ranks highest, so that it is seen rather than hidden. Not
    differentiable: gradients stop here.

    Args:
      scores: real array of any shape and of a floating or integer dtype; the importance of each weight. Only
        the order matters. Magnitude pruning passes `jnp.abs(w)`.
      n: how many of each group stay, an int in `1..m` or a traced integer scalar, so that a schedule does not
        recompile. A traced `n` below 1 keeps nothing, above `m` everything.
      m: the group length.
      axis: the axis along which groups run, usually the one that the matmul sums over.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: scores are complex or boolean, or `n`, `m` or `axis` is no integer.
      ValueError: `n` is not in `1..m`, `axis` is out of range, or its size is not a multiple of `m`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.nm_mask(jnp.array([3.0, 1.0, 2.0, 2.0]), 2, 4, axis=0)
      Array([ True, False,  True, False], dtype=bool)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3; Zhou et al., Learning N:M
      Fine-grained Structured Sparse Neural Networks From Scratch.
    """
    scores = array(scores, "nm_mask: `scores`")
    return _nm_mask(scores, order_keys, *_check_nm(scores, n, m, axis))


def _nm_mask(values, keys_of, n, m, axis):
    values = lax.stop_gradient(values)
    if isinstance(n, int) and n == m:
        return jnp.ones(values.shape, bool)
    groups = values.reshape(*values.shape[:axis], values.shape[axis] // m, m, *values.shape[axis + 1 :])
    return mask_groups(groups, keys_of, n, m, axis + 1).reshape(values.shape)


def _check_nm(scores, n, m, axis):
    shape = scores.shape
    if not (jnp.issubdtype(scores.dtype, jnp.floating) or jnp.issubdtype(scores.dtype, jnp.integer)):
        raise TypeError(f"nm_mask: `scores` are {scores.dtype}, which has no order to rank by. Pass real scores, as in jnp.abs(w).")
    if not isinstance(n, jax.core.Tracer):
        n = integer(n, "nm_mask: `n`")
    elif n.shape or not jnp.issubdtype(n.dtype, jnp.integer):
        raise TypeError(f"nm_mask: `n` must be an integer scalar, not {n.dtype}{list(n.shape)}.")
    else:
        n = n.astype(jnp.int32)
    m, axis = integer(m, "nm_mask: `m`"), integer(axis, "nm_mask: `axis`")
    if m < 1 or (isinstance(n, int) and not 1 <= n <= m):
        raise ValueError(f"nm_mask: n={n} is not in 1..m={m}. n of every m weights participate.")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"nm_mask: axis {axis} is out of range for `scores` of shape {shape}. Pass one of its {len(shape)} axes.")
    if shape[axis] % m:
        raise ValueError(
            f"nm_mask: axis {axis} of `scores` has size {shape[axis]}, not a multiple of m={m} (pattern {n}:{m}, shape "
            f"{shape}). Choose another axis, pad it, or leave this leaf dense."
        )
    return n, m, axis % len(shape)


def magnitude_masks(params, plan: Plan):
    """Masks for every leaf of `params` by magnitude, each under its pattern in `plan`.

    Args:
      params: pytree of weights.
      plan: which leaf follows which pattern, from `jaxsparse.plan` or `jaxsparse.flax.plan`.

    Returns:
      A pytree of the structure of `params`: a boolean array of the leaf's shape where it is sparse, and the
      scalar True where it is dense, so that `jax.tree.map` and broadcasting go on working and a dense leaf costs
      one byte.

    Raises:
      ValueError: `params` lacks a leaf that the plan makes sparse, or has it in another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([[1.0], [-4.0], [3.0], [2.0]]), "b": jnp.zeros(1)}
      >>> js.magnitude_masks(params, js.plan(params, {"w": js.NM(2, 4, axis=0)}))["w"][:, 0]
      Array([False,  True,  True, False], dtype=bool)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3.1.
    """

    return _masks(params, magnitude_keys, plan, "magnitude_masks")


def score_masks(scores, plan: Plan):
    """Masks by scores: a pytree of the structure of the parameters, whose dense leaves do not matter."""
    return _masks(scores, order_keys, plan, "score_masks")


def _masks(tree, keys_of, plan, call):
    def mask(leaf, values):
        if leaf is None:
            return jnp.asarray(True)
        return _nm_mask(values, keys_of, leaf.pattern.n, leaf.pattern.m, group_axis(leaf.pattern, values.ndim))

    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(mask, match(plan, tree, call), leaves))
