"""Checks of arguments: each raises an error that names the call, the problem and the remedy."""

import math
import operator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "AnArray",
    "Budget",
    "Curve",
    "Gradient",
    "Pool",
    "Scope",
    "StageKind",
    "array",
    "choice",
    "counts",
    "density",
    "factor",
    "integer",
    "integers",
    "misfit",
    "rankable",
    "shape_of_block",
    "steps",
    "two_axes",
]

AnArray = jax.Array | np.ndarray
Budget = Literal["uniform", "er", "erk", "global"]
Curve = Literal["exponential", "linear"]
Gradient = Literal["dense", "masked"]
Pool = Literal["max", "mean", "l2"]
Scope = Literal["leaf", "global"]
StageKind = Literal["stepwise", "geometric"]


def choice(call: str, name: str, value: Any, words: Any) -> None:
    """Checks that a value is one of the strings of a `Literal` or of a tuple."""
    allowed = words if isinstance(words, tuple) else get_args(words)
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(f"{call}: {name}={value!r} is not one of {listed}. Pass one of them.")


def integer(value: Any, what: str) -> int:
    """Returns the value as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {value!r}.") from None


def integers(values: Any, what: str) -> tuple[int, ...]:
    """Returns the values as a tuple of ints."""
    try:
        values = tuple(values)
    except TypeError:
        raise TypeError(f"{what} must be two integers, not {values!r}.") from None
    return tuple(integer(value, what) for value in values)


def array(value: Any, what: str) -> jax.Array:
    """Returns the value as an array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} must be an array, not a {type(value).__name__}. Pass the leaves of a tree one "
            "by one."
        ) from error


def rankable(dtype: Any) -> bool:
    """Whether values of a dtype can be ranked."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def counts(call: str, n: Any, m: int) -> tuple[int, int]:
    """Returns `n` and `m` as ints with `1 <= n <= m`."""
    n, m = integer(n, f"{call}: `n`"), integer(m, f"{call}: `m`")
    if not 1 <= n <= m:
        raise ValueError(
            f"{call}: n={n} is not in 1..m={m}. n of every m weights participate, as in NM(2, 4)."
        )
    return n, m


def two_axes(axes: Any, what: str) -> tuple[int, ...]:
    """Returns two different axes as ints."""
    axes = integers(axes, what)
    if len(set(axes)) != 2 or len(axes) != 2:
        raise ValueError(f"{what} are {axes}, not two different axes. Pass two, as in axes=(0, 1).")
    return axes


def shape_of_block(call: str, shape: Any) -> tuple[int, ...]:
    """Returns the two sizes of a block as ints."""
    sizes = integers(shape, f"{call}: `shape`")
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(
            f"{call}: shape={shape} is not two sizes of 1 or more. Pass those along `axes`, as in "
            "Block((4, 4), 0.5)."
        )
    return sizes


def density(call: str, value: Any) -> float:
    """Returns a density in (0, 1] as a float."""
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{call}: `density` must be a number, not {value!r}.") from None
    if not 0 < fraction <= 1:
        raise ValueError(
            f"{call}: density={fraction:g} is not in (0, 1]. A density is the fraction kept."
        )
    return fraction


def steps(call: str, name: str, value: Any, *, least: int = 1) -> None:
    """Checks a number of optimizer steps; accepts arrays, which `inject_hyperparams` passes."""
    if not isinstance(value, jax.Array) and integer(value, f"{call}: `{name}`") < least:
        raise ValueError(f"{call}: {name}={value} is below {least}. Pass a number of steps.")


def factor(call: str, name: str, value: Any, *, most: float = math.inf) -> None:
    """Checks a factor of 0 or more; accepts arrays, which `inject_hyperparams` passes."""
    if not isinstance(value, jax.Array) and (not 0 <= value <= most or math.isinf(value)):
        end = f"{most:g}]" if math.isfinite(most) else "inf)"
        raise ValueError(f"{call}: {name}={value} is not in [0, {end}. Pass one in this range.")


def misfit(
    axes: tuple[int, ...], multiples: tuple[int, ...], shape: tuple[int, ...], dtype: Any
) -> str | None:
    """Why an array cannot be grouped in `multiples` along `axes`, or None if it can."""
    if not rankable(dtype):
        return f"{getattr(dtype, 'name', dtype)} cannot be ranked"
    if 0 in shape:
        return "it is empty"
    if not shape:
        return "it is a scalar"
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            return f"axis {axis} is out of range for {len(shape)} axes"
    if len({axis % len(shape) for axis in axes}) < len(axes):
        return f"axes {axes} name the same axis twice"
    for axis, m in zip(axes, multiples, strict=True):
        if shape[axis] % m:
            return f"axis {axis} has size {shape[axis]}, not a multiple of m={m}"
    return None
