"""The check that a model is sparse."""

from typing import Any

import jax
from jaxtyping import PyTree

from jaxsparse._packed.sparse24 import Sparse24, decompress
from jaxsparse._plan.masks import magnitude_masks
from jaxsparse._plan.paths import by_path
from jaxsparse._plan.plan import Plan

__all__ = ["assert_sparse"]


def assert_sparse(params: PyTree, plan: Plan) -> None:
    """Checks that every planned weight is as sparse as its pattern says.

    A weight is, if the weights that its pattern would keep by magnitude include all that are not 0.
    Compressed weights are checked as well.

    Args:
      params: pytree of weights, such as `effective_params`, `prune` or `compress` return.
      plan: which leaf follows which pattern.

    Returns:
      None.

    Raises:
      AssertionError: weights of some leaves break their pattern; the message names every such leaf.
      ValueError: `params` lacks a leaf that the plan makes sparse, or has it with another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([[1.0], [-4.0], [3.0], [2.0]])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> js.assert_sparse(js.effective_params(params, js.magnitude_masks(params, plan)), plan)
      >>> js.assert_sparse(params, plan)
      Traceback (most recent call last):
      AssertionError: assert_sparse: 1 of 1 planned leaves is not sparse.
        w, planned as 2:4: 4 of 4 weights are not 0, and 2 of them break the pattern
      Pass effective_params, or the parameters that prune returns.
    """
    dense = jax.tree.map(
        lambda leaf: decompress(leaf) if isinstance(leaf, Sparse24) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Sparse24),
    )
    masks = by_path(magnitude_masks(dense, plan))
    weights = by_path(dense)
    problems: list[str] = []
    for path, leaf in plan.sparse.items():
        used: Any = weights[path] != 0
        extra = int((used & ~masks[path]).sum())
        if extra:
            problems.append(
                f"  {path}, planned as {leaf.pattern}: {int(used.sum())} of {used.size} weights "
                f"are not 0, and {extra} of them break the pattern"
            )
    if problems:
        verb = "is" if len(problems) == 1 else "are"
        raise AssertionError(
            "\n".join(
                [
                    f"assert_sparse: {len(problems)} of {len(plan.sparse)} planned leaves {verb} "
                    "not sparse.",
                    *problems,
                    "Pass effective_params, or the parameters that prune returns.",
                ]
            )
        )
