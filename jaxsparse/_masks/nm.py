"""N:M masks: n of every m neighbours along one axis."""

import functools
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Integer, Real

from jaxsparse import _checks
from jaxsparse._checks import AnArray
from jaxsparse._masks.groups import mask_groups
from jaxsparse._masks.ranking import magnitude_keys, once, order_keys

__all__ = ["mask_of_magnitudes", "mask_of_scores", "nm_mask"]


def nm_mask(
    scores: Real[ArrayLike, "*shape"],
    n: Integer[ArrayLike, ""],
    m: SupportsIndex,
    *,
    axis: SupportsIndex,
) -> Bool[Array, "*shape"]:
    """Marks the `n` highest scores of every group of `m` as participating.

    Groups are runs of `m` neighbours along `axis`; they never wrap into the next row. Equal scores
    keep the lower index, so exactly `n` stay. NaN ranks highest, so that it remains visible. Not
    differentiable: gradients stop here.

    Args:
      scores: real array of any shape and of a floating or integer dtype; the importance of each
        weight. Only the order matters. Magnitude pruning passes `jnp.abs(w)`.
      n: how many of each group stay, an int in `1..m` or a traced integer scalar, so that a
        schedule does not recompile. A traced `n` below 1 keeps nothing, above `m` everything.
      m: the group length.
      axis: the axis along which groups run, usually the one that the matmul sums over.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: `scores` are complex or boolean, or `n`, `m` or `axis` is not an integer.
      ValueError: `n` is not in `1..m`, `axis` is out of range, or its size is not a multiple of
        `m`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.nm_mask(jnp.array([3.0, 1.0, 2.0, 2.0]), 2, 4, axis=0)
      Array([ True, False,  True, False], dtype=bool)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378); Zhou et
      al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
      (arXiv:2102.04010).
    """
    scores = _checks.array(scores, "nm_mask: `scores`")
    n, m, axis = _checked(scores, n, m, axis)
    if isinstance(n, int):
        return mask_of_scores(scores, n, m, axis)
    return _mask(scores, order_keys, n, m, axis)


def _checked(scores, n, m, axis):
    shape = scores.shape
    if not _checks.rankable(scores.dtype):
        raise TypeError(
            f"nm_mask: `scores` are {scores.dtype}, which cannot be ranked. Pass real scores, as "
            "in jnp.abs(w)."
        )
    if not isinstance(n, jax.core.Tracer):
        n, m = _checks.counts("nm_mask", n, m)
    elif n.shape or not jnp.issubdtype(n.dtype, jnp.integer):
        raise TypeError(f"nm_mask: `n` must be an integer scalar, not {n.dtype}{list(n.shape)}.")
    else:
        n, m = n.astype(jnp.int32), _checks.integer(m, "nm_mask: `m`")
        _checks.counts("nm_mask", 1, m)
    axis = _checks.integer(axis, "nm_mask: `axis`")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"nm_mask: axis {axis} is out of range for `scores` of shape {shape}. Pass one of its "
            f"{len(shape)} axes."
        )
    if shape[axis] % m:
        raise ValueError(
            f"nm_mask: axis {axis} of `scores` has size {shape[axis]}, not a multiple of m={m} "
            f"(pattern {n}:{m}, shape {shape}). Choose another axis, pad it, or leave this leaf "
            "dense."
        )
    return n, m, axis % len(shape)


def _mask(values, keys_of, n, m, axis):
    values = lax.stop_gradient(values)
    if isinstance(n, int) and n == m:
        return jnp.ones(values.shape, bool)
    # XLA:CPU reshapes and slices bfloat16 through float32, so convert to integers first
    if values.dtype.itemsize < 4:
        keys = keys_of(values)
        # XLA:CPU does not vectorise 2:16 when the search is fused with these keys, and takes 3
        # times as long
        values = (
            once(keys)
            if keys_of is order_keys and isinstance(n, int) and n == 2 and m > 8
            else keys
        )
        keys_of = _identity
    groups = values.reshape(
        *values.shape[:axis], values.shape[axis] // m, m, *values.shape[axis + 1 :]
    )
    return mask_groups(groups, keys_of, n, m, axis + 1).reshape(values.shape)


def _identity(keys):
    return keys


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def mask_of_scores(
    scores: Real[AnArray, "*shape"], n: int, m: int, axis: int
) -> Bool[Array, "*shape"]:
    """The mask of the n highest scores of each group; `axis` is not negative."""
    return _mask(scores, order_keys, n, m, axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def mask_of_magnitudes(
    weights: Real[AnArray, "*shape"], n: int, m: int, axis: int
) -> Bool[Array, "*shape"]:
    """The mask of the n largest magnitudes of each group; `axis` is not negative."""
    return _mask(weights, magnitude_keys, n, m, axis)
