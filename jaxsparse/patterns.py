"""Sparsity patterns: what shape of weights participates."""

import dataclasses
import operator

import jax.numpy as jnp

__all__ = ["NM", "Pattern", "as_pattern", "group_axis", "why_not"]


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` of every `m` neighbouring weights along `axis` participate.

    Written `"2:4"` wherever a pattern is expected and the axis is known from elsewhere.

    Args:
      n: how many weights of each group participate, `1 <= n <= m`.
      m: the length of a group.
      axis: the axis along which groups run; it should be the one that the matmul sums over. None where
        the module that owns the kernel tells (see `jaxsparse.flax.plan`).

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
            raise ValueError(f"NM: n={self.n} is not in 1..m={self.m}. n of every m weights participate, as in NM(2, 4).")

    @property
    def density(self) -> float:
        """The fraction of weights that participate."""
        return self.n / self.m

    def __str__(self):
        return f"{self.n}:{self.m}"


Pattern = NM


def integer(value, what):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {value!r}.") from None


def array(value, what):
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be an array, not a {type(value).__name__}. Trees go through their leaves.") from error


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
        raise TypeError(f'{call}: {spec!r} is not a pattern. Pass "2:4", NM(2, 4) or None for dense.')
    n, colon, m = spec.partition(":")
    if not (colon and n.strip().isdecimal() and m.strip().isdecimal()):
        raise ValueError(f'{call}: {spec!r} is not a pattern. Write "n:m" for n kept of every m, as in "2:4".')
    try:
        return NM(int(n), int(m))
    except ValueError as error:
        raise ValueError(f"{call}: {error}") from None


def group_axis(pattern: Pattern, ndim: int) -> int:
    """The non-negative group axis of `pattern` in an array of `ndim` axes; ValueError if there is none such."""
    if pattern.axis is None:
        raise ValueError(f"the axis is never guessed from a shape. Name it: NM({pattern.n}, {pattern.m}, axis=...)")
    if not -ndim <= pattern.axis < ndim:
        raise ValueError(f"axis {pattern.axis} is out of range for {ndim} axes")
    return pattern.axis % ndim


def why_not(pattern: Pattern, shape: tuple[int, ...], dtype) -> str | None:
    """Says why an array of `shape` and `dtype` cannot follow `pattern`; None if it can."""
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        return f"{getattr(dtype, 'name', dtype)} has no order to rank by"
    try:
        size = shape[group_axis(pattern, len(shape))]
    except ValueError as error:
        return str(error)
    if size % pattern.m:
        return f"axis {pattern.axis} has size {size}, not a multiple of m={pattern.m}"
    return None
