"""Arguments of functions that are traced: which are arrays, and the others."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["is_array", "is_traceable", "split_arrays"]


def is_array(leaf) -> bool:
    """Whether a leaf is an array, abstract or not."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic))


def is_traceable(leaf) -> bool:
    """Whether a leaf is an array or a number that stands for one."""
    return is_array(leaf) or isinstance(leaf, (bool, int, float, complex))


def split_arrays(
    tree, is_leaf: Callable[[Any], bool] = lambda node: False
) -> tuple[list, Callable[[Any], Any]]:
    """The leaves of a pytree that are arrays, or that `is_leaf` says, and the function that puts
    others in their place.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    taken = [is_array(leaf) or is_leaf(leaf) for leaf in leaves]
    # no array, traced or not, is kept alive
    others = [None if array else leaf for leaf, array in zip(leaves, taken, strict=True)]

    def rebuild(arrays):
        rest = iter(arrays)
        return jax.tree.unflatten(
            treedef,
            [next(rest) if array else other for other, array in zip(others, taken, strict=True)],
        )

    return [leaf for leaf, array in zip(leaves, taken, strict=True) if array], rebuild
