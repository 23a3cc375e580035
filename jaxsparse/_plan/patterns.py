"""The sparsity patterns."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _checks
from jaxsparse._masks.blocks import block_masks
from jaxsparse._masks.nm import mask_of_magnitudes, mask_of_scores
from jaxsparse._masks.topk import ranked_masks
from jaxsparse._masks.transposable import check_supported, transposable_mask
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.stages import geometric_stages, stepwise_stages

__all__ = ["NM", "Block", "TransposableNM", "Unstructured", "as_pattern"]


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """`n` of every `m` neighbouring weights along `axis` participate.

    `"2:4"` stands for `NM(2, 4)` wherever a pattern is expected and the axis is known from
    elsewhere.

    Args:
      n: how many weights of each group participate, `1 <= n <= m`.
      m: the length of a group.
      axis: the axis along which groups run, which should be the one that the matmul sums over. None
        if it is learnt from the program (see `jaxsparse.plan`).

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
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self):
        n, m = _checks.counts("NM", self.n, self.m)
        axis = None if self.axis is None else _checks.integer(self.axis, "NM: `axis`")
        for name, value in (("n", n), ("m", m), ("axis", axis)):
            object.__setattr__(self, name, value)

    @property
    def density(self) -> float:
        """The fraction of weights that participate."""
        return self.n / self.m

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The axis that the pattern runs along, in a tuple; None if it is not known yet."""
        return None if self.axis is None else (self.axis,)

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each axis, the number that its size must be a multiple of."""
        return (self.m,)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """`n` and `m` for each axis."""
        return ((self.n, self.m),)

    @property
    def hint(self) -> str:
        """How to name the axis."""
        return f"Name the one that the matmul sums over, as in NM({self.n}, {self.m}, axis=0)."

    def along(self, axes: tuple[int, ...] | None) -> "NM":
        """The same pattern along other axes."""
        return NM(self.n, self.m, None if axes is None else axes[0])

    def masks(self, values, axes, *, magnitude, stack=(), step=0):
        """Computes the mask of the only array."""
        (array,), ((axis,),) = values, axes
        return [(mask_of_magnitudes if magnitude else mask_of_scores)(array, self.n, self.m, axis)]

    def place_bits(self, shape: tuple[int, ...]) -> float:
        """The bits that select one of m places, for each weight that participates."""
        return math.prod(shape) * self.density * (self.m - 1).bit_length()

    def stages(self, kind: _checks.StageKind, k: int = 16) -> tuple["NM", ...]:
        """The stages of `stepwise_stages` or `geometric_stages`, as patterns."""
        stepwise = kind == "stepwise"
        counts = (
            stepwise_stages(self.n, self.m) if stepwise else geometric_stages(self.n, self.m, k)
        )
        return tuple(NM(n, m, self.axis) for n, m in counts)

    def __str__(self):
        return f"{self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class TransposableNM(Pattern):
    """`n` of every `m` weights participate along both of two axes.

    The mask of the transpose is therefore the transposed mask. The forward product, which sums over
    one axis, and the backward product, which sums over the other, both run sparse. In each `m` by
    `m` block, of all masks with this property (90 for 2:4, 24 for 1:4 and 3:4), the one that keeps
    the most magnitude is chosen.

    Args:
      n: how many of each group participate, 1, 2 or 3.
      m: the length of a group along each axis: 4.
      axes: the two axes, starting with the one that the matmul sums over. None if they are learnt
        from the program (see `jaxsparse.plan`).

    Raises:
      TypeError: `n`, `m` or an axis is not an integer.
      ValueError: `n:m` is not supported, or `axes` are not two different axes.

    Example:
      >>> import jaxsparse as js
      >>> js.TransposableNM(2, 4).density
      0.5
      >>> str(js.TransposableNM(1, 4, axes=(0, 1)))
      'transposable 1:4'

    References:
      Advances in Sparse Neural Model Training, section 2, 2:4 along both axes; Hubara et al.,
      Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
      Masks (arXiv:2102.08124).
    """

    n: int
    m: int
    axes: tuple[int, ...] | None = None

    def __post_init__(self):
        n, m = check_supported("TransposableNM", self.n, self.m)
        axes = None if self.axes is None else _checks.two_axes(self.axes, "TransposableNM: `axes`")
        for name, value in (("n", n), ("m", m), ("axes", axes)):
            object.__setattr__(self, name, value)

    @property
    def density(self) -> float:
        """The fraction of weights that participate."""
        return self.n / self.m

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each axis, the number that its size must be a multiple of."""
        return (self.m, self.m)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """`n` and `m` for each axis."""
        return ((self.n, self.m), (self.n, self.m))

    @property
    def hint(self) -> str:
        """How to name the axes."""
        return (
            "Name both, starting with the one that the matmul sums over, "
            f"as in TransposableNM({self.n}, {self.m}, axes=(0, 1))."
        )

    def along(self, axes: tuple[int, ...] | None) -> "TransposableNM":
        """The same pattern along other axes."""
        return dataclasses.replace(self, axes=axes)

    def masks(self, values, axes, *, magnitude, stack=(), step=0):
        """Computes the mask of the only array."""
        (array,), (pair,) = values, axes
        return [transposable_mask(array, self.n, pair, magnitude=magnitude)]

    def place_bits(self, shape: tuple[int, ...]) -> float:
        """The bits that select one of m places, for each weight that participates."""
        return math.prod(shape) * self.density * (self.m - 1).bit_length()

    def stages(self, kind: _checks.StageKind, k: int = 16) -> tuple["TransposableNM", ...]:
        """The stages of `stepwise_stages`; groups longer than 4 are not supported."""
        if kind == "geometric" and k > 1:
            return ()
        return tuple(TransposableNM(n, m, self.axes) for n, m in stepwise_stages(self.n, self.m))

    def __str__(self):
        return f"transposable {self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """The weights of largest magnitude participate, wherever they are.

    Exactly `density * size` of them stay, rounded half up, and at least one. In a stack of weights
    that the plan recognises, as under `nn.scan`, each weight keeps the density separately, unless
    the scope is global.

    Args:
      density: the fraction that participates, in (0, 1], or a function from the step to it, such as
        `gradual_density` returns. Patterns are equal only if their functions are.
      scope: `"leaf"`: each leaf keeps the density; `"global"`: all leaves under this pattern keep
        it together.

    Attributes:
      density: the fraction; under a function, that of the last step.
      schedule: the function, if `density` is one.

    Raises:
      TypeError: `density` is neither a number nor a function.
      ValueError: `density` is not in (0, 1], or `scope` is not one of the two.

    Example:
      >>> import jaxsparse as js
      >>> str(js.Unstructured(0.1))
      'unstructured 0.1'
      >>> js.Unstructured(js.gradual_density(0.25, begin=0, end=100)).density
      0.25

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, with top-d of magnitude.
    """

    density: Any
    scope: str = "leaf"
    schedule: Callable | None = dataclasses.field(default=None, init=False, repr=False)

    axes = ()
    multiples = ()
    groups = ()
    hint = "It has no axes."

    def __post_init__(self):
        _settle_density(self)

    def along(self, axes: tuple[int, ...] | None) -> "Unstructured":
        """Returns the pattern itself, which has no axes."""
        return self

    def masks(self, values, axes, *, magnitude, stack=(), step=0):
        """Computes the masks of all arrays, ranked together."""
        return ranked_masks(values, _density_at(self, step), magnitude=magnitude, stack=stack)

    def place_bits(self, shape: tuple[int, ...]) -> float:
        """One bit for each weight."""
        return math.prod(shape)

    def with_density(self, density: float | Callable, scope: str | None = None) -> "Unstructured":
        """The same pattern at another density."""
        return Unstructured(density, scope or self.scope)

    def __str__(self):
        return f"unstructured {_density_text(self)}"


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """The blocks of largest magnitude participate: all weights of a block, or none.

    Blocks cover two axes; along all other axes their size is 1. Where a size is not a multiple of
    the block's, the last block is smaller and is scored by the weights that it holds. Exactly
    `density * blocks` stay, rounded half up, and at least one.

    Args:
      shape: the sizes of a block along `axes`.
      density: the fraction of blocks that participates, in (0, 1], or a function from the step to
        it, such as `gradual_density` returns. Patterns are equal only if their functions are.
      axes: the two axes, starting with the one that the matmul sums over. None if they are learnt
        from the program (see `jaxsparse.plan`).
      pool: what ranks a block: its `"max"`, `"mean"` or `"l2"` (the root of the sum of squares).
      scope: `"leaf"`: each leaf keeps the density; `"global"`: all leaves under this pattern keep
        it together.

    Attributes:
      density: the fraction; under a function, that of the last step.
      schedule: the function, if `density` is one.

    Raises:
      TypeError: a size or an axis is not an integer, or `density` is neither a number nor a
        function.
      ValueError: `shape` is not two sizes of 1 or more, `density` is not in (0, 1], `axes` are not
        two different axes, or `pool` or `scope` is not one of its choices.

    Example:
      >>> import jaxsparse as js
      >>> str(js.Block((16, 16), 0.25, axes=(0, 1)))
      'block 16x16 0.25'

    References:
      Advances in Sparse Neural Model Training, section 2, block sparsity.
    """

    shape: tuple[int, ...]
    density: Any
    axes: tuple[int, ...] | None = None
    pool: _checks.Pool = "max"
    scope: str = "leaf"
    schedule: Callable | None = dataclasses.field(default=None, init=False, repr=False)

    multiples = (1, 1)
    groups = ()

    def __post_init__(self):
        axes = None if self.axes is None else _checks.two_axes(self.axes, "Block: `axes`")
        object.__setattr__(self, "shape", _checks.shape_of_block("Block", self.shape))
        object.__setattr__(self, "axes", axes)
        _checks.choice("Block", "pool", self.pool, _checks.Pool)
        _settle_density(self)

    @property
    def hint(self) -> str:
        """How to name the axes."""
        return (
            "Name both, starting with the one that the matmul sums over, "
            f"as in Block({self.shape}, {self.density:g}, axes=(0, 1))."
        )

    def along(self, axes: tuple[int, ...] | None) -> "Block":
        """The same pattern along other axes."""
        return Block(self.shape, self.schedule or self.density, axes, self.pool, self.scope)

    def masks(self, values, axes, *, magnitude, stack=(), step=0):
        """Computes the masks of all arrays, whose blocks are ranked together."""
        density = _density_at(self, step)
        return block_masks(
            values, axes, self.shape, density, self.pool, magnitude=magnitude, stack=stack
        )

    def place_bits(self, shape: tuple[int, ...]) -> float:
        """One bit for each block."""
        covered = [shape[axis] for axis in self.axes or ()]
        blocks = [math.ceil(n / side) for n, side in zip(covered, self.shape, strict=True)]
        return math.prod(shape) // math.prod(covered) * math.prod(blocks)

    def with_density(self, density: float | Callable, scope: str | None = None) -> "Block":
        """The same pattern at another density."""
        return Block(self.shape, density, self.axes, self.pool, scope or self.scope)

    def __str__(self):
        return f"block {self.shape[0]}x{self.shape[1]} {_density_text(self)}"


def _settle_density(pattern):
    call = type(pattern).__name__
    if callable(pattern.density):
        object.__setattr__(pattern, "schedule", pattern.density)
        with jax.ensure_compile_time_eval():
            object.__setattr__(pattern, "density", float(pattern.density(jnp.iinfo(jnp.int32).max)))
    object.__setattr__(pattern, "density", _checks.density(call, pattern.density))
    _checks.choice(call, "scope", pattern.scope, _checks.Scope)


def _density_at(pattern, step):
    """The density at an optimizer step: a float, or a float32 scalar under a schedule."""
    if pattern.schedule is None:
        return pattern.density
    return jnp.asarray(pattern.schedule(step), jnp.float32)


def _density_text(pattern):
    to = "to " if pattern.schedule else ""
    return f"{to}{pattern.density:.3g}{' global' if pattern.scope == 'global' else ''}"


def as_pattern(spec: Pattern | str, call: str = "as_pattern") -> Pattern:
    """Reads `"n:m"` as `NM(n, m)`; a pattern passes through.

    Raises:
      TypeError: `spec` is neither.
      ValueError: the text is not two integers around a colon, or there is no such pattern.

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
