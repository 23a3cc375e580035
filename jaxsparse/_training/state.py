"""Where the masks live: the state of `rewire`, found wherever an optimizer nests it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._masks.bits import pack, unpack
from jaxsparse._plan.plan import Plan, leaf_paths

__all__ = ["Forward", "RewireState", "forwards", "masks", "merged_masks", "packed", "rewire_states"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("decay", "inner_state"),
    meta_fields=("gradient",),
)
@dataclasses.dataclass(frozen=True)
class Forward:
    """How the next forward pass treats non-participating weights, around the inner state of a
    `RewireState` where it is not this.

    Attributes:
      decay: the decay factor D that they are scaled by, float32 scalar; None for 0.
      gradient: `"dense"` or `"masked"`, as for `effective_weight`, static.
      inner_state: the state of the wrapped transformation.
    """

    decay: jax.Array | None = None
    gradient: str = "dense"
    inner_state: Any = None


class RewireState(NamedTuple):
    """The state of `rewire`.

    Attributes:
      count: updates so far, int32 scalar.
      packed: the masks at one bit a weight, and the scalar True for dense leaves; `masks` makes
        booleans of them.
      plan: the plan, static.
      inner_state: the state of the wrapped transformation; inside a `Forward` if there is a decay
        factor or the gradient is `"masked"`.
    """

    count: jax.Array  # type: ignore[assignment]
    packed: Any
    plan: Plan
    inner_state: Any


def rewire_states(opt_state) -> list[RewireState]:
    """Every `RewireState` in an optimizer state, however deep."""

    def is_one(node):
        return isinstance(node, RewireState)

    # an nnx.Optimizer is a pytree too, but its Variables are not the arrays that masks are
    opt_state = getattr(opt_state, "opt_state", opt_state)
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(node)]


def masks(opt_state):
    """The masks in an optimizer state, however deep the user nests it.

    Args:
      opt_state: the state of an optimizer that holds `rewire`, inside `optax.chain`, `MultiSteps`,
        `inject_hyperparams`, `multi_transform` and the like, or an `nnx.Optimizer`.

    Returns:
      A pytree of the structure of the parameters: boolean arrays where leaves are sparse (True =
      participates), the scalar True where they are dense. Where `multi_transform` gives several
      parts of the tree a `rewire` each, their masks are put together.

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
    found = rewire_states(opt_state)
    if not found:
        raise ValueError(
            f"masks: this {type(opt_state).__name__} holds no masks. Wrap the optimizer in "
            "jaxsparse.rewire or a recipe of jaxsparse.recipes, and pass the state that its init "
            "returned."
        )
    return functools.reduce(_fill_holes, map(_unpacked, found))


def forwards(opt_state) -> dict[str, Forward]:
    """How the next forward pass treats each sparse leaf, by path; bare masks say nothing of it."""

    def held(state):
        if not isinstance(state.inner_state, Forward):
            return Forward()
        decay = jax.tree.leaves(state.inner_state.decay)  # an nnx.Optimizer has it in a Variable
        return Forward(decay[0] if decay else None, state.inner_state.gradient)

    return {
        path: held(state)
        for state in reversed(rewire_states(opt_state))
        for path in state.plan.sparse
    }


def packed(masks, plan: Plan):
    """The masks as a `RewireState` keeps them."""
    return _at_sparse(plan, masks, lambda mask, leaf, axis: pack(mask, axis))


def _unpacked(state: RewireState):
    return _at_sparse(
        state.plan, state.packed, lambda words, leaf, axis: unpack(words, leaf.shape[axis], axis)
    )


def _at_sparse(plan: Plan, tree, f):
    """The tree with `f(leaf, its plan, the axis along which its bits are packed)` in place of the
    sparse leaves.
    """
    leaves, treedef = jax.tree.flatten(tree)
    planned = map(plan.sparse.get, leaf_paths(tree))
    new = [
        f(x, leaf, (leaf.pattern.axes or (-1,))[0]) if leaf and leaf.pattern else x
        for x, leaf in zip(leaves, planned, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def merged_masks(source, call: str):
    """The masks of an optimizer state, or the tree of masks itself."""
    if rewire_states(source):
        return masks(source)
    leaves = jax.tree.leaves(source)
    if not leaves or any(
        not isinstance(leaf, bool) and getattr(leaf, "dtype", None) != jnp.dtype(bool)
        for leaf in leaves
    ):
        raise ValueError(
            f"{call}: this {type(source).__name__} is neither masks nor an optimizer state that "
            "holds them. Wrap the optimizer in jaxsparse.rewire or a recipe of jaxsparse.recipes, "
            "or pass a pytree of boolean masks."
        )
    return jax.tree.map(jnp.asarray, source)


def _fill_holes(a, b):
    """`a` with what `b` has where `a` has an `optax.MaskedNode`, which can stand for a leaf or for
    a whole subtree.
    """
    if isinstance(b, optax.MaskedNode):
        return a
    if isinstance(a, optax.MaskedNode):
        return b
    children, treedef = jax.tree.flatten(a, is_leaf=lambda node: node is not a)
    if jax.tree_util.treedef_is_leaf(treedef):
        return a
    others = jax.tree.leaves(b, is_leaf=lambda node: node is not b)
    return jax.tree.unflatten(treedef, map(_fill_holes, children, others))
