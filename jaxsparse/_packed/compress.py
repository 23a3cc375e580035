"""Masked weights to compressed ones."""

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
    """Turns every sparse leaf into a `Sparse24`; the dense leaves stay as they are.

    A 16-bit weight takes 36 of 64 bits a group (44 % saved), an 8-bit one 20 of 32 (38 %). Works
    under `jit`, where the masks' values cannot be checked. A weight runs on every device whatever
    its layout; the layout says where no time is lost.

    Args:
      params: pytree of weights.
      opt_state: an optimizer state that holds masks and their plan, or a pytree of masks.
      plan: the plan of bare masks. Without it a mask must be 2:4 along one axis only, which is then
        the axis.
      layout: how the metadata are arranged, as for `Sparse24`. None means `"mma16"` for weights of
        16 bits where the default backend is a GPU, and `"canonical"` elsewhere.

    Returns:
      The pytree with `Sparse24` in the place of the sparse leaves, transposable ones where the plan
      says `TransposableNM(2, 4)`. `decompress` gives back the masked weights.

    Raises:
      TypeError: `plan` is no plan.
      ValueError: there are no masks, they or the plan are of other parameters, a leaf is planned
        under another pattern than 2:4, its mask does not keep exactly 2 of every 4 along its axes,
        its decay factor is not 0 or traced, or `layout` does not fit its dtype.

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
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3.
    """
    if plan is not None:
        match(plan, params, "compress")
    masked = read_state(opt_state, "compress")
    masks = match_masks(masked.masks, params, "compress")
    _check_binary(masked)
    planned = masked.planned if plan is None else plan.sparse
    leaves, structure = jax.tree.flatten(params)
    packing = []  # all is checked before anything is packed
    for path, mask in zip(leaf_paths(params), masks, strict=True):
        if mask is None and path in planned:
            raise ValueError(
                f"compress: the plan makes {path} sparse, but there is no mask of it. Pass its "
                "mask, or plan it dense."
            )
        packing.append(mask if mask is None else (mask, *_place(path, mask, planned.get(path))))
    packed = [
        w if one is None else _pack(w, *one, layout or preferred_layout(w.dtype))
        for w, one in zip(leaves, packing, strict=True)
    ]
    return jax.tree.unflatten(structure, packed)


def _check_binary(masked: Masked) -> None:
    """Refuses a model that does not run under its masks alone, which is another than the compressed
    one.
    """
    for path, forward in masked.forwards.items():
        factor = forward.decay_factor
        if isinstance(factor, jax.core.Tracer):
            raise ValueError(
                f"compress: the decay factor of {path} is traced, so nobody can tell whether it is "
                "0. Compress outside of jit, or pass jaxsparse.masks(opt_state) and the plan once "
                "it is."
            )
        if factor is not None and jnp.any(factor != 0):
            raise ValueError(
                f"compress: the decay factor of {path} is {jnp.max(factor):.3g}, not 0: the "
                "weights that would be dropped are still in use. Train past fine_tune_from of the "
                "recipe."
            )


def _place(path: str, mask: Any, leaf: Leaf | None) -> tuple[str, bool]:
    """What each axis of a weight is, as `Sparse24.axes` says, and whether the weight is
    transposable.

    The mask is then known to be 2:4 along the innermost contracted axis, or along the innermost
    output axis, too.
    """
    if leaf is not None and leaf.pattern is not None:
        groups = leaf.pattern.groups
        if not groups or set(groups) != {(2, 4)}:
            raise ValueError(
                f"compress: {path} is planned {leaf.pattern}, but the compressed format is 2:4. "
                "Train it under 2:4."
            )
        axis, *other = (axis - mask.ndim for axis in axes_in(leaf.pattern, mask.ndim))
        for one in (axis, *other):
            if not isinstance(mask, jax.core.Tracer) and not _is_24(mask, one):
                raise ValueError(
                    f"compress: the mask of {path} does not keep exactly 2 of every 4 along axis "
                    f"{one} of shape {mask.shape}. Pass the masks that it was trained with, once "
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
            f"compress: the axis of {path} cannot be told from a traced mask. Pass the optimizer "
            "state or the plan."
        )
    axes = [
        axis for axis in range(-mask.ndim, 0) if mask.shape[axis] % 4 == 0 and _is_24(mask, axis)
    ]
    if len(axes) == 1:
        return _usual_axes(mask.ndim, axes[0]), False
    found = (
        f"is 2:4 along each of the axes {axes}"
        if axes
        else "does not keep exactly 2 of every 4 along any axis"
    )
    raise ValueError(
        f"compress: the mask of {path}, of shape {mask.shape}, {found}. Pass the optimizer state "
        "or the plan, which know the axis."
    )


def _usual_axes(ndim: int, axis: int) -> str:
    """What the axes of a weight are where only the one along which groups run is known, counted
    from the end.

    Those after it are outputs, those before it stacks; before the last axis stands the output.
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
