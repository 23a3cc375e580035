"""Which leaves a rule with a wildcard leaves dense, as the papers do."""

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp

from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.patterns import as_pattern
from jaxsparse._plan.plan import Leaf

__all__ = ["Anywhere", "anywhere", "sweeps", "why_ineligible"]

_ARRAYS = ("kernel", "weight", "w", "embedding")
_HEAD = re.compile(
    r"((lm|mlm|cls|class|output|prediction|vocab)_)?head(_?\d+)?|((to|output)_)?logits(_\w+)?"
    r"|unembed\w*|vocab\w*|classifier(_?\d+)?"
)


@dataclasses.dataclass(frozen=True)
class Anywhere:
    """A pattern that a rule with a wildcard gives to heads and to narrow leaves too."""

    pattern: Pattern


def anywhere(pattern: Pattern | str) -> Anywhere:
    """A rule that also makes those leaves sparse that a wildcard leaves dense otherwise.

    A rule with a wildcard and without an axis leaves heads dense, and for 2:4 the leaves that
    Sparse Tensor Cores cannot multiply: those whose product sums over a number that is not a
    multiple of 16, or of 32 for weights of 8 bits.

    Args:
      pattern: the pattern, or its text, such as `"2:4"`.

    Returns:
      The value of a rule.

    Raises:
      TypeError: `pattern` is neither a pattern nor text.
      ValueError: there is no such pattern.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params, fn = {"w": jnp.zeros((8, 2))}, lambda params, x: x @ params["w"]
      >>> js.plan(params, {"*": "2:4"}, fn, jnp.zeros((1, 8))).leaves[0].reason
      'sums over 8, not a multiple of 16'
      >>> js.plan(params, {"*": js.anywhere("2:4")}, fn, jnp.zeros((1, 8))).density
      0.5

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.2 (arXiv:2104.08378).
    """
    return Anywhere(as_pattern(pattern, "anywhere"))


def sweeps(rule: str) -> bool:
    """Whether a rule has a wildcard."""
    return any(character in rule for character in "*?[")


def why_ineligible(leaf: Leaf, dtype: Any) -> str:
    """Why a rule with a wildcard leaves a leaf dense that can be sparse; empty if it does not."""
    *modules, name = leaf.path.split("/")
    owner = modules[-1] if modules and name in _ARRAYS else name
    if _HEAD.fullmatch(owner):
        return f"{owner} is the name of a head"
    multiple = 32 if jnp.dtype(dtype).itemsize == 1 else 16
    inner = math.prod(leaf.shape[axis] for axis in leaf.summed)
    if leaf.pattern is not None and leaf.pattern.groups[:1] == ((2, 4),) and inner % multiple:
        return f"sums over {inner}, not a multiple of {multiple}"
    return ""
