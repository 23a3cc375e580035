"""Steps to decay factors, pattern stages and densities: pure functions, safe under `jit` with a
traced step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse._plan.patterns import integer

__all__ = [
    "Schedule",
    "exponential_decay",
    "geometric_stages",
    "gradual_density",
    "linear_decay",
    "stepwise_stages",
]

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def linear_decay(beta: float, begin: int = 0) -> Schedule:
    """The decay factor of MDGF-Linear, `D = max(1 - beta * j, 0)` with `j` the steps since `begin`.

    Args:
      beta: what D loses a step, above 0; D reaches exactly 0 after `1 / beta` steps.
      begin: the optimizer step at which sparsification begins; D is 1 up to there.

    Returns:
      A function from an optimizer step, int or traced, to D, a float32 scalar.

    Raises:
      TypeError: `begin` is no integer.
      ValueError: `beta` is not above 0, or `begin` is below 0.

    Example:
      >>> import jaxsparse as js
      >>> float(js.linear_decay(0.01, begin=100)(125))
      0.75

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3.
    """
    _check_decay("linear_decay", beta, begin)
    lifetime = 1.0 / beta  # so that D ends at 0, not at the rounding error of 1 - beta * j

    def factor(step):
        since = jnp.asarray(_since(begin, step), jnp.float32)
        falling = jnp.maximum(lifetime - since, 0.0) / lifetime
        # compiled, the quotient of equal numbers need not be 1
        return jnp.where(since > 0, falling, 1.0)

    return factor


def exponential_decay(beta: float, begin: int = 0, end: int | None = None) -> Schedule:
    """The decay factor of MDGF-Exponential, `D = exp(-beta * j)` with `j` the steps since `begin`;
    exactly 0 from `end`.

    Args:
      beta: the rate a step, above 0.
      begin: the optimizer step at which sparsification begins; D is 1 up to there.
      end: the step at which fine-tuning with the binary mask begins, above `begin`; None never cuts
        D off.

    Returns:
      A function from an optimizer step, int or traced, to D, a float32 scalar.

    Raises:
      TypeError: `begin` or `end` is no integer.
      ValueError: `beta` is not above 0, `begin` is below 0, or `end` is not above `begin`.

    Example:
      >>> import jaxsparse as js
      >>> round(float(js.exponential_decay(0.01, begin=100, end=1000)(125)), 4)
      0.7788
      >>> float(js.exponential_decay(0.01, begin=100, end=1000)(1000))
      0.0

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3.
    """
    _check_decay("exponential_decay", beta, begin)
    if end is not None and integer(end, "exponential_decay: `end`") <= begin:
        raise ValueError(
            f"exponential_decay: end={end} is not above begin={begin}. Fine-tuning follows the "
            "decay."
        )

    def factor(step):
        decayed = jnp.exp(-beta * jnp.asarray(_since(begin, step), jnp.float32))
        return decayed if end is None else jnp.where(step < end, decayed, 0.0)

    return factor


def _since(begin, step):
    """The steps since `begin`, 0 before it; an unsigned step does not wrap."""
    return jnp.maximum(step, begin) - begin


def _check_decay(call, beta, begin):
    if not beta > 0:
        raise ValueError(f"{call}: beta={beta} is not above 0. D loses it every step.")
    if integer(begin, f"{call}: `begin`") < 0:
        raise ValueError(
            f"{call}: begin={begin} is below 0. Pass the optimizer step at which sparsification "
            "begins."
        )


def stepwise_stages(n: int, m: int) -> tuple[tuple[int, int], ...]:
    """The patterns of SDGF-Stepwise: first one of m weights dropped, then half of m kept, a
    quarter, ... down to `n:m`.

    Args:
      n: how many of each group the last stage keeps, `1 <= n <= m`.
      m: the group length, the same in all stages.

    Returns:
      The stages in order, each `(n, m)`; the last is `(n, m)` itself.

    Raises:
      TypeError: an argument is no integer.
      ValueError: `n` is not in `1..m`.

    Example:
      >>> import jaxsparse as js
      >>> js.stepwise_stages(1, 8)
      ((7, 8), (4, 8), (2, 8), (1, 8))

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3.
    """
    _check_stages("stepwise_stages", n, m)
    kept, stages = m // 2, [(m - 1, m)] if n < m - 1 else []
    while kept > n:
        stages.append((kept, m))
        kept //= 2
    return (*stages, (n, m))


def geometric_stages(n: int, m: int, k: int = 16) -> tuple[tuple[int, int], ...]:
    """The patterns of SDGF-Geometric: the same density all along in groups that halve,
    `(k*n):(k*m)` down to `n:m`.

    Args:
      n: how many of each group the last stage keeps, `1 <= n <= m`.
      m: the group length of the last stage.
      k: how much longer the groups of the first stage are, a power of two; there are `log2(k) + 1`
        stages.

    Returns:
      The stages in order, each `(n, m)`; the last is `(n, m)` itself.

    Raises:
      TypeError: an argument is no integer.
      ValueError: `n` is not in `1..m`, or `k` is no power of two.

    Example:
      >>> import jaxsparse as js
      >>> js.geometric_stages(1, 8)
      ((16, 128), (8, 64), (4, 32), (2, 16), (1, 8))

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3.
    """
    _check_stages("geometric_stages", n, m)
    if integer(k, "geometric_stages: `k`") < 1 or k & (k - 1):
        raise ValueError(
            f"geometric_stages: k={k} is no power of two. The group halves from k*m={k * m} down "
            f"to m={m}."
        )
    return tuple((n << i, m << i) for i in reversed(range(k.bit_length())))


def _check_stages(call, n, m):
    n, m = integer(n, f"{call}: `n`"), integer(m, f"{call}: `m`")
    if not 1 <= n <= m:
        raise ValueError(
            f"{call}: n={n} is not in 1..m={m}. The last stage keeps n of every m weights."
        )


def gradual_density(
    final: float, *, begin: int, end: int, every: int = 1, initial: float = 1.0
) -> Schedule:
    """The cubic schedule of gradual pruning, as a density: `d_f + (d_i - d_f) * (1 - (t - t0) / (n
    * dt))^3`.

    Args:
      final: the density kept from `end` on, in (0, 1].
      begin: the optimizer step `t0` at which pruning begins; the density is `initial` up to there.
      end: the step `t0 + n * dt` at which it ends.
      every: `dt`, the steps between two changes of density.
      initial: the density at the start, in (0, 1].

    Returns:
      A function from an optimizer step, int or traced, to the density, a float32 scalar.

    Raises:
      TypeError: a step is no integer.
      ValueError: a density is not in (0, 1], `end` is not above `begin`, or `every` does not divide
        the steps between.

    Example:
      >>> import jaxsparse as js
      >>> [round(float(js.gradual_density(0.1, begin=0, end=100)(t)), 3) for t in (0, 50, 100)]
      [1.0, 0.213, 0.1]

    References:
      Zhu and Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression.
    """
    for name, value in (("final", final), ("initial", initial)):
        if not 0 < value <= 1:
            raise ValueError(
                f"gradual_density: {name}={value} is not in (0, 1]. A density is the fraction kept."
            )
    begin, end, every = (
        integer(value, f"gradual_density: `{name}`")
        for name, value in (("begin", begin), ("end", end), ("every", every))
    )
    if not 0 <= begin < end:
        raise ValueError(
            f"gradual_density: begin={begin} and end={end} are not in order. Pass 0 <= begin < end."
        )
    if every < 1 or (end - begin) % every:
        raise ValueError(
            f"gradual_density: every={every} does not divide the {end - begin} steps from begin to "
            "end."
        )

    def density(step):
        changes = jnp.minimum(jnp.floor_divide(_since(begin, step), every), (end - begin) // every)
        left = 1.0 - jnp.asarray(changes, jnp.float32) * (every / (end - begin))
        return initial * left**3 + final * (1.0 - left**3)  # exact at both ends

    return density
