"""Paths of the leaves of a tree, which connect parameters, masks and plans."""

import collections
import threading
from typing import Any

import jax
from jaxtyping import PyTree

__all__ = ["by_path", "is_box", "leaf_paths"]

_VALUE = jax.tree_util.GetAttrKey("value")
_MOST = 256  # the number of tree structures whose paths are cached
_known: dict[Any, tuple[str, ...]] = {}
_lock = threading.Lock()


def leaf_paths(tree: PyTree) -> tuple[str, ...]:
    """The path of every leaf in tree order, such as `"encoder/kernel"`.

    A leading `params/` is dropped; boxes around leaves, such as those of Flax, add nothing.
    """
    structure = jax.tree.structure(tree)
    try:
        paths = _known.get(structure)
    except (TypeError, ValueError):  # a node has metadata that cannot be hashed or compared
        return _paths(tree)
    if paths is None:
        paths = _paths(tree)
        with _lock:
            if len(_known) >= _MOST:
                _known.clear()
            _known[structure] = paths
    return paths


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, in tree order."""
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def is_box(node: Any) -> bool:
    """Whether a node is a box that Flax puts around a leaf, such as `nn.Partitioned`."""
    if isinstance(node, (dict, list, tuple)) or node is None:
        return False
    children = jax.tree.leaves_with_path(node)
    return len(children) == 1 and bool(children[0][0]) and set(children[0][0]) == {_VALUE}


def _paths(tree: PyTree) -> tuple[str, ...]:
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    children = collections.defaultdict(set)
    for path in paths:
        for i, key in enumerate(path):
            children[path[:i]].add(key)

    def unboxed(path):  # drops nnx.Variable, nn.Partitioned, whose only child is `value`
        return unboxed(path[:-1]) if path and children[path[:-1]] == {_VALUE} else path

    texts = (jax.tree_util.keystr(unboxed(path), simple=True, separator="/") for path in paths)
    return tuple(text.removeprefix("params/") for text in texts)
