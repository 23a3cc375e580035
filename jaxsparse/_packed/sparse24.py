"""The compressed 2:4 weight."""

import dataclasses
import math
import weakref
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Shaped, UInt16

from jaxsparse._checks import AnArray, choice
from jaxsparse._packed.layouts import Layout, convert, metadata_form
from jaxsparse._registration import register_exported, register_saved

__all__ = [
    "ARRAYS",
    "Activations",
    "Sparse24",
    "decompress",
    "expand",
    "kept_values",
    "to_kept",
    "transposed",
]

Activations = Literal["float", "token", "tensor"]

_DATA = ("values", "metadata", "scale", "input_scale")
# by `activations`, the arrays of a weight
ARRAYS = {None: _DATA[:2], "float": _DATA[:3], "token": _DATA[:3], "tensor": _DATA}
_STATIC = ("contracting", "output", "axes", "layout", "transposable", "activations")
_checked: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Sparse24:
    """A compressed weight: 2 of every 4 neighbours along the contraction, and their places.

    It is an ordinary pytree: `jit`, `grad` (with `allow_int=True`, or with respect to `values`),
    checkpoints, sharding, donation and `lax.scan` over a stack work as usual. Make it with
    `compress`.

    M is the product of the output axes and K that of the contracted axes, in the order of the dense
    weight. Leading axes (`...`) are stacks of weights, as `nn.scan` makes them; a loop over the
    stack removes the first.

    Attributes:
      values: `[..., M, K/2]`, the kept weights in the order of the contraction.
      metadata: the places of the kept weights, in the arrangement given by `layout`.
      contracting: the sizes of the axes that the matmul sums over, static.
      output: the sizes of the other axes of one weight, static.
      axes: the kind of each axis of the dense weight, static: `"K"` contracted, `"O"` output, `"S"`
        stack. A Flax kernel is `"KO"`, a scanned one `"SKO"`, one scanned along axis 1 `"KSO"`, a
        kernel `[heads, inputs, width]` `"OKO"`. If `axes` names fewer stacks than there are, the
        others come first; if it names more, the first ones were removed. Empty means contracted
        axes before output axes.
      layout: the arrangement of `metadata`, static. `"canonical"` is uint16 `[..., M, ceil(K/16)]`,
        one nibble for each group of four, the lowest first: `first | second << 2`, with the two
        places in ascending order. `"mma16"` is uint32 `[..., 2*ceil(M/128), 2*ceil(K/128), 128]`,
        the same words as the lanes of a sparse tensor core read them with 16-bit operands.
      transposable: whether 2 of every 4 neighbours are also kept along the innermost output axis,
        static. Kernels can then compute the gradient of the other operand of a product. This needs
        no further storage.
      scale: `[..., M]`, floats of at least 16 bits, if the values are int8 as `quantize` makes
        them; the weight is then `scale * values`, of the dtype of the scale. None otherwise.
      input_scale: `[...]`, the scale of the other operand of a product, if `activations` is
        `"tensor"`; None otherwise.
      activations: how the other operand of a product with int8 values is rounded, static; see
        `quantize`. None for values without a scale.

    Raises:
      TypeError: an array is not one, or not of a dtype of the format.
      ValueError: shapes, sizes, layout, places or scales are inconsistent; see `check`.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """

    values: Any
    metadata: Any
    contracting: tuple[int, ...]
    output: tuple[int, ...]
    axes: str = ""
    layout: Layout = "canonical"
    transposable: bool = False
    scale: Any = None
    input_scale: Any = None
    activations: Activations | None = None

    def __post_init__(self):
        self.check("Sparse24")

    def tree_flatten_with_keys(self):
        data, static = self.tree_flatten()
        keys = map(jax.tree_util.GetAttrKey, ARRAYS[self.activations])
        return tuple(zip(keys, data, strict=True)), static

    def tree_flatten(self):
        data = tuple(getattr(self, name) for name in ARRAYS[self.activations])
        return data, tuple(getattr(self, name) for name in _STATIC)

    @classmethod
    def tree_unflatten(cls, static, data):
        # not checked, since JAX also builds trees of specs, gradients and placeholders
        new = object.__new__(cls)
        data = (*data, *[None] * (len(_DATA) - len(data)))
        for name, value in zip((*_DATA, *_STATIC), (*data, *static), strict=True):
            object.__setattr__(new, name, value)
        return new

    def check(self, call: str = "Sparse24.check") -> "Sparse24":
        """Checks that arrays and sizes are consistent, and that places and scales are valid.

        Creating a `Sparse24` checks it. Call this for one that was restored by other means than
        `flax.serialization`. Under `jit` only dtypes, shapes and the layout are checked.

        Args:
          call: the name at the start of errors.

        Returns:
          The weight itself.

        Raises:
          TypeError: an array is not one, or not of a dtype of the format.
          ValueError: shapes are inconsistent, the layout does not exist, the two places of a group
            are not in ascending order, or a scale is negative or not finite.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxsparse as js
          >>> values, metadata = jnp.array([[-4.0, 3.0]]), jnp.array([[0x4441]], jnp.uint16)
          >>> js.Sparse24(values, metadata, contracting=(4,), output=(1,))
          Traceback (most recent call last):
            ...
          ValueError: Sparse24: the places in group 0 of row (0,) are 1 and 0, ...
        """
        check_static(self, call)
        check_places(self, call)
        check_scales(self, call)
        return self

    @property
    def kinds(self) -> str:
        """The kind of each axis of the dense weight, as in `axes`, with the existing stacks."""
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
        """The dtype of the weight: that of its values, or of its scale if it has one."""
        return self.values.dtype if self.scale is None else self.scale.dtype

    @property
    def axis(self) -> int:
        """The axis of the dense weight along which groups run, counted from the end."""
        return self.kinds.rindex("K") - len(self.kinds)

    @property
    def nbytes(self) -> int:
        """The bytes of values, metadata and scales together."""
        return sum(array.nbytes for array in self.tree_flatten()[0])

    def with_layout(self, layout: Layout) -> "Sparse24":
        """Converts the metadata to another layout; exact in both directions.

        Args:
          layout: `"canonical"`, for files that any reader understands and for the dense fallback;
            or `"mma16"`, for the kernels, with weights of 16 bits.

        Returns:
          A `Sparse24` with the same values.

        Raises:
          ValueError: the layout does not exist, or the weight does not have 16 bits.

        Example:
          >>> import jax.numpy as jnp
          >>> values, metadata = jnp.ones((1, 2), jnp.bfloat16), jnp.array([[0x4449]], jnp.uint16)
          >>> w = Sparse24(values, metadata, contracting=(4,), output=(1,))
          >>> tiled = w.with_layout("mma16")
          >>> tiled.metadata.shape, tiled.with_layout("canonical").metadata
          ((2, 2, 128), Array([[17481]], dtype=uint16))
        """
        check_static(self, "Sparse24.with_layout")
        metadata = convert(self.metadata, self.layout, layout, self.values)
        if layout == self.layout:
            return self
        return _unchecked(self, metadata=metadata, layout=layout)


def _unchecked(w: Sparse24, **changes: Any) -> Sparse24:
    """The weight with some fields changed, without checks; only for valid changes."""
    fields = {name: changes.get(name, getattr(w, name)) for name in (*_DATA, *_STATIC)}
    return Sparse24.tree_unflatten(
        [fields[name] for name in _STATIC], [fields[name] for name in _DATA]
    )


def check_static(w: Sparse24, call: str) -> None:
    """Checks dtypes, shapes and the layout, which are also known under `jit`."""
    choice(call, "activations", w.activations, (None, *get_args(Activations)))
    for name in ARRAYS[w.activations]:
        array = getattr(w, name)
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{call}: `{name}` is a {type(array).__name__}, not an array.")
    values, metadata = w.values, w.metadata
    if not (
        jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)
    ):
        raise TypeError(
            f"{call}: `values` are {values.dtype}. Pass weights of a floating or integer dtype."
        )
    m, k = math.prod(w.output), math.prod(w.contracting)
    if values.shape[-2:] != (m, k // 2) or k % 4:
        raise ValueError(
            f"{call}: `values` of shape {values.shape} do not fit output={w.output} and "
            f"contracting={w.contracting}. They must have shape [..., {m}, {k // 2}], and the "
            "contraction must be a multiple of 4."
        )
    form = metadata_form(w.layout, values, call)
    if metadata.dtype != form.dtype:
        raise TypeError(
            f"{call}: `metadata` are {metadata.dtype}, but the layout {w.layout!r} is {form.dtype}."
        )
    if metadata.shape != form.shape:
        raise ValueError(
            f"{call}: `metadata` have shape {metadata.shape}, but the layout {w.layout!r} of "
            f"values of shape {values.shape} has {form.shape}."
        )
    _check_static_scales(w, call)


def _check_static_scales(w: Sparse24, call: str) -> None:
    for name in _DATA:
        if name not in ARRAYS[w.activations] and getattr(w, name) is not None:
            raise ValueError(
                f"{call}: there is a `{name}`, and activations={w.activations!r}. Make weights of "
                "int8 by jaxsparse.quantize."
            )
    if w.scale is not None and w.values.dtype != jnp.int8:
        raise TypeError(
            f"{call}: there is a `scale`, but `values` are {w.values.dtype}, not int8. Make "
            "weights of int8 by jaxsparse.quantize."
        )
    for name, rank in (("scale", 1), ("input_scale", 2)):
        array, shape = getattr(w, name), w.values.shape[: w.values.ndim - rank]
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
            raise TypeError(f"{call}: `{name}` is {array.dtype}. Pass floats of at least 16 bits.")
        if array.shape != shape:
            raise ValueError(
                f"{call}: `{name}` has shape {array.shape}, but values of shape {w.values.shape} "
                f"have {shape}."
            )


def check_places(w: Sparse24, call: str) -> None:
    """Checks that places ascend in each group, once for each array and outside of `jit`."""
    metadata = w.metadata
    if not _to_be_checked(metadata):
        return
    with jax.ensure_compile_time_eval():  # known metadata may get traced values
        canonical = convert(metadata, w.layout, "canonical", w.values)
        first, second = map(np.asarray, places(canonical, w.values.shape[-1] // 2))
    wrong = np.argwhere(first >= second)
    if len(wrong):
        *row, group = wrong[0].tolist()
        at = (*row, group)
        raise ValueError(
            f"{call}: the places in group {group} of row {tuple(row)} are {int(first[at])} and "
            f"{int(second[at])}, but they must be in ascending order. The metadata are damaged, "
            "or not in this layout."
        )
    _remember(metadata)


def check_scales(w: Sparse24, call: str) -> None:
    """Checks that scales are finite and not negative, once for each and outside of `jit`."""
    for name in ("scale", "input_scale"):
        array = getattr(w, name)
        if not _to_be_checked(array):
            continue
        numbers = np.asarray(array, np.float64)
        wrong = np.argwhere(~(np.isfinite(numbers) & (numbers >= 0)))
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise ValueError(
                f"{call}: `{name}` is {numbers[at]} at {at}, but scales are finite and not "
                "negative. The weight is damaged."
            )
        _remember(array)


def _to_be_checked(array: Any) -> bool:
    """Whether the contents of an array are known and were not checked before."""
    known = isinstance(array, (jax.Array, np.ndarray)) and not isinstance(array, jax.core.Tracer)
    return (
        known
        and getattr(array, "is_fully_addressable", True)
        and _checked.get(id(array)) is not array
    )


def _remember(array: Any) -> None:
    if isinstance(array, jax.Array):
        _checked[id(array)] = array


def to_kept(
    w: Shaped[AnArray, "*stack M K"], mask: Bool[AnArray, "*stack M K"]
) -> tuple[Shaped[Array, "*stack M K//2"], UInt16[Array, "*stack M C"]]:
    """Compresses a weight `[..., M, K]` and its mask to values and canonical metadata."""
    w0, w1, w2, w3 = (w[..., i::4] for i in range(4))
    m0, m1, m2, m3 = (mask[..., i::4] for i in range(4))
    first = jnp.where(m0, w0, jnp.where(m1, w1, w2))
    second = jnp.where(m3, w3, jnp.where(m2, w2, w1))
    places = jnp.where(m0, 0, jnp.where(m1, 1, 2)) | jnp.where(m3, 3, jnp.where(m2, 2, 1)) << 2
    values = jnp.stack([first, second], -1).reshape(*w.shape[:-1], w.shape[-1] // 2)
    return values, _to_words(places.astype(jnp.uint16))


def _to_words(nibbles):
    """Packs nibbles, uint16 `[..., G]` below 16, into uint16 `[..., ceil(G/4)]`, the lowest first.

    The last word is filled with places 0 and 1.
    """
    spare = -nibbles.shape[-1] % 4
    nibbles = jnp.pad(nibbles, [(0, 0)] * (nibbles.ndim - 1) + [(0, spare)], constant_values=4)
    nibbles = nibbles.reshape(*nibbles.shape[:-1], -1, 4)
    return (nibbles << 4 * _four(nibbles)).sum(-1, dtype=jnp.uint16)


def _four(like):
    """0, 1, 2, 3 along the last axis, with the rank and dtype of `like`."""
    return lax.broadcasted_iota(like.dtype, (*[1] * (like.ndim - 1), 4), like.ndim - 1)


def places(metadata, groups):
    """The places of the first and the second kept weight of each group.

    Both are uint8 `[..., M, groups]`, from canonical metadata.
    """
    words = metadata[..., None]
    nibbles = (words >> 4 * _four(words)).astype(jnp.uint8)
    nibbles = nibbles.reshape(*metadata.shape[:-1], -1)[..., :groups]
    return nibbles & 3, nibbles >> 2 & 3


def expand(
    values: Shaped[AnArray, "*stack M H"], metadata: UInt16[AnArray, "*stack M C"]
) -> Shaped[Array, "*stack M 2*H"]:
    """Expands compressed values `[..., M, K/2]` and metadata to the masked weight `[..., M, K]`."""
    pairs = values.reshape(*values.shape[:-1], -1, 2)
    first, second = (kept[..., None] for kept in places(metadata, pairs.shape[-2]))
    place = _four(first)
    zero = jnp.zeros((), values.dtype)
    dense = jnp.where(
        place == first, pairs[..., :1], jnp.where(place == second, pairs[..., 1:], zero)
    )
    return dense.reshape(*values.shape[:-1], -1)


def kept_values(
    dense: Shaped[AnArray, "*stack M K"], metadata: UInt16[AnArray, "*stack M C"]
) -> Shaped[Array, "*stack M K//2"]:
    """The values of `[..., M, K]` at the kept places, `[..., M, K/2]`; transposes `expand`."""
    groups = dense.reshape(*dense.shape[:-1], -1, 4)
    both = [kept[..., None] for kept in places(metadata, groups.shape[-2])]
    picked = [
        jnp.where(_four(kept) == kept, groups, jnp.zeros((), dense.dtype)).sum(-1) for kept in both
    ]
    return jnp.stack(picked, -1).reshape(*dense.shape[:-1], -1)


def transposed(
    values: Shaped[AnArray, "*stack M H"], metadata: UInt16[AnArray, "*stack M C"]
) -> tuple[Shaped[Array, "*stack 2*H M//2"], UInt16[Array, "*stack 2*H D"]]:
    """Transposes a transposable weight: values and metadata of the transpose, `[..., K, M/2]`."""
    mask = expand(jnp.ones_like(values, bool), metadata)
    return to_kept(expand(values, metadata).swapaxes(-1, -2), mask.swapaxes(-1, -2))


def decompress(packed):
    """Replaces every `Sparse24` in a pytree by its masked weight, exactly; others are unchanged.

    A weight of int8 becomes `scale * values`, rounded to the dtype of its scale.

    Args:
      packed: a `Sparse24`, or a pytree that contains some.

    Returns:
      The pytree with arrays in their place, of the original shapes and dtypes.

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
        check_static(leaf, "decompress")
        w = expand(leaf.values, leaf.with_layout("canonical").metadata)
        if leaf.scale is not None:
            w = w.astype(leaf.dtype) * leaf.scale[..., None]
        kinds = leaf.kinds
        order = [i for kind in "SOK" for i, one in enumerate(kinds) if one == kind]
        w = w.reshape(*(leaf.shape[i] for i in order))
        return w.transpose(sorted(range(len(order)), key=order.__getitem__))

    return jax.tree.map(dense, packed, is_leaf=lambda leaf: isinstance(leaf, Sparse24))


def _to_dict(w: Sparse24) -> dict:
    saved = w.with_layout("canonical")
    return {name: getattr(saved, name) for name in ARRAYS[w.activations]}


def _from_dict(w: Sparse24, state: dict) -> Sparse24:
    if (state.get("scale") is None) != (w.scale is None):
        raise ValueError(
            "Sparse24: of the saved weight and the weight to restore, only one has a scale. Apply "
            "jaxsparse.quantize to both or to neither."
        )
    loaded = dataclasses.replace(w, **state, layout="canonical")
    return loaded.with_layout(w.layout)


def _tupled(static: list) -> tuple:
    contracting, output, axes, layout, transposable, *activations = static
    # absent from what was exported before it existed
    return (tuple(contracting), tuple(output), axes, layout, transposable, *(activations or [None]))


register_exported(Sparse24, list, _tupled)
register_saved(Sparse24, _to_dict, _from_dict)
