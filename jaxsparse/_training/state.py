"""The state of `rewire`, which holds the masks, found wherever an optimizer nests it."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax import export
from jaxtyping import Array, ArrayLike, Bool, PyTree, UInt8

from jaxsparse._checks import Gradient
from jaxsparse._masks.bits import pack, unpack
from jaxsparse._plan.paths import is_box, leaf_paths
from jaxsparse._plan.plan import Leaf, Plan
from jaxsparse._registration import register_exported, register_saved, register_static

__all__ = [
    "Forward",
    "Masked",
    "RewireState",
    "is_placeholder",
    "mask_words",
    "masks",
    "pack_masks",
    "read_state",
    "rewire_states",
    "unpack_mask",
    "unpack_masks",
]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("decay_factor",), meta_fields=("gradient",)
)
@dataclasses.dataclass(frozen=True)
class Forward:
    """How the next forward pass treats non-participating weights.

    Attributes:
      decay_factor: the factor D that scales them, float32 scalar; None for 0.
      gradient: `"dense"` or `"masked"`, as for `effective_weight`, static.
    """

    decay_factor: Any = None
    gradient: Gradient = "dense"


class RewireState(NamedTuple):
    """The state of `rewire`.

    Attributes:
      count: the number of updates so far, int32 scalar.
      masks: the masks of the sparse leaves, packed in uint8 at one bit a weight; `masks` unpacks
        them to booleans.
      plan: the plan, static.
      forward: how the next forward pass treats non-participating weights.
      renew_state: the state of the `Renew`; None for most.
      inner_state: the state of the wrapped transformation.
    """

    count: jax.Array  # type: ignore[assignment]
    masks: Any
    plan: Plan
    forward: Forward
    renew_state: Any
    inner_state: Any


class Masked(NamedTuple):
    """The masks in an optimizer state or tree of masks, and how the next forward pass uses them.

    Attributes:
      masks: the masks, a pytree of booleans.
      forwards: for each sparse leaf, by path, how its non-participating weights are treated.
      planned: the sparse leaves of the plans, by path; empty for bare masks.
    """

    masks: Any
    forwards: dict[str, Forward]
    planned: dict[str, Leaf]


def rewire_states(opt_state: PyTree) -> list[RewireState]:
    """Finds every `RewireState` in an optimizer state, however deep it is nested."""

    def is_one(node):
        return isinstance(node, RewireState)

    # an nnx.Optimizer is a pytree too, but its leaves are in Variables, which masks are not
    opt_state = getattr(opt_state, "opt_state", opt_state)
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(node)]


def is_placeholder(params: PyTree) -> bool:
    """Whether these are the placeholder parameters of `optax.tree_utils.tree_map_params`."""
    container = isinstance(params, (dict, list, tuple)) or params is None
    return not container and not jax.tree.leaves(params)


def masks(opt_state):
    """Returns the masks in an optimizer state, however deep they are nested.

    Args:
      opt_state: the state of an optimizer that contains `rewire`, inside `optax.chain`,
        `MultiSteps`, `inject_hyperparams`, `multi_transform` and the like, or an `nnx.Optimizer`.

    Returns:
      A pytree of the structure of the parameters: boolean arrays for sparse leaves (True =
      participates), the scalar True for dense ones. If `multi_transform` or `masked` applies
      recipes to parts of the tree, their masks are merged; parts without a recipe are True.

    Raises:
      ValueError: the state holds no masks.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> tx = js.rewire(optax.sgd(0.1), js.plan(params, {"w": js.NM(2, 4, axis=0)}))
      >>> js.masks(tx.init(params))
      {'w': Array([False,  True,  True, False], dtype=bool)}
    """
    states = rewire_states(opt_state)
    if not states:
        raise ValueError(
            f"masks: this {type(opt_state).__name__} holds no masks. Wrap the optimizer in "
            "jaxsparse.rewire or a recipe of jaxsparse.recipes, and pass the state that its init "
            "returned."
        )
    merged = functools.reduce(_fill_holes, map(unpack_masks, states))
    return jax.tree.map(
        lambda node: jnp.asarray(True) if _is_hole(node) else node, merged, is_leaf=_is_hole
    )


def read_state(source: PyTree, call: str) -> Masked:
    """Reads the masks of an optimizer state, and how the forward pass uses them; or bare masks."""
    states = rewire_states(source)
    if states:
        forwards, planned = {}, {}
        for state in reversed(states):
            factor = jax.tree.leaves(state.forward.decay_factor)  # nnx wraps it in a Variable
            forward = Forward(factor[0] if factor else None, state.forward.gradient)
            forwards.update(dict.fromkeys(state.plan.sparse, forward))
            planned.update(state.plan.sparse)
        return Masked(masks(source), forwards, planned)
    leaves = jax.tree.leaves(source)
    booleans = (isinstance(x, bool) or getattr(x, "dtype", None) == jnp.dtype(bool) for x in leaves)
    if not leaves or not all(booleans):
        raise ValueError(
            f"{call}: this {type(source).__name__} is neither masks nor an optimizer state that "
            "holds them. Wrap the optimizer in jaxsparse.rewire or a recipe of jaxsparse.recipes, "
            "or pass a pytree of boolean masks."
        )
    return Masked(jax.tree.map(jnp.asarray, source), {}, {})


# --- masks at one bit a weight


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class _Bits:
    """The packed mask of a sparse leaf, inside the leaf's box if it has one.

    Its key in the tree names the pattern, so that a checkpoint with another pattern is refused even
    if the shapes agree.
    """

    words: Any
    pattern: str

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.DictKey(self.pattern), self.words),), self.pattern

    @classmethod
    def tree_unflatten(cls, pattern, children):
        return cls(children[0], pattern)


@dataclasses.dataclass(frozen=True)
class _Dense:
    """Represents the mask of a dense leaf; `box` is the structure of the box around it, if any."""

    box: tuple = ()


def _bits_from_dict(bits: _Bits, state: dict) -> _Bits:
    if state.keys() != {bits.pattern}:
        raise ValueError(
            f"RewireState: the saved masks follow {', '.join(state)}, but the plan has "
            f"{bits.pattern}. Restore into the state of the recipe that was saved."
        )
    return _Bits(serialization.from_state_dict(bits.words, state[bits.pattern]), bits.pattern)


register_static(_Dense, lambda dense: None, lambda _: _Dense())
register_exported(_Bits, lambda pattern: pattern, lambda pattern: pattern)
register_saved(
    _Bits, lambda bits: {bits.pattern: serialization.to_state_dict(bits.words)}, _bits_from_dict
)
register_exported(Forward, list, tuple)
register_saved(
    Forward,
    lambda forward: {"decay_factor": serialization.to_state_dict(forward.decay_factor)},
    lambda forward, state: dataclasses.replace(
        forward,
        decay_factor=serialization.from_state_dict(forward.decay_factor, state["decay_factor"]),
    ),
)
export.register_namedtuple_serialization(RewireState, serialized_name="jaxsparse.RewireState")


def pack_masks(masks: PyTree, plan: Plan, like: PyTree = None) -> Any:
    """Packs masks as a `RewireState` keeps them, with the dense leaves of `like` if it is given.

    NNX initialises with boxed parameters and updates with bare ones.
    """
    known = [] if like is None else jax.tree.leaves(like, is_leaf=_is_mask)

    def packed(path, node, before=None):
        leaf = plan.sparse.get(path)
        if leaf is None:
            return before or _Dense((jax.tree.structure(node),) if is_box(node) else ())
        axis = _bit_axis(leaf)
        return _Bits(jax.tree.map(lambda mask: pack(mask, axis), node), _label(leaf))

    nodes, structure = jax.tree.flatten(masks, is_leaf=is_box)
    paths = leaf_paths(masks)
    return jax.tree.unflatten(structure, map(packed, paths, nodes, *([known] if known else [])))


def unpack_masks(state: RewireState) -> Any:
    """Unpacks the masks of a `RewireState` to booleans."""

    nodes, structure = jax.tree.flatten(
        state.masks, is_leaf=lambda node: _is_mask(node) or _is_hole(node)
    )
    paths = leaf_paths(jax.tree.unflatten(structure, [0] * len(nodes)))

    def unpacked(path, node):
        if _is_hole(node):
            return node
        if isinstance(node, _Dense):
            true = jnp.asarray(True)
            return jax.tree.unflatten(node.box[0], [true]) if node.box else true
        leaf = state.plan.sparse[path]
        return jax.tree.map(lambda words: unpack_mask(words, leaf), node.words)

    return jax.tree.unflatten(structure, map(unpacked, paths, nodes))


def mask_words(opt_state: PyTree) -> dict[str, tuple[Any, Leaf]]:
    """The packed masks of an optimizer state by path, each with its planned leaf."""

    words_by_path = {}
    for state in rewire_states(opt_state):
        nodes, structure = jax.tree.flatten(state.masks, is_leaf=_is_mask)
        paths = leaf_paths(jax.tree.unflatten(structure, [0] * len(nodes)))
        for path, node in zip(paths, nodes, strict=True):
            if isinstance(node, _Bits):
                (words,) = jax.tree.leaves(node.words)
                words_by_path[path] = (words, state.plan.sparse[path])
    return words_by_path


def unpack_mask(words: UInt8[ArrayLike, "..."], leaf: Leaf) -> Bool[Array, "..."]:
    """Unpacks the boolean mask of one leaf."""
    axis = _bit_axis(leaf)
    return unpack(words, leaf.shape[axis], axis)


def _bit_axis(leaf: Leaf) -> int:
    """The axis along which eight neighbours share a byte: the group axis, if there is one."""
    return (leaf.pattern.axes or (-1,))[0] if leaf.pattern else -1


def _label(leaf: Leaf) -> str:
    axes = "".join(f" {axis}" for axis in (leaf.pattern and leaf.pattern.axes) or ())
    return re.sub(r"[^\w-]+", "_", f"{leaf.pattern}{' along' if axes else ''}{axes}")


def _is_mask(node: Any) -> bool:
    return isinstance(node, _Bits | _Dense)


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _fill_holes(a, b):
    """Fills the `MaskedNode`s of `a`, which replace leaves or trees, with the parts of `b`."""
    if _is_hole(b):
        return a
    if _is_hole(a):
        return b
    children, structure = jax.tree.flatten(a, is_leaf=lambda node: node is not a)
    if jax.tree_util.treedef_is_leaf(structure):
        return a
    others = jax.tree.leaves(b, is_leaf=lambda node: node is not b)
    return jax.tree.unflatten(structure, map(_fill_holes, children, others))
