"""How long weights remember: autocorrelation and decorrelation time."""

from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from jaxsparse import _checks

__all__ = ["autocorrelation", "decorrelation_by_magnitude", "decorrelation_time"]


def autocorrelation(series: Real[ArrayLike, " T *weights"]) -> Float[Array, " T-1 *weights"]:
    """The Pearson correlation of each weight's series with itself at every lag.

    At lag tau it compares `w[:T-tau]` with `w[tau:]`, each window about its own mean. The result is
    NaN where a window is constant or contains non-finite values. It is computed in float32, with
    memory for a few copies of `series` whatever the number of lags.

    Args:
      series: real array `[T, ...]` of T >= 2 samples in time, one series for each weight.

    Returns:
      float32 array `[T - 1, ...]`: the correlation at the lags 0, where it is 1, to T - 2, where
      windows hold two samples.

    Raises:
      TypeError: `series` is not an array of real numbers.
      ValueError: `series` has fewer than two samples.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.analysis.autocorrelation(jnp.array([0.0, 1.0, 0.0, -1.0, 0.0, 1.0]))[:3]
      Array([ 1.,  0., -1.], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 2.
    """
    return _autocorrelation(_checked(series, "autocorrelation"))


@jax.jit
def _autocorrelation(series):
    series = series.astype(jnp.float32)
    series = series - series[:1]
    # scaled so that squares neither underflow nor overflow; NaN where the series is constant
    series = series / jnp.abs(series).max(0, keepdims=True)
    steps = jnp.arange(len(series)).reshape(-1, *[1] * (series.ndim - 1))

    def correlation(lag):
        left = steps < len(series) - lag
        x, y = _centred(series, left), _centred(jnp.roll(series, -lag, axis=0), left)
        return jnp.clip((x * y).sum(0) / jnp.sqrt((x * x).sum(0) * (y * y).sum(0)), -1, 1)

    return jax.lax.map(correlation, jnp.arange(len(series) - 1))


def _centred(x, where):
    """`x` less its mean over the samples in `where`, 0 elsewhere; exactly 0 where constant."""
    x = jnp.where(where, x - x[:1], 0)
    count = where.sum(0, keepdims=True).astype(x.dtype)
    return jnp.where(where, x - x.sum(0, keepdims=True) / count, 0)


def decorrelation_time(series: Real[ArrayLike, " T *weights"]) -> Float[Array, " *weights"]:
    """Delta: the first lag at which the autocorrelation of each weight's series is 0 or below.

    A lag also counts if one of its two windows is constant and the other is not, as for a weight
    that is 0 from some step on.

    Args:
      series: real array `[T, ...]` of T >= 2 samples in time, one series for each weight.

    Returns:
      float32 array `[...]`, in samples; T where the autocorrelation never reaches 0, NaN where the
      series is constant or not finite. Divided by T it is the paper's fraction of training.

    Raises:
      TypeError: `series` is not an array of real numbers.
      ValueError: `series` has fewer than two samples.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> steps = jnp.arange(100.0)
      >>> js.analysis.decorrelation_time(jnp.stack([steps, jnp.sin(steps / 10), 0 * steps], 1))
      Array([100.,  17.,  nan], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 2.
    """
    samples = _checked(series, "decorrelation_time")
    rho = _autocorrelation(samples)
    decorrelated = ~(rho > 0)  # rho is NaN where one of the two windows is constant
    first = jnp.where(decorrelated.any(0), decorrelated.argmax(0), len(samples)).astype(jnp.float32)
    return jnp.where(jnp.isnan(rho[0]), jnp.nan, first)


def decorrelation_by_magnitude(
    series: Real[ArrayLike, " T *weights"], bins: SupportsIndex = 10
) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Groups weights by final magnitude and computes the median Delta of each group.

    Weights are sorted by the magnitude of their last sample into bins of equal size; if the number
    of bins does not divide that of weights, the first bins hold one more. Series whose Delta is
    undefined are left out of the median.

    Args:
      series: real array `[T, ...]` of T >= 2 samples in time, one series for each weight.
      bins: the number of bins, at most the number of weights.

    Returns:
      Two float32 arrays `[bins]`: the median final magnitude of each bin, ascending, and its median
      Delta as a fraction of the T samples, NaN where Delta is undefined for the whole bin.

    Raises:
      TypeError: `series` is not an array of real numbers, or `bins` is not an integer.
      ValueError: `series` has fewer than two samples, or `bins` is not between 1 and the number of
        weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> steps = jnp.arange(100.0)
      >>> js.analysis.decorrelation_by_magnitude(jnp.stack([steps, jnp.cos(steps)], 1), bins=2)[1]
      Array([0.02, 1.  ], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 2, figure 1.
    """
    samples = _checked(series, "decorrelation_by_magnitude")
    samples = samples.reshape(len(samples), -1)
    count = _checks.integer(bins, "decorrelation_by_magnitude: `bins`")
    if not 1 <= count <= samples.shape[1]:
        raise ValueError(
            f"decorrelation_by_magnitude: bins={count} is not in 1..{samples.shape[1]}, the number "
            "of weights."
        )
    magnitude = jnp.abs(samples[-1].astype(jnp.float32))
    order = jnp.argsort(magnitude)
    delta = decorrelation_time(samples) / len(samples)
    columns = (magnitude, jnp.median), (delta, jnp.nanmedian)
    magnitudes, deltas = (
        jnp.stack([middle(part) for part in jnp.array_split(x[order], count)])
        for x, middle in columns
    )
    return magnitudes, deltas


def _checked(series, call):
    series = _checks.array(series, f"{call}: `series`")
    if not (
        jnp.issubdtype(series.dtype, jnp.floating) or jnp.issubdtype(series.dtype, jnp.integer)
    ):
        raise TypeError(f"{call}: `series` is {series.dtype}. Pass real numbers.")
    if series.ndim < 1 or len(series) < 2:
        raise ValueError(
            f"{call}: `series` has shape {series.shape}. Pass two or more samples in time along "
            "the first axis."
        )
    return series
