"""Scores to masks. A mask is boolean; True marks a weight that participates."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.patterns import Pattern, array, group_axis, integer
from jaxsparse.plan import Plan, match

__all__ = ["magnitude_masks", "nm_mask", "pattern_mask"]


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
    scores = lax.stop_gradient(array(scores, "nm_mask: `scores`"))
    n, m, axis = _check_nm(scores, n, m, axis)
    if isinstance(n, int) and n == m:
        return jnp.ones(scores.shape, bool)
    groups = scores.reshape(*scores.shape[:axis], scores.shape[axis] // m, m, *scores.shape[axis + 1 :])
    return _mask_groups(_order_keys(groups), n, m, axis + 1).reshape(scores.shape)


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


def _order_keys(scores):
    """Integers that order as the scores do: -0 equals 0, NaN is above infinity."""
    if jnp.issubdtype(scores.dtype, jnp.integer):
        if jnp.issubdtype(scores.dtype, jnp.signedinteger):
            return scores
        signed = jnp.dtype(f"int{8 * scores.dtype.itemsize}")
        return lax.bitcast_convert_type(scores, signed) ^ jnp.iinfo(signed).min
    if scores.dtype.itemsize == 1:  # the 8-bit floats differ in their bits for NaN and zero: let float16 settle it
        scores = scores.astype(jnp.float16)
    bits = lax.bitcast_convert_type(scores, jnp.dtype(f"int{8 * scores.dtype.itemsize}"))
    highest, lowest = jnp.iinfo(bits.dtype).max, jnp.iinfo(bits.dtype).min
    keys = jnp.where(bits < 0, lowest - bits, bits)  # sign and magnitude to two's complement
    return jnp.where(jnp.isnan(scores), highest, keys)


_WORD = 8  # up to here all pairs of a group are compared; above, the best is taken n times


def _mask_groups(keys, n, m, axis):
    position = lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    if m <= _WORD:
        word = _once(functools.partial(_words, m=m, axis=axis), keys, n)
        return (jnp.expand_dims(word, axis) >> position.astype(jnp.uint8)) & 1 == 1
    return lax.fori_loop(0, n, functools.partial(_take_best, keys, position, m, axis), jnp.zeros(keys.shape, bool))


def _words(keys, n, *, m, axis):
    """One byte a group, bit i set where member i is among the n highest."""
    members = [lax.index_in_dim(keys, i, axis, keepdims=False) for i in range(m)]
    beaten_by = [jnp.zeros(members[0].shape, jnp.uint8) for _ in members]
    for j in range(m):
        for i in range(j):
            lower_wins = (members[i] >= members[j]).astype(jnp.uint8)
            beaten_by[j] += lower_wins
            beaten_by[i] += 1 - lower_wins
    return sum((rank < n).astype(jnp.uint8) << i for i, rank in enumerate(beaten_by))


def _take_best(keys, position, m, axis, _, taken):
    """Adds the best of those not taken yet to each group; taken ones compete as the lowest key at a place behind all others."""
    lowest = jnp.iinfo(keys.dtype).min

    def better(a, b):
        (key_a, place_a), (key_b, place_b) = a, b
        first = (key_a > key_b) | ((key_a == key_b) & (place_a < place_b))
        return jnp.where(first, key_a, key_b), jnp.where(first, place_a, place_b)

    operands = jnp.where(taken, lowest, keys), jnp.where(taken, m, position)
    _, best = lax.reduce(operands, (jnp.array(lowest, keys.dtype), jnp.int32(m)), better, (axis,))
    return taken | (position == jnp.expand_dims(best, axis))


def _once(f, keys, n):
    """Calls f so that its result is computed once per group.

    XLA:CPU fuses a per-group result into the expansion that reads it and computes it again for each member; a
    conditional on an opaque constant stops that. Elsewhere the fusion is what one wants.
    """

    def materialised(keys, n):
        result = jax.eval_shape(f, keys, n)
        opaque = lax.optimization_barrier(jnp.bool_(True))
        return lax.cond(opaque, f, lambda *_: jnp.zeros(result.shape, result.dtype), keys, n)

    return lax.platform_dependent(keys, n, cpu=materialised, default=f)


def pattern_mask(scores, pattern: Pattern) -> jax.Array:
    """The mask of one array under a pattern that names its axis."""
    return nm_mask(scores, pattern.n, pattern.m, axis=group_axis(pattern, scores.ndim))


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

    def mask(leaf, weight):
        return jnp.asarray(True) if leaf is None else pattern_mask(jnp.abs(weight), leaf.pattern)

    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, map(mask, match(plan, params, "magnitude_masks"), leaves))
