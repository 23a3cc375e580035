"""The masks of a plan: from weights by magnitude, or from scores."""

import jax.numpy as jnp

from jaxsparse._plan.paths import by_path
from jaxsparse._plan.pattern import axes_in
from jaxsparse._plan.plan import Leaf, Plan, map_planned, match

__all__ = ["magnitude_masks", "score_masks"]


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
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> js.magnitude_masks(params, plan)["w"][:, 0]
      Array([False,  True,  True, False], dtype=bool)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3.1 (arXiv:2104.08378).
    """
    return _masks(params, plan, step, "magnitude_masks", magnitude=True)


def score_masks(scores, plan: Plan, *, step=0):
    """Masks for every leaf by scores, each under its pattern in `plan`.

    As `magnitude_masks`, but the highest scores participate, whatever their sign.

    Args:
      scores: pytree of the structure of the parameters, with a score for each weight; the scores
        of dense leaves do not matter.
      plan: which leaf follows which pattern.
      step: the optimizer step, an int or traced, for patterns whose density follows a schedule.

    Returns:
      A pytree of masks, as `magnitude_masks` returns it.

    Raises:
      ValueError: `scores` lacks a leaf that the plan makes sparse, or has it in another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> scores = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> js.score_masks(scores, js.plan(scores, {"w": js.NM(2, 4, axis=0)}))
      {'w': Array([False, False,  True,  True], dtype=bool)}
    """
    return _masks(scores, plan, step, "score_masks", magnitude=False)


def _masks(tree, plan, step, call, *, magnitude):
    match(plan, tree, call)
    values = by_path(tree)
    together: dict = {}  # leaves of a global scope are ranked with all of an equal pattern
    for path, leaf in plan.sparse.items():
        pattern = leaf.pattern
        key = pattern.along(None) if pattern.scope == "global" else path
        together.setdefault(key, []).append(leaf)
    found: dict = {}
    for leaves in together.values():
        found.update(_ranked_together(leaves, values, step, magnitude))
    return map_planned(
        lambda leaf, _: found[leaf.path], plan, tree, call=call, dense=lambda _: jnp.asarray(True)
    )


def _ranked_together(leaves: list[Leaf], values, step, magnitude) -> dict:
    first = leaves[0]
    masks = first.pattern.masks(
        [values[leaf.path] for leaf in leaves],
        [axes_in(leaf.pattern, len(leaf.shape)) for leaf in leaves],
        magnitude=magnitude,
        stack=first.stack if first.pattern.scope == "leaf" else (),
        step=step,
    )
    return {leaf.path: mask for leaf, mask in zip(leaves, masks, strict=True)}
