"""The base class of sparsity patterns."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax

from jaxsparse import _checks

__all__ = ["Pattern", "axes_in", "why_not"]


class Pattern:
    """Which weights of an array may participate together; the base class of all patterns.

    To add a pattern, write a frozen dataclass that derives from this class and an algorithm for its
    masks. Plans, masks, recipes, compression and costs get everything from the attributes and
    methods of the pattern; a class that lacks one of them is refused when it is defined.

    Attributes:
      density: the fraction of weights that participate; under a schedule, the last one.
      axes: the axes that the pattern runs along, starting with the one that the matmul sums over;
        None until the plan finds them.
      multiples: for each axis, the number that its size must be a multiple of.
      groups: `(n, m)` for each axis along which n of every m neighbours participate; empty if there
        are no such groups.
      hint: a sentence that explains how to name the axes.
      scope: `"leaf"`, or `"global"` if all leaves under the pattern are ranked together.
      schedule: the function from step to density, or None.

    Example:
      >>> import jaxsparse as js
      >>> isinstance(js.NM(2, 4), js.Pattern)
      True
    """

    density: float
    axes: tuple[int, ...] | None
    multiples: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    hint: str
    scope: str = "leaf"
    schedule: Callable | None = None

    _answers: ClassVar = ("density", "axes", "multiples", "groups", "hint")
    _methods: ClassVar = ("along", "masks", "place_bits", "__str__")

    def __init_subclass__(cls):
        super().__init_subclass__()
        defined = {name for base in cls.__mro__[:-2] for name in vars(base)}
        defined |= {name for base in cls.__mro__[:-2] for name in inspect.get_annotations(base)}
        defined -= {name for name in cls._methods if getattr(cls, name) is getattr(Pattern, name)}
        missing = [name for name in (*cls._answers, *cls._methods) if name not in defined]
        if missing:
            raise TypeError(
                f"{cls.__name__}: a pattern defines {', '.join(missing)}. See jaxsparse.Pattern."
            )

    def along(self, axes: tuple[int, ...] | None) -> "Pattern":
        """The same pattern along other axes."""
        raise NotImplementedError

    def masks(
        self,
        values: Sequence[jax.Array],
        axes: Sequence[tuple[int, ...]],
        *,
        magnitude: bool,
        stack: tuple[int, ...] = (),
        step: Any = 0,
    ) -> list[jax.Array]:
        """Computes the masks of arrays that are ranked together (one, unless the scope is global).

        Args:
          values: the scores, or the weights if `magnitude` is set.
          axes: for each array the axes of its pattern, not negative.
          magnitude: whether to rank by magnitude.
          stack: the axes over separate weights, each of which is ranked separately.
          step: the optimizer step, for a density that follows a schedule.
        """
        raise NotImplementedError

    def place_bits(self, shape: tuple[int, ...]) -> float:
        """The bits that encode which weights of an array of `shape` participate."""
        raise NotImplementedError

    def __str__(self):
        raise NotImplementedError

    def with_density(self, density: float | Callable, scope: str | None = None) -> "Pattern":
        """The same pattern at another density; ValueError if its form fixes the density."""
        raise ValueError(f"the density of {self} is fixed")

    @property
    def adjustable(self) -> bool:
        """Whether the density of the pattern can be changed."""
        return type(self).with_density is not Pattern.with_density

    def stages(self, kind: str, k: int = 16) -> tuple["Pattern", ...]:
        """The patterns that lead to this one in structure decay; empty if there are none."""
        return ()


def axes_in(pattern: Pattern, ndim: int) -> tuple[int, ...]:
    """The axes of a pattern in an array of `ndim` axes, not negative."""
    if pattern.axes is None:
        raise ValueError(f"the axis is never guessed from a shape. {pattern.hint}")
    reason = _checks.misfit(pattern.axes, (1,) * len(pattern.axes), (1,) * ndim, float)
    if reason:
        raise ValueError(reason)
    return tuple(axis % ndim for axis in pattern.axes)


def why_not(pattern: Pattern, shape: tuple[int, ...], dtype: Any) -> str | None:
    """Why an array of `shape` and `dtype` cannot follow a pattern, or None if it can."""
    if pattern.axes is None and shape and 0 not in shape and _checks.rankable(dtype):
        return f"the axis is never guessed from a shape. {pattern.hint}"
    axes = pattern.axes or ()
    return _checks.misfit(axes, pattern.multiples[: len(axes)], shape, dtype)
