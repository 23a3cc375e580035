"""Arguments of traced functions: which are arrays, and which are not."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

__all__ = ["is_array", "is_traceable", "split_arrays"]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, concrete or abstract."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic))


def is_traceable(leaf: Any) -> bool:
    """Whether a leaf is an array, or a number that jax converts to one."""
    return is_array(leaf) or isinstance(leaf, (bool, int, float, complex))


def split_arrays(
    tree: PyTree, is_leaf: Callable[[Any], bool] = lambda node: False
) -> tuple[list, Callable[[Any], Any]]:
    """Splits a pytree into its array leaves and a function that rebuilds the pytree.

    The function takes the replacements of the arrays, in order. Leaves for which `is_leaf` holds
    count as arrays.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    replaced = [is_array(leaf) or is_leaf(leaf) for leaf in leaves]
    # so that `rebuild` keeps no array alive
    others = [None if array else leaf for leaf, array in zip(leaves, replaced, strict=True)]

    def rebuild(arrays):
        rest = iter(arrays)
        return jax.tree.unflatten(
            treedef,
            [next(rest) if array else other for other, array in zip(others, replaced, strict=True)],
        )

    return [leaf for leaf, array in zip(leaves, replaced, strict=True) if array], rebuild
