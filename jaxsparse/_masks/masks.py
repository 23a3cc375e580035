"""Scores to masks. A mask is boolean; True marks a weight that participates."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._masks.blocks import block_keys, expand_blocks
from jaxsparse._masks.groups import mask_groups
from jaxsparse._masks.ranking import magnitude_keys, once, order_keys, wide
from jaxsparse._masks.topk import how_many, top_masks
from jaxsparse._masks.transposable import transposable_mask
from jaxsparse._plan.patterns import (
    NM,
    Block,
    Pattern,
    TransposableNM,
    Unstructured,
    array,
    axes_in,
    density,
    integer,
    why_not,
)
from jaxsparse._plan.plan import Leaf, Plan, leaf_paths, match

__all__ = [
    "block_mask",
    "magnitude_masks",
    "nm_mask",
    "score_masks",
    "topk_mask",
    "transposable_nm_mask",
]


def nm_mask(scores, n, m: int, *, axis: int) -> jax.Array:
    """Marks the `n` highest scores of every group of `m` as participating.

    Groups are runs of `m` neighbours along `axis`; they never wrap into the next row. Equal scores
    keep the lower index, so exactly `n` stay. NaN ranks highest, so that it is seen rather than
    hidden. Not
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
      TypeError: scores are complex or boolean, or `n`, `m` or `axis` is no integer.
      ValueError: `n` is not in `1..m`, `axis` is out of range, or its size is not a multiple of
        `m`.

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
    n, m, axis = _check_nm(scores, n, m, axis)
    return (_nm_mask_of_int if isinstance(n, int) else _nm_mask)(scores, order_keys, n, m, axis)


def _nm_mask(values, keys_of, n, m, axis):
    values = lax.stop_gradient(values)
    if isinstance(n, int) and n == m:
        return jnp.ones(values.shape, bool)
    # XLA:CPU reshapes and cuts a bfloat16 by way of float32: integers before all else
    if values.dtype.itemsize < 4:
        keys = keys_of(values)
        # XLA:CPU does not vectorise the search of 2:16 together with more than a magnitude, and
        # takes 3 times as long
        values = (
            once(keys)
            if keys_of is order_keys and isinstance(n, int) and n == 2 and m > 8
            else keys
        )
        keys_of = lambda keys: keys  # noqa: E731
    groups = values.reshape(
        *values.shape[:axis], values.shape[axis] // m, m, *values.shape[axis + 1 :]
    )
    return mask_groups(groups, keys_of, n, m, axis + 1).reshape(values.shape)


# compiled once for each shape when it is called eagerly
_nm_mask_of_int = jax.jit(_nm_mask, static_argnums=(1, 2, 3, 4))


def _check_nm(scores, n, m, axis):
    shape = scores.shape
    _check_real("nm_mask", scores)
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


def transposable_nm_mask(scores, n: int, m: int, *, axes: tuple[int, int]) -> jax.Array:
    """Marks `n` of every `m` scores along both of two axes, so that the sum of the marked ones is
    the largest possible.

    Blocks of `m` by `m` neighbours are independent; each keeps exactly `n` in every row and column.
    Of masks with equal sums the one stays that keeps the lower flat index at their first
    difference. Without such ties the mask of the transpose is the transposed mask. Sums are taken
    in float32. NaN outweighs everything else, then inf. Not
    differentiable: gradients stop here.

    Args:
      scores: real array of two or more axes, of a floating or integer dtype; the importance of each
        weight. Magnitude pruning passes `jnp.abs(w)`.
      n: how many stay, 1, 2 or 3.
      m: the group length, 4.
      axes: the two axes along which groups run.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: scores are complex or boolean, or `n`, `m` or an axis is no integer.
      ValueError: `n` and `m` are no such pattern, `axes` are not two axes of `scores`, or a size is
        not a multiple of `m`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> scores = jnp.array([[9, 8, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
      >>> js.transposable_nm_mask(scores, 1, 4, axes=(0, 1)).astype(int)
      Array([[0, 1, 0, 0],
             [1, 0, 0, 0],
             [0, 0, 1, 0],
             [0, 0, 0, 1]], dtype=int32)

    References:
      Advances in Sparse Neural Model Training, section 2, 2:4 along both axes.
    """
    scores = array(scores, "transposable_nm_mask: `scores`")
    pattern = _fitting("transposable_nm_mask", scores, TransposableNM, n, m, axes)
    return transposable_mask(lax.stop_gradient(scores), pattern.n, axes_in(pattern, scores.ndim))


def topk_mask(scores, density) -> jax.Array:
    """Marks the highest scores of the whole array, exactly `density * size` of them.

    The number is rounded half up and at least 1. Equal scores keep the lower flat index. NaN ranks
    highest. Not
    differentiable: gradients stop here.

    Args:
      scores: real array of any shape and of a floating or integer dtype; the importance of each
        weight. Only the order matters. Magnitude pruning passes `jnp.abs(w)`.
      density: the fraction that stays, a float in (0, 1], or a traced scalar so that a schedule
        does not recompile; its product with the size is then a float32.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: scores are complex or boolean, or `density` is no number.
      ValueError: `density` is not in (0, 1], or there are more scores than an int32 counts.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.topk_mask(jnp.array([3.0, 1.0, 2.0, 2.0]), 0.5)
      Array([ True, False,  True, False], dtype=bool)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, top-d.
    """
    scores = array(scores, "topk_mask: `scores`")
    _check_real("topk_mask", scores)
    return top_masks(
        [lax.stop_gradient(scores)],
        order_keys,
        how_many(_check_density("topk_mask", density), scores.size),
    )[0]


def block_mask(
    scores, shape: tuple[int, int], density, *, axes: tuple[int, int], score: str = "max"
) -> jax.Array:
    """Marks the highest blocks of scores, exactly `density * blocks` of them, all of a block or
    none.

    Where a size is no multiple of the block's, the last block is smaller and is scored by what it
    holds. The number is rounded half up and at least 1. Equal blocks keep the lower flat index. A
    block with a NaN ranks highest. Not
    differentiable: gradients stop here.

    Args:
      scores: real array of two or more axes, of a floating or integer dtype; the importance of each
        weight. Magnitude pruning passes `jnp.abs(w)`.
      shape: the sizes of a block along `axes`; along every other axis it is 1.
      density: the fraction of blocks that stays, a float in (0, 1], or a traced scalar so that a
        schedule does not recompile.
      axes: the two axes over which blocks stand.
      score: what ranks a block: `"max"`, `"mean"` or `"l2"` (the root of the sum of squares); the
        last two in float32.

    Returns:
      Boolean array of the shape of `scores`.

    Raises:
      TypeError: scores are complex or boolean, a size or an axis is no integer, or `density` is no
        number.
      ValueError: `shape`, `density`, `axes` or `score` is none that `Block` takes, or an axis is
        out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.block_mask(jnp.array([[1, 1, 5], [1, 1, 0]]), (2, 2), 0.5, axes=(0, 1)).astype(int)
      Array([[0, 0, 1],
             [0, 0, 1]], dtype=int32)

    References:
      Advances in Sparse Neural Model Training, section 2, block sparsity.
    """
    scores = array(scores, "block_mask: `scores`")
    density = _check_density("block_mask", density)
    pattern = _fitting("block_mask", scores, Block, shape, 1.0, axes, score)
    places = axes_in(pattern, scores.ndim)
    keys = block_keys(lax.stop_gradient(scores), order_keys, pattern.shape, places, score)
    (mask,) = top_masks([keys], order_keys, how_many(density, keys.size))
    return expand_blocks(mask, pattern.shape, places, scores.shape)


def _check_real(call, scores):
    if not (
        jnp.issubdtype(scores.dtype, jnp.floating) or jnp.issubdtype(scores.dtype, jnp.integer)
    ):
        raise TypeError(
            f"{call}: `scores` are {scores.dtype}, which has no order to rank by. Pass real "
            "scores, as in jnp.abs(w)."
        )


def _fitting(call, scores, kind, *args):
    """The pattern of these arguments, once the scores are known to be able to follow it."""
    _check_real(call, scores)
    try:
        pattern = kind(*args)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}: {error}") from None
    if pattern.axes is None:
        raise TypeError(f"{call}: `axes` must be two integers, not None.")
    reason = why_not(pattern, scores.shape, scores.dtype)
    if reason:
        raise ValueError(
            f"{call}: {reason} (`scores` of shape {scores.shape}). Choose other axes, pad it, or "
            "leave this leaf dense."
        )
    return pattern


def _check_density(call, value):
    if not isinstance(value, jax.core.Tracer):
        return density(value, call)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{call}: `density` must be a floating scalar, not {value.dtype}{list(value.shape)}."
        )
    return value


def magnitude_masks(params, plan: Plan, *, step=0):
    """Masks for every leaf of `params` by magnitude, each under its pattern in `plan`.

    Under a pattern of global scope all leaves that share it are ranked together, equal weights by
    the order of the leaves.

    Args:
      params: pytree of weights.
      plan: which leaf follows which pattern, from `jaxsparse.plan` or `jaxsparse.flax.plan`.
      step: the optimizer step, an int or traced, for patterns whose density follows a schedule.

    Returns:
      A pytree of the structure of `params`: a boolean array of the leaf's shape where it is sparse,
      and the scalar True where it is dense, so that `jax.tree.map` and broadcasting go on working
      and a dense leaf costs one byte.

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
    return _masks(params, plan, step, "magnitude_masks", magnitude=True)


def score_masks(scores, plan: Plan, *, step=0):
    """As `magnitude_masks`, by scores; those of dense leaves do not matter."""
    return _masks(scores, plan, step, "score_masks", magnitude=False)


def _masks(tree, plan, step, call, *, magnitude):
    """The masks of a tree of weights, ranked by magnitude, or of scores."""
    leaves, treedef = jax.tree.flatten(tree)
    values = dict(zip(leaf_paths(tree), map(lax.stop_gradient, leaves), strict=True))
    together: dict[Pattern, list[Leaf]] = {}
    masks = {}
    for leaf in match(plan, tree, call):
        if leaf is None or leaf.pattern is None:
            continue
        if isinstance(leaf.pattern, Unstructured | Block) and leaf.pattern.scope == "global":
            together.setdefault(leaf.pattern.along(None), []).append(leaf)
        else:
            masks[leaf.path] = _mask(values[leaf.path], leaf, step, magnitude)
    for alike in together.values():
        found = _ranked([values[leaf.path] for leaf in alike], alike, step, magnitude)
        masks.update(zip((leaf.path for leaf in alike), found, strict=True))
    return jax.tree.unflatten(treedef, [masks.get(path, jnp.asarray(True)) for path in values])


def _mask(values, leaf, step, magnitude):
    if isinstance(leaf.pattern, NM | TransposableNM):
        return _grouped_mask(values, leaf.pattern, magnitude)
    return _ranked([values], [leaf], step, magnitude)[0]


@functools.partial(
    jax.jit, static_argnums=(1, 2)
)  # many leaves have one shape: traced once for all
def _grouped_mask(values, pattern, magnitude):
    if isinstance(pattern, NM):
        keys_of = magnitude_keys if magnitude else order_keys
        return _nm_mask(values, keys_of, pattern.n, pattern.m, *axes_in(pattern, values.ndim))
    return transposable_mask(
        jnp.abs(wide(values)) if magnitude else values, pattern.n, axes_in(pattern, values.ndim)
    )


def _ranked(values, leaves, step, magnitude):
    """The masks of leaves that share one density."""
    pattern = leaves[0].pattern
    dtypes = {x.dtype for x in values}
    if len(dtypes) > 1:  # 8-bit floats promote to no other type by themselves
        dtypes = {jnp.result_type(*(wide(x) if x.dtype.itemsize == 1 else x for x in values))}
        values = [x.astype(*dtypes) for x in values]
    density = (
        pattern.density
        if pattern.schedule is None
        else jnp.asarray(pattern.schedule(step), jnp.float32)
    )

    keys_of = magnitude_keys if magnitude else order_keys
    if not isinstance(pattern, Block):
        return _top(values, keys_of, density, leaves)
    axes = [axes_in(leaf.pattern, len(leaf.shape)) for leaf in leaves]
    keys = [
        block_keys(x, keys_of, pattern.shape, a, pattern.score, magnitude=magnitude)
        for x, a in zip(values, axes, strict=True)
    ]
    masks = _top(keys, order_keys, density, leaves)
    return [
        expand_blocks(mask, pattern.shape, a, x.shape)
        for mask, a, x in zip(masks, axes, values, strict=True)
    ]


def _top(arrays, keys_of, density, leaves):
    def top(*arrays):
        return top_masks(arrays, keys_of, how_many(density, sum(a.size for a in arrays)))

    if leaves[0].pattern.scope == "leaf":
        for axis in reversed(leaves[0].stack):  # each weight of a stack for itself
            top = jax.vmap(top, axis, axis)
    return top(*arrays)
