"""Sparsity patterns: what shape of weights participates."""

import dataclasses
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = [
    "NM",
    "Block",
    "Pattern",
    "TransposableNM",
    "Unstructured",
    "as_pattern",
    "axes_in",
    "integer",
    "why_not",
]


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` of every `m` neighbouring weights along `axis` participate.

    Written `"2:4"` wherever a pattern is expected and the axis is known from elsewhere.

    Args:
      n: how many weights of each group participate, `1 <= n <= m`.
      m: the length of a group.
      axis: the axis along which groups run; it should be the one that the matmul sums over. None
        where the module that owns the kernel tells (see `jaxsparse.flax.plan`).

    Raises:
      TypeError: `n`, `m` or `axis` is not an integer.
      ValueError: `n` is not in `1..m`.

    Example:
      >>> import jaxsparse as js
      >>> js.NM(2, 4).density
      0.5
      >>> str(js.NM(1, 8, axis=0))
      '1:8'

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3.
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self):
        for name in ("n", "m", "axis"):
            value = getattr(self, name)
            if value is not None or name != "axis":
                object.__setattr__(self, name, integer(value, f"NM: `{name}`"))
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"NM: n={self.n} is not in 1..m={self.m}. n of every m weights participate, as in "
                "NM(2, 4)."
            )

    @property
    def density(self) -> float:
        """The fraction of weights that participate."""
        return self.n / self.m

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The axes that the pattern runs along, here one; None where they are not named yet."""
        return None if self.axis is None else (self.axis,)

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each of its axes, what the size must be a multiple of."""
        return (self.m,)

    @property
    def hint(self) -> str:
        """How to name its axes."""
        return f"Name the one that the matmul sums over, as in NM({self.n}, {self.m}, axis=0)."

    def along(self, axes: tuple[int, ...] | None) -> "NM":
        """The same pattern along other axes."""
        return NM(self.n, self.m, None if axes is None else axes[0])

    def __str__(self):
        return f"{self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class TransposableNM:
    """`n` of every `m` weights participate along both of two axes: the mask of the transpose is the
    transposed mask.

    So the forward product, which sums over one axis, and the backward one, which sums over the
    other, both run sparse. Of all patterns of an `m` by `m` block (90 for 2:4, 24 for 1:4 and 3:4)
    the one that keeps most is taken.

    Args:
      n: how many of each group participate, 1, 2 or 3.
      m: the length of a group along each axis: 4.
      axes: the two axes, the one that the matmul sums over first. None where the module that owns
        the kernel tells (see `jaxsparse.flax.plan`).

    Raises:
      TypeError: `n`, `m` or an axis is not an integer.
      ValueError: `n` and `m` are no such pattern, or `axes` are not two different axes.

    Example:
      >>> import jaxsparse as js
      >>> js.TransposableNM(2, 4).density
      0.5
      >>> str(js.TransposableNM(1, 4, axes=(0, 1)))
      'transposable 1:4'

    References:
      Advances in Sparse Neural Model Training, section 2, 2:4 along both axes.
    """

    n: int
    m: int
    axes: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("n", "m"):
            object.__setattr__(
                self, name, integer(getattr(self, name), f"TransposableNM: `{name}`")
            )
        if self.m != 4 or self.n not in (1, 2, 3):
            raise ValueError(
                f"TransposableNM: {self.n}:{self.m} is not supported along two axes. Pass 1:4, 2:4 "
                "or 3:4, or NM for one."
            )
        object.__setattr__(self, "axes", _two(self.axes, "TransposableNM: `axes`"))

    @property
    def density(self) -> float:
        """The fraction of weights that participate."""
        return self.n / self.m

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each of its axes, what the size must be a multiple of."""
        return (self.m, self.m)

    @property
    def hint(self) -> str:
        """How to name its axes."""
        return (
            "Name both, the one that the matmul sums over first, "
            f"as in TransposableNM({self.n}, {self.m}, axes=(0, 1))."
        )

    def along(self, axes: tuple[int, ...] | None) -> "TransposableNM":
        """The same pattern along other axes."""
        return dataclasses.replace(self, axes=axes)

    def __str__(self):
        return f"transposable {self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """The weights of largest magnitude participate, wherever they are.

    Exactly `density * size` of them stay, rounded half up, and at least one. In a stack of weights
    that `flax.plan` knows, as under `nn.scan`, each keeps the density for itself, unless the scope
    is global.

    Args:
      density: the fraction that participates, in (0, 1]; or a function from the step to it, such as
        `gradual_density` makes. A function is equal to itself alone, and so is the pattern.
      scope: `"leaf"`, each leaf keeps the density; `"global"`, all leaves under this pattern
        together do.
      schedule: left out; the function, if `density` is one.

    Attributes:
      density: the fraction, that of the last step if it follows a function.

    Raises:
      TypeError: `density` is neither a number nor a function.
      ValueError: `density` is not in (0, 1], or `scope` is neither of the two.

    Example:
      >>> import jaxsparse as js
      >>> str(js.Unstructured(0.1))
      'unstructured 0.1'
      >>> js.Unstructured(js.gradual_density(0.25, begin=0, end=100)).density
      0.25

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, with top-d of magnitude.
    """

    density: float
    scope: str = "leaf"
    schedule: Callable | None = dataclasses.field(default=None, kw_only=True, repr=False)

    axes = ()
    multiples = ()

    def __post_init__(self):
        _check_density(self)

    def along(self, axes: tuple[int, ...] | None) -> "Unstructured":
        """Itself: it has no axes."""
        return self

    def __str__(self):
        return f"unstructured {_density_text(self)}"


@dataclasses.dataclass(frozen=True)
class Block:
    """The blocks of largest magnitude participate, all weights of a block or none.

    Blocks stand over two axes; along the others each place has its own. Where a size is no multiple
    of the block's, the last block is smaller and is scored by what it holds. Exactly `density *
    blocks` stay, rounded half up, and at least one.

    Args:
      shape: the sizes of a block along `axes`.
      density: the fraction of blocks that participates, in (0, 1]; or a function from the step to
        it, such as `gradual_density` makes. A function is equal to itself alone, and so is the
        pattern.
      axes: the two axes, the one that the matmul sums over first. None where the module that owns
        the kernel tells (see `jaxsparse.flax.plan`).
      score: what ranks a block: its `"max"`, `"mean"` or `"l2"` (the root of the sum of squares).
      scope: `"leaf"`, each leaf keeps the density; `"global"`, all leaves under this pattern
        together do.
      schedule: left out; the function, if `density` is one.

    Attributes:
      density: the fraction, that of the last step if it follows a function.

    Raises:
      TypeError: a size or an axis is not an integer, or `density` is neither a number nor a
        function.
      ValueError: `shape` is not two sizes of 1 or more, `density` is not in (0, 1], `axes` are not
        two different axes, or `score` or `scope` is not one of theirs.

    Example:
      >>> import jaxsparse as js
      >>> str(js.Block((16, 16), 0.25, axes=(0, 1)))
      'block 16x16 0.25'

    References:
      Advances in Sparse Neural Model Training, section 2, block sparsity.
    """

    shape: tuple[int, ...]
    density: float
    axes: tuple[int, ...] | None = None
    score: str = "max"
    scope: str = "leaf"
    schedule: Callable | None = dataclasses.field(default=None, kw_only=True, repr=False)

    multiples = (1, 1)

    def __post_init__(self):
        shape = _integers(self.shape, "Block: `shape`")
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(
                f"Block: shape={self.shape} is not two sizes of 1 or more. Pass those along "
                "`axes`, as in Block((4, 4), 0.5)."
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axes", _two(self.axes, "Block: `axes`"))
        check_choice("Block", "score", self.score, ("max", "mean", "l2"))
        _check_density(self)

    @property
    def hint(self) -> str:
        """How to name its axes."""
        return (
            "Name both, the one that the matmul sums over first, "
            f"as in Block({self.shape}, {self.density:g}, axes=(0, 1))."
        )

    def along(self, axes: tuple[int, ...] | None) -> "Block":
        """The same pattern along other axes."""
        return dataclasses.replace(self, axes=axes)

    def __str__(self):
        return f"block {self.shape[0]}x{self.shape[1]} {_density_text(self)}"


Pattern = NM | TransposableNM | Unstructured | Block


def _check_density(pattern):
    call = type(pattern).__name__
    if callable(pattern.density):
        object.__setattr__(pattern, "schedule", pattern.density)
        with jax.ensure_compile_time_eval():
            object.__setattr__(pattern, "density", float(pattern.density(jnp.iinfo(jnp.int32).max)))
    object.__setattr__(pattern, "density", density(pattern.density, call))
    check_choice(call, "scope", pattern.scope, ("leaf", "global"))


def _density_text(pattern):
    to = "to " if pattern.schedule else ""
    return f"{to}{pattern.density:.3g}{' global' if pattern.scope == 'global' else ''}"


def density(value, call) -> float:
    """A density in (0, 1] as a float."""
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{call}: `density` must be a number, not {value!r}.") from None
    if not 0 < fraction <= 1:
        raise ValueError(
            f"{call}: density={fraction:g} is not in (0, 1]. A density is the fraction kept."
        )
    return fraction


def check_choice(call, name, value, choices):
    if value not in choices:
        raise ValueError(
            f"{call}: {name}={value!r} is none of {', '.join(map(repr, choices))}. Pass one of "
            "them."
        )


def _integers(values, what):
    try:
        values = tuple(values)
    except TypeError:
        raise TypeError(f"{what} must be two integers, not {values!r}.") from None
    return tuple(integer(value, what) for value in values)


def _two(axes, what):
    if axes is None:
        return None
    axes = _integers(axes, what)
    if len(set(axes)) != 2 or len(axes) != 2:
        raise ValueError(f"{what} are {axes}, not two different axes. Pass two, as in axes=(0, 1).")
    return axes


def integer(value, what):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {value!r}.") from None


def array(value, what):
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} must be an array, not a {type(value).__name__}. Trees go through their leaves."
        ) from error


def as_pattern(spec: Pattern | str, call: str = "as_pattern") -> Pattern:
    """Reads `"n:m"` as `NM(n, m)`; a pattern passes through.

    Raises:
      TypeError: `spec` is neither.
      ValueError: the text is not two integers around a colon, or they make no pattern.

    Example:
      >>> as_pattern("2:4")
      NM(n=2, m=4, axis=None)
    """
    if isinstance(spec, Pattern):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f'{call}: {spec!r} is not a pattern. Pass "2:4", NM(2, 4) or None for dense.'
        )
    n, colon, m = spec.partition(":")
    if not (colon and n.strip().isdecimal() and m.strip().isdecimal()):
        raise ValueError(
            f'{call}: {spec!r} is not a pattern. Write "n:m" for n kept of every m, as in "2:4".'
        )
    try:
        return NM(int(n), int(m))
    except ValueError as error:
        raise ValueError(f"{call}: {error}") from None


def axes_in(pattern: Pattern, ndim: int) -> tuple[int, ...]:
    """The non-negative axes of `pattern` in an array of `ndim` axes; ValueError if there are none
    such.
    """
    if pattern.axes is None:
        raise ValueError(f"the axis is never guessed from a shape. {pattern.hint}")
    for axis in pattern.axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} is out of range for {ndim} axes")
    axes = tuple(axis % ndim for axis in pattern.axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes {pattern.axes} of {ndim} axes are the same one")
    return axes


def why_not(pattern: Pattern, shape: tuple[int, ...], dtype) -> str | None:
    """Says why an array of `shape` and `dtype` cannot follow `pattern`; None if it can."""
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        return f"{getattr(dtype, 'name', dtype)} has no order to rank by"
    if 0 in shape:
        return "it is empty"
    if not shape:
        return "it is a scalar"
    try:
        axes = axes_in(pattern, len(shape))
    except ValueError as error:
        return str(error)
    for name, axis, m in zip(pattern.axes or (), axes, pattern.multiples, strict=True):
        if shape[axis] % m:
            return f"axis {name} has size {shape[axis]}, not a multiple of m={m}"
    return None
