"""Schedules: functions from the step to a decay factor or density, which accept a traced step."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse import _checks

__all__ = ["Schedule", "exponential_decay", "gradual_density", "linear_decay"]

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def linear_decay(beta: float, begin: int = 0) -> Schedule:
    """The decay factor of MDGF-Linear, `D = max(1 - beta * j, 0)`, j steps after `begin`.

    Args:
      beta: the amount that D loses in each step, above 0; D reaches exactly 0 after `1 / beta`
        steps.
      begin: the optimizer step at which sparsification begins; until then D is 1.

    Returns:
      A function from an optimizer step, int or traced, to D, a float32 scalar.

    Raises:
      TypeError: `begin` is not an integer.
      ValueError: `beta` is not above 0, or `begin` is below 0.

    Example:
      >>> import jaxsparse as js
      >>> float(js.linear_decay(0.01, begin=100)(125))
      0.75

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3 (arXiv:2402.04744).
    """
    _check_decay("linear_decay", beta, begin)
    return _LinearDecay(beta, begin)


def exponential_decay(beta: float, begin: int = 0, end: int | None = None) -> Schedule:
    """The decay factor of MDGF-Exponential, `D = exp(-beta * j)`, j steps after `begin`.

    Args:
      beta: the decay rate per step, above 0.
      begin: the optimizer step at which sparsification begins; until then D is 1.
      end: the step from which D is exactly 0, for fine-tuning with the binary mask, above `begin`;
        None if D is never cut off.

    Returns:
      A function from an optimizer step, int or traced, to D, a float32 scalar.

    Raises:
      TypeError: `begin` or `end` is not an integer.
      ValueError: `beta` is not above 0, `begin` is below 0, or `end` is not above `begin`.

    Example:
      >>> import jaxsparse as js
      >>> round(float(js.exponential_decay(0.01, begin=100, end=1000)(125)), 4)
      0.7788
      >>> float(js.exponential_decay(0.01, begin=100, end=1000)(1000))
      0.0

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3 (arXiv:2402.04744).
    """
    _check_decay("exponential_decay", beta, begin)
    if end is not None and _checks.integer(end, "exponential_decay: `end`") <= begin:
        raise ValueError(
            f"exponential_decay: end={end} is not above begin={begin}. Pass a later `end`."
        )
    return _ExponentialDecay(beta, begin, end)


def gradual_density(
    final: float, *, begin: int, end: int, every: int = 1, initial: float = 1.0
) -> Schedule:
    """The cubic schedule of gradual pruning, as a density.

    At step t it is `d_f + (d_i - d_f) * (1 - (t - t0) / (n * dt))^3`.

    Args:
      final: the density `d_f` from `end` on, in (0, 1].
      begin: the optimizer step `t0` at which pruning begins; until then the density is `initial`.
      end: the step `t0 + n * dt` at which pruning ends.
      every: `dt`, the steps between two changes of density.
      initial: the density `d_i` at the start, in (0, 1].

    Returns:
      A function from an optimizer step, int or traced, to the density, a float32 scalar.

    Raises:
      TypeError: a step is not an integer.
      ValueError: a density is not in (0, 1], `end` is not above `begin`, or `every` does not divide
        the number of steps between them.

    Example:
      >>> import jaxsparse as js
      >>> [round(float(js.gradual_density(0.1, begin=0, end=100)(t)), 3) for t in (0, 50, 100)]
      [1.0, 0.213, 0.1]

    References:
      Zhu and Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression (arXiv:1710.01878).
    """
    call = "gradual_density"
    for name, value in (("final", final), ("initial", initial)):
        if not 0 < value <= 1:
            raise ValueError(
                f"{call}: {name}={value} is not in (0, 1]. A density is the fraction kept."
            )
    begin = _checks.integer(begin, f"{call}: `begin`")
    end = _checks.integer(end, f"{call}: `end`")
    every = _checks.integer(every, f"{call}: `every`")
    if not 0 <= begin < end:
        raise ValueError(
            f"{call}: begin={begin} and end={end} are not in order. Pass 0 <= begin < end."
        )
    if every < 1 or (end - begin) % every:
        raise ValueError(
            f"{call}: every={every} does not divide the {end - begin} steps from begin to end."
        )
    return _GradualDensity(final, begin, end, every, initial)


# classes rather than closures, so that schedules and the patterns with them can be pickled and
# compared


@dataclasses.dataclass(frozen=True)
class _LinearDecay:
    beta: float
    begin: int

    def __call__(self, step):
        lifetime = 1.0 / self.beta  # so that D ends at exactly 0; 1 - beta * j would be rounded
        since = jnp.asarray(_since(self.begin, step), jnp.float32)
        falling = jnp.maximum(lifetime - since, 0.0) / lifetime
        # in compiled code the quotient of equal numbers may differ from 1
        return jnp.where(since > 0, falling, 1.0)


@dataclasses.dataclass(frozen=True)
class _ExponentialDecay:
    beta: float
    begin: int
    end: int | None

    def __call__(self, step):
        decayed = jnp.exp(-self.beta * jnp.asarray(_since(self.begin, step), jnp.float32))
        return decayed if self.end is None else jnp.where(step < self.end, decayed, 0.0)


@dataclasses.dataclass(frozen=True)
class _GradualDensity:
    final: float
    begin: int
    end: int
    every: int
    initial: float

    def __call__(self, step):
        length = self.end - self.begin
        changes = jnp.minimum(_since(self.begin, step) // self.every, length // self.every)
        left = 1.0 - jnp.asarray(changes, jnp.float32) * (self.every / length)
        return self.initial * left**3 + self.final * (1.0 - left**3)  # exact at both ends


def _since(begin, step):
    """The steps since `begin`, 0 before it; an unsigned step does not wrap."""
    return jnp.maximum(step, begin) - begin


def _check_decay(call, beta, begin):
    if not beta > 0:
        raise ValueError(f"{call}: beta={beta} is not above 0. Pass a positive decay per step.")
    if _checks.integer(begin, f"{call}: `begin`") < 0:
        raise ValueError(
            f"{call}: begin={begin} is below 0. Pass the step at which sparsification begins."
        )
