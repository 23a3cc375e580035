"""The stages of structure decay, which tighten an N:M pattern."""

from jaxsparse import _checks

__all__ = ["geometric_stages", "stepwise_stages"]


def stepwise_stages(n: int, m: int) -> tuple[tuple[int, int], ...]:
    """The stages of SDGF-Stepwise: one of m weights dropped, then half of m kept, ..., `n:m`.

    Args:
      n: how many of each group the last stage keeps, `1 <= n <= m`.
      m: the group length, the same in all stages.

    Returns:
      The stages in order, each `(n, m)`; the last is `(n, m)` itself.

    Raises:
      TypeError: an argument is not an integer.
      ValueError: `n` is not in `1..m`.

    Example:
      >>> import jaxsparse as js
      >>> js.stepwise_stages(1, 8)
      ((7, 8), (4, 8), (2, 8), (1, 8))

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3 (arXiv:2402.04744).
    """
    n, m = _checks.counts("stepwise_stages", n, m)
    kept, stages = m // 2, [(m - 1, m)] if n < m - 1 else []
    while kept > n:
        stages.append((kept, m))
        kept //= 2
    return (*stages, (n, m))


def geometric_stages(n: int, m: int, k: int = 16) -> tuple[tuple[int, int], ...]:
    """The stages of SDGF-Geometric: equal density in groups that halve, `(k*n):(k*m)` to `n:m`.

    Args:
      n: how many of each group the last stage keeps, `1 <= n <= m`.
      m: the group length of the last stage.
      k: the ratio of the first group length to the last, a power of two; there are `log2(k) + 1`
        stages.

    Returns:
      The stages in order, each `(n, m)`; the last is `(n, m)` itself.

    Raises:
      TypeError: an argument is not an integer.
      ValueError: `n` is not in `1..m`, or `k` is not a power of two.

    Example:
      >>> import jaxsparse as js
      >>> js.geometric_stages(1, 8)
      ((16, 128), (8, 64), (4, 32), (2, 16), (1, 8))

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      section 3 (arXiv:2402.04744).
    """
    n, m = _checks.counts("geometric_stages", n, m)
    if _checks.integer(k, "geometric_stages: `k`") < 1 or k & (k - 1):
        raise ValueError(
            f"geometric_stages: k={k} is not a power of two. The group length halves from "
            f"k*m={k * m} to m={m}."
        )
    return tuple((n << i, m << i) for i in reversed(range(k.bit_length())))
