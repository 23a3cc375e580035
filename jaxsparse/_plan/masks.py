"""The masks of a plan, from weights by magnitude or from scores."""

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._plan.paths import by_path
from jaxsparse._plan.pattern import Pattern, axes_in
from jaxsparse._plan.plan import Leaf, Plan, map_planned, match

__all__ = ["magnitude_masks", "score_masks"]


def magnitude_masks(params: PyTree, plan: Plan, *, step: Any = 0) -> Any:
    """Computes masks by magnitude for every leaf of `params`, following a plan.

    Under a pattern of global scope, all leaves that share it are ranked together; among equal
    weights, earlier leaves come first.

    Args:
      params: pytree of weights.
      plan: which leaf follows which pattern, from `jaxsparse.plan`, `flax.plan` or `nnx.plan`.
      step: the optimizer step, an int or traced, for patterns whose density follows a schedule.

    Returns:
      A pytree of the structure of `params`: a boolean array of the leaf's shape for a sparse leaf,
      and the scalar True for a dense leaf, so that `jax.tree.map` and broadcasting work and a dense
      leaf costs one byte.

    Raises:
      ValueError: `params` lacks a leaf that the plan makes sparse, or has it with another shape.

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


def score_masks(scores: Any, plan: Plan, *, step: Any = 0) -> Any:
    """Computes masks by scores for every leaf, following a plan.

    This is `magnitude_masks`, except that the highest scores participate, whatever their sign.

    Args:
      scores: pytree of the structure of the parameters, with a score for each weight; the scores of
        dense leaves do not matter.
      plan: which leaf follows which pattern.
      step: the optimizer step, an int or traced, for patterns whose density follows a schedule.

    Returns:
      A pytree of masks, as `magnitude_masks` returns it.

    Raises:
      ValueError: `scores` lacks a leaf that the plan makes sparse, or has it with another shape.

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
    # under a global scope, all leaves with an equal pattern are ranked together
    together: dict = {}
    for path, leaf in plan.sparse.items():
        pattern = cast(Pattern, leaf.pattern)
        key = pattern.along(None) if pattern.scope == "global" else path
        together.setdefault(key, []).append(leaf)
    masks_by_path: dict = {}
    for leaves in together.values():
        masks_by_path.update(_ranked_together(leaves, values, step, magnitude))
    return map_planned(
        lambda leaf, _: masks_by_path[leaf.path],
        plan,
        tree,
        call=call,
        dense=lambda _: jnp.asarray(True),
    )


def _ranked_together(leaves: list[Leaf], values: Any, step: Any, magnitude: Any) -> dict:
    first = leaves[0]
    pattern = cast(Pattern, first.pattern)
    masks = pattern.masks(
        [values[leaf.path] for leaf in leaves],
        [axes_in(cast(Pattern, leaf.pattern), len(leaf.shape)) for leaf in leaves],
        magnitude=magnitude,
        stack=first.stack if pattern.scope == "leaf" else (),
        step=step,
    )
    return {leaf.path: mask for leaf, mask in zip(leaves, masks, strict=True)}
