"""Compression of masked weights."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._packed.layouts import Layout, preferred_layout
from jaxsparse._packed.sparse24 import Sparse24, to_kept
from jaxsparse._plan.paths import leaf_paths
from jaxsparse._plan.pattern import axes_in
from jaxsparse._plan.plan import Leaf, Plan, match
from jaxsparse._training.forward import match_masks
from jaxsparse._training.state import Masked, read_state

__all__ = ["compress"]


def compress(
    params: PyTree, opt_state: PyTree, plan: Plan | None = None, *, layout: Layout | None = None
) -> Any:
    """Turns every sparse leaf into a `Sparse24`; dense leaves are unchanged.

    A 16-bit weight takes 36 bits a group instead of 64 (44 % less), an 8-bit weight 20 instead of
    32 (38 % less). It works under `jit`, where the values of masks cannot be checked. A weight runs
    on every device whatever its layout; the layout only affects the speed.

    Args:
      params: pytree of weights.
      opt_state: an optimizer state that holds masks and their plan, or a pytree of masks.
      plan: the plan for bare masks. Without it a mask must be 2:4 along exactly one axis, which
        becomes the axis of its groups.
      layout: the layout of the metadata, as for `Sparse24`. None means `"mma16"` for weights of 16
        bits if the default backend is a GPU, and `"canonical"` otherwise.

    Returns:
      The pytree with a `Sparse24` for each sparse leaf, transposable if the plan has
      `TransposableNM(2, 4)`. `decompress` returns the masked weights.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: there are no masks; they or the plan do not match the parameters; a leaf is
        planned with a pattern other than 2:4; its mask does not keep exactly 2 of every 4 along its
        axes; its decay factor is not 0, or is traced; or `layout` does not fit its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([[1.0], [-4.0], [3.0], [2.0]]), "b": jnp.zeros(1)}
      >>> masks = {"w": jnp.array([[False], [True], [True], [False]]), "b": jnp.asarray(True)}
      >>> packed = js.compress(params, masks)
      >>> packed["w"].values, packed["w"].metadata  # 0x4449: places 1 and 2, then filler
      (Array([[-4.,  3.]], dtype=float32), Array([[17481]], dtype=uint16))
      >>> js.decompress(packed)["w"][:, 0]
      Array([ 0., -4.,  3.,  0.], dtype=float32)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """
    if plan is not None:
        match(plan, params, "compress")
    masked = read_state(opt_state, "compress")
    masks = match_masks(masked.masks, params, "compress")
    _check_binary(masked)
    planned = masked.planned if plan is None else plan.sparse
    leaves, structure = jax.tree.flatten(params)
    packing = []  # all leaves are checked before any is packed
    for path, mask in zip(leaf_paths(params), masks, strict=True):
        if mask is None and path in planned:
            raise ValueError(
                f"compress: the plan makes {path} sparse, but there is no mask for it. Pass its "
                "mask, or plan it dense."
            )
        packing.append(mask if mask is None else (mask, *_place(path, mask, planned.get(path))))
    packed = [
        w if one is None else _pack(w, *one, layout or preferred_layout(w.dtype))
        for w, one in zip(leaves, packing, strict=True)
    ]
    return jax.tree.unflatten(structure, packed)


def _check_binary(masked: Masked) -> None:
    """Refuses a model whose forward pass still uses non-participating weights."""
    for path, forward in masked.forwards.items():
        factor = forward.decay_factor
        if isinstance(factor, jax.core.Tracer):
            raise ValueError(
                f"compress: the decay factor of {path} is traced, so it cannot be checked to be 0. "
                "Compress outside of jit, or, once it is 0, pass jaxsparse.masks(opt_state) and "
                "the plan."
            )
        if factor is not None and jnp.any(factor != 0):
            raise ValueError(
                f"compress: the decay factor of {path} is {jnp.max(factor):.3g}, not 0: the "
                "weights that would be dropped are still in use. Train past fine_tune_from of the "
                "recipe."
            )


def _place(path: str, mask: Any, leaf: Leaf | None) -> tuple[str, bool]:
    """The kind of each axis of a weight, as in `Sparse24.axes`, and whether it is transposable.

    This also checks that the mask is 2:4 along the innermost contracted axis and, for a
    transposable weight, along the innermost output axis.
    """
    if leaf is not None and leaf.pattern is not None:
        groups = leaf.pattern.groups
        if not groups or set(groups) != {(2, 4)}:
            raise ValueError(
                f"compress: {path} is planned as {leaf.pattern}, but the compressed format is 2:4. "
                "Train it as 2:4."
            )
        axis, *other = (axis - mask.ndim for axis in axes_in(leaf.pattern, mask.ndim))
        for one in (axis, *other):
            if not isinstance(mask, jax.core.Tracer) and not _is_24(mask, one):
                raise ValueError(
                    f"compress: the mask of {path} does not keep exactly 2 of every 4 along axis "
                    f"{one} of shape {mask.shape}. Pass the masks that it was trained with, after "
                    "its recipe has reached 2:4."
                )
        if not leaf.summed:
            kinds = _usual_axes(mask.ndim, axis)
        else:
            kinds = "".join(
                "K" if i in leaf.summed else "S" if i in leaf.stack else "O"
                for i in range(-mask.ndim, 0)
            )
        return kinds, bool(other) and other == [kinds.rfind("O") - mask.ndim]
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(
            f"compress: the axis of {path} cannot be inferred from a traced mask. Pass the "
            "optimizer state or the plan."
        )
    axes = [
        axis for axis in range(-mask.ndim, 0) if mask.shape[axis] % 4 == 0 and _is_24(mask, axis)
    ]
    if len(axes) == 1:
        return _usual_axes(mask.ndim, axes[0]), False
    problem = (
        f"is 2:4 along each of the axes {axes}"
        if axes
        else "does not keep exactly 2 of every 4 along any axis"
    )
    raise ValueError(
        f"compress: the mask of {path}, of shape {mask.shape}, {problem}. Pass the optimizer state "
        "or the plan, which contain the axis."
    )


def _usual_axes(ndim: int, axis: int) -> str:
    """The kinds of the axes of a weight when only the group axis is known, counted from the end.

    The axes after it are outputs, those before it stacks. If it is the last axis, the one before it
    is the output.
    """
    if axis == -1:
        return "S" * (ndim - 2) + "OK"[-ndim:]
    return "S" * (ndim + axis) + "K" + "O" * (-axis - 1)


@functools.partial(jax.jit, static_argnums=1)
def _is_24(mask, axis):
    axis %= mask.ndim
    groups = mask.reshape(*mask.shape[:axis], -1, 4, *mask.shape[axis + 1 :])
    return (groups.sum(axis + 1) == 2).all()


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _pack(w, mask, kinds, transposable, layout):
    order = [i for kind in "SOK" for i, one in enumerate(kinds) if one == kind]
    stack, output, contracted = (
        tuple(w.shape[i] for i, one in enumerate(kinds) if one == kind) for kind in "SOK"
    )
    w, mask = (
        a.transpose(order).reshape(*stack, math.prod(output), math.prod(contracted))
        for a in (w, mask)
    )
    values, metadata = to_kept(w, mask)
    return Sparse24(
        values, metadata, contracted, output, kinds, transposable=transposable
    ).with_layout(layout)
