"""Masked weights to the compressed 2:4 format, and back."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxsparse._packed.layouts import convert, preferred_layout
from jaxsparse._plan.patterns import NM, TransposableNM, axes_in
from jaxsparse._plan.plan import Leaf, Plan, leaf_paths, match
from jaxsparse._training.forward import masks_by_path
from jaxsparse._training.state import forwards, merged_masks, rewire_states

__all__ = ["Sparse24", "compress", "decompress", "expand", "gather", "turn"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "metadata"),
    meta_fields=("contracting", "output", "axes", "layout", "transposable"),
)
@dataclasses.dataclass(frozen=True)
class Sparse24:
    """A weight of which 2 of every 4 neighbours along the contraction are kept: values and their
    places.

    An ordinary pytree: `jit`, `grad` (with `allow_int=True`, or with respect to `values`),
    checkpoints, sharding, donation and `lax.scan` over a stack of them work as for any other. Make
    it with `compress`.

    M is the product of the output axes, K that of the contracted ones, in the order in which they
    stand in the dense weight. Leading axes (`...`) are stacks of weights, as `nn.scan` makes them;
    a loop over the stack takes one from the front.

    Attributes:
      values: `[..., M, K/2]`, the kept weights in the order of the contraction.
      metadata: the places of the kept weights, in the arrangement that `layout` names.
      contracting: sizes of the axes that the matmul sums over, static.
      output: sizes of the other axes of one weight, static.
      axes: what each axis of the dense weight is, static: `"K"` contracted, `"O"` output, `"S"`
        stack. A Flax kernel is `"KO"`, a scanned one `"SKO"`, one scanned along axis 1 `"KSO"`, a
        kernel `[heads, inputs, width]` `"OKO"`. Stacks that are missing here stand in front, and
        those that were taken off are the first. Empty means contracted before output axes.
      layout: the arrangement of `metadata`, static. `"canonical"` is uint16 `[..., M, ceil(K/16)]`,
        one nibble for each group of four, the lowest first, `first | second << 2` with the two
        places in ascending order. `"mma16"` is uint32 `[..., 2*ceil(M/128), 2*ceil(K/128), 128]`,
        the same words as the lanes of a sparse tensor core read them with 16-bit operands.
      transposable: whether 2 of every 4 neighbours along the innermost output axis are kept, too,
        static: then kernels can compute the gradient of the other operand of a product. Nothing
        more is stored for it.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3.
    """

    values: jax.Array
    metadata: jax.Array
    contracting: tuple[int, ...]
    output: tuple[int, ...]
    axes: str = ""
    layout: str = "canonical"
    transposable: bool = False

    @property
    def kinds(self) -> str:
        """What each axis of the dense weight is, as `axes` says, with exactly the stacks that are
        there.
        """
        kinds = self.axes or "K" * len(self.contracting) + "O" * len(self.output)
        surplus = kinds.count("S") - len(self.values.shape[:-2])
        return kinds.replace("S", "", surplus) if surplus > 0 else "S" * -surplus + kinds

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        sizes = {
            "S": iter(self.values.shape[:-2]),
            "O": iter(self.output),
            "K": iter(self.contracting),
        }
        return tuple(next(sizes[kind]) for kind in self.kinds)

    @property
    def ndim(self) -> int:
        """The number of axes of the dense weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the dense weight."""
        return math.prod(self.shape)

    @property
    def dtype(self):
        """The dtype of the weight."""
        return self.values.dtype

    @property
    def axis(self) -> int:
        """The axis of the dense weight along which groups run, counted from the end."""
        return self.kinds.rindex("K") - len(self.kinds)

    @property
    def nbytes(self) -> int:
        """The bytes of values and metadata together."""
        return self.values.nbytes + self.metadata.nbytes

    def with_layout(self, layout: str) -> "Sparse24":
        """The same weight with its metadata arranged in another way; exact in both directions.

        Args:
          layout: `"canonical"`, for files that any reader understands and for the dense fallback;
            or `"mma16"`, for the kernels, with weights of 16 bits.

        Returns:
          A `Sparse24` of the same values.

        Raises:
          ValueError: there is no such layout, or the weight does not have 16 bits.

        Example:
          >>> import jax.numpy as jnp
          >>> values, metadata = jnp.ones((1, 2), jnp.bfloat16), jnp.array([[0x4449]], jnp.uint16)
          >>> w = Sparse24(values, metadata, contracting=(4,), output=(1,))
          >>> tiled = w.with_layout("mma16")
          >>> tiled.metadata.shape, tiled.with_layout("canonical").metadata
          ((2, 2, 128), Array([[17481]], dtype=uint16))
        """
        metadata = convert(self.metadata, self.layout, layout, self.values)
        return (
            self
            if layout == self.layout
            else dataclasses.replace(self, metadata=metadata, layout=layout)
        )


def compress(params, opt_state, plan: Plan | None = None, *, layout: str | None = None):
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
    masks = masks_by_path(merged_masks(opt_state, "compress"), params, "compress")
    _check_binary(opt_state)
    plans = [state.plan for state in rewire_states(opt_state)] if plan is None else [plan]
    planned = {path: leaf for one in plans for path, leaf in one.sparse.items()}
    leaves, treedef = jax.tree.flatten(params)
    paths = leaf_paths(params)
    for path, mask in zip(paths, masks, strict=True):
        if mask is None and path in planned:
            raise ValueError(
                f"compress: the plan makes {path} sparse, but there is no mask of it. Pass its "
                "mask, or plan it dense."
            )
    places = [
        ("", False) if mask is None else _place(path, mask, planned.get(path))
        for path, mask in zip(paths, masks, strict=True)
    ]
    packed = (
        w if mask is None else _pack(w, mask, *place, layout or preferred_layout(w.dtype))
        for w, mask, place in zip(leaves, masks, places, strict=True)
    )
    return jax.tree.unflatten(treedef, packed)


def _check_binary(opt_state):
    """Refuses a model that does not run under its masks alone, which is another than the compressed
    one.
    """
    for path, forward in forwards(opt_state).items():
        if isinstance(forward.decay, jax.core.Tracer):
            raise ValueError(
                f"compress: the decay factor of {path} is traced, so nobody can tell whether it is "
                "0. Compress outside of jit, or pass jaxsparse.masks(opt_state) and the plan once "
                "it is."
            )
        if forward.decay is not None and jnp.any(forward.decay != 0):
            raise ValueError(
                f"compress: the decay factor of {path} is {jnp.max(forward.decay):.3g}, not 0: the "
                "weights that would be dropped are still in use. Train past fine_tune_from of the "
                "recipe."
            )


def _place(path: str, mask, leaf: Leaf | None) -> tuple[str, bool]:
    """What each axis of a weight is, as `Sparse24.axes` says, and whether the weight is
    transposable.

    The mask is then known to be 2:4 along the innermost contracted axis, or along the innermost
    output axis, too.
    """
    if leaf is not None and leaf.pattern is not None:
        if not isinstance(leaf.pattern, NM | TransposableNM) or (
            leaf.pattern.n,
            leaf.pattern.m,
        ) != (2, 4):
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
    values, metadata = _kept(w, mask)
    return Sparse24(
        values, metadata, contracted, output, kinds, transposable=transposable
    ).with_layout(layout)


def _kept(w, mask):
    """A weight `[..., M, K]` and its mask to values and canonical metadata."""
    w0, w1, w2, w3 = (w[..., i::4] for i in range(4))
    m0, m1, m2, m3 = (mask[..., i::4] for i in range(4))
    first = jnp.where(m0, w0, jnp.where(m1, w1, w2))
    second = jnp.where(m3, w3, jnp.where(m2, w2, w1))
    places = jnp.where(m0, 0, jnp.where(m1, 1, 2)) | jnp.where(m3, 3, jnp.where(m2, 2, 1)) << 2
    values = jnp.stack([first, second], -1).reshape(*w.shape[:-1], w.shape[-1] // 2)
    return values, _to_words(places.astype(jnp.uint16))


def _to_words(nibbles):
    """uint16 `[..., G]` below 16 to uint16 `[..., ceil(G/4)]`, the lowest first; the last word is
    filled up with places 0 and 1.
    """
    spare = -nibbles.shape[-1] % 4
    nibbles = jnp.pad(nibbles, [(0, 0)] * (nibbles.ndim - 1) + [(0, spare)], constant_values=4)
    nibbles = nibbles.reshape(*nibbles.shape[:-1], -1, 4)
    return (nibbles << _along_last(range(0, 16, 4), nibbles)).sum(-1, dtype=jnp.uint16)


def _along_last(numbers, like):
    """Numbers along the last axis, with as many axes and the dtype of `like`."""
    return jnp.array(numbers, like.dtype).reshape([1] * (like.ndim - 1) + [-1])


def _places(metadata, groups):
    """Canonical metadata to the places of the first and the second kept weight of each group, uint8
    `[..., M, groups]`.
    """
    words = metadata[..., None]
    nibbles = (words >> _along_last(range(0, 16, 4), words)).astype(jnp.uint8)
    nibbles = nibbles.reshape(*metadata.shape[:-1], -1)[..., :groups]
    return nibbles & 3, nibbles >> 2 & 3


def expand(values, metadata):
    """Compressed values `[..., M, K/2]` and metadata to the masked weight `[..., M, K]`."""
    pairs = values.reshape(*values.shape[:-1], -1, 2)
    first, second = (kept[..., None] for kept in _places(metadata, pairs.shape[-2]))
    place = _along_last(range(4), first)
    zero = jnp.zeros((), values.dtype)
    dense = jnp.where(
        place == first, pairs[..., :1], jnp.where(place == second, pairs[..., 1:], zero)
    )
    return dense.reshape(*values.shape[:-1], -1)


def gather(dense, metadata):
    """What `[..., M, K]` holds at the kept places, `[..., M, K/2]`: the transpose of `expand`."""
    groups = dense.reshape(*dense.shape[:-1], -1, 4)
    places = [kept[..., None] for kept in _places(metadata, groups.shape[-2])]
    picked = [
        jnp.where(_along_last(range(4), kept) == kept, groups, jnp.zeros((), dense.dtype)).sum(-1)
        for kept in places
    ]
    return jnp.stack(picked, -1).reshape(*dense.shape[:-1], -1)


def turn(values, metadata):
    """Values `[..., M, K/2]` and metadata of a transposable weight to those of its transpose,
    `[..., K, M/2]`.
    """
    mask = expand(jnp.ones_like(values, bool), metadata)
    return _kept(expand(values, metadata).swapaxes(-1, -2), mask.swapaxes(-1, -2))


def decompress(packed):
    """Gives back the masked weight of every `Sparse24` in a pytree, exactly; other leaves stay as
    they are.

    Args:
      packed: a `Sparse24`, or a pytree with some.

    Returns:
      The pytree with arrays in their place, of the shape and dtype that they were compressed from.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> values, metadata = jnp.array([[-4.0, 3.0]]), jnp.array([[0x4449]], jnp.uint16)
      >>> w = js.Sparse24(values, metadata, contracting=(4,), output=())
      >>> js.decompress(w)
      Array([ 0., -4.,  3.,  0.], dtype=float32)
    """

    def dense(leaf):
        if not isinstance(leaf, Sparse24):
            return leaf
        w = expand(leaf.values, leaf.with_layout("canonical").metadata)
        kinds = leaf.kinds
        order = [i for kind in "SOK" for i, one in enumerate(kinds) if one == kind]
        w = w.reshape(*(leaf.shape[i] for i in order))
        return w.transpose(sorted(range(len(order)), key=order.__getitem__))

    return jax.tree.map(dense, packed, is_leaf=lambda leaf: isinstance(leaf, Sparse24))
