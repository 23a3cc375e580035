"""The methods of one-shot pruning, for a weight as a matrix and the inputs of its product."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsparse._plan.pattern import Pattern

__all__ = ["Moments", "diagonal_moments", "moments", "sparsegpt", "wanda"]

Matrix = Float[Array, "*stack M K"]
Mask = Bool[Array, "*stack M K"]


class Moments(NamedTuple):
    """The second moments of the inputs of a product, summed over rows.

    Attributes:
      sums: `[*stack, K, K]`, the sum of the outer products of rows; or `[*stack, K]`, its diagonal.
      rows: the number of rows.
    """

    sums: jax.Array
    rows: int

    def __add__(self, other: Any) -> "Moments":
        return Moments(self.sums + other.sums, self.rows + other.rows)


@jax.jit
def _outer(x):
    x = x.astype(jnp.float32)
    return jnp.einsum("...rk,...rl->...kl", x, x, precision=lax.Precision.HIGHEST)


@jax.jit
def _squares(x):
    return jnp.square(x.astype(jnp.float32)).sum(-2)


def moments(x: Float[Array, "*stack R K"]) -> Moments:
    """The second moments of the rows of x, in float32."""
    return Moments(_outer(x), x.shape[-2])


def diagonal_moments(x: Float[Array, "*stack R K"]) -> Moments:
    """The diagonal of the second moments of the rows of x, in float32."""
    return Moments(_squares(x), x.shape[-2])


def _masks(scores, pattern):
    """The mask of scores `[..., M, K]` under a pattern whose first axis is K and second M."""
    axes = (scores.ndim - 1, scores.ndim - 2)[: len(pattern.axes or ())]
    return pattern.masks([scores], [axes], magnitude=False, stack=tuple(range(scores.ndim - 2)))[0]


def wanda(w: Matrix, pattern: Pattern, inputs: Moments) -> tuple[Matrix, Mask]:
    """The weights of largest magnitude times the root mean square of their input."""
    return _wanda(w, pattern, inputs.sums / inputs.rows)


@functools.partial(jax.jit, static_argnums=1)
def _wanda(w, pattern, squares):
    scores = jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(squares)[..., None, :]
    mask = _masks(scores, pattern)
    return jnp.where(mask, w, jnp.zeros((), w.dtype)), mask


def sparsegpt(
    w: Matrix, pattern: Pattern, inputs: Moments, *, damping: float, block: int
) -> tuple[Matrix, Mask]:
    """The weights and mask of SparseGPT, which also updates the weights that stay.

    Columns are pruned from first to last. The error that each leaves in the output of the product
    is corrected by the columns after it, within a block at once and after it by one product.
    """
    width = pattern.groups[0][1] if pattern.groups else block
    return _sparsegpt(w, inputs.sums, pattern, damping, max(block // width, 1) * width, width)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _sparsegpt(w, sums, pattern, damping, block, width):
    run = functools.partial(_one, pattern=pattern, damping=damping, block=block, width=width)
    for _ in range(w.ndim - 2):
        run = jax.vmap(run)
    kept, mask = run(w.astype(jnp.float32), sums)
    return kept.astype(w.dtype), mask


def _one(w, sums, *, pattern, damping, block, width):
    """SparseGPT for one matrix `[M, K]`."""
    k = w.shape[1]
    diagonal = jnp.diagonal(sums)
    dead = diagonal == 0
    # of an input that is always 0, the weights do not matter
    w = jnp.where(dead[None], 0.0, w)
    sums = sums + jnp.diag(jnp.where(dead, 1.0, 0.0) + damping * diagonal.mean())
    # rows of the upper factor of the inverse tell how later columns correct an earlier one
    factor = jnp.linalg.cholesky(sums)
    identity = jnp.eye(k, dtype=w.dtype)
    inverse = jax.scipy.linalg.cho_solve((factor, True), identity)
    upper = jnp.linalg.cholesky(inverse).T

    columns = w.T  # so that a column is contiguous
    kept, masks = [], []
    for first in range(0, k, block):
        last = min(first + block, k)
        here, mask, errors = _block(
            columns[: last - first],
            upper[first:last, first:last],
            pattern,
            min(width, last - first),
        )
        kept.append(here)
        masks.append(mask)
        columns = columns[last - first :] - jnp.dot(
            upper[first:last, last:].T, errors, precision=lax.Precision.HIGHEST
        )
    return jnp.concatenate(kept).T, jnp.concatenate(masks).T


def _block(columns, upper, pattern, width):
    """Prunes the columns `[B, M]` of a block; returns them, their mask and their errors."""
    diagonal = jnp.diagonal(upper)

    def column(i, carry):
        columns, mask, errors = carry

        def chosen(mask):
            group = lax.dynamic_slice_in_dim(columns, i, width)
            scores = jnp.square(group / lax.dynamic_slice_in_dim(diagonal, i, width)[:, None])
            return lax.dynamic_update_slice_in_dim(mask, _masks(scores.T, pattern).T, i, 0)

        mask = lax.cond(i % width == 0, chosen, lambda mask: mask, mask)
        error = jnp.where(mask[i], 0.0, columns[i]) / diagonal[i]
        # the factor is upper triangular, so earlier columns stay
        return columns - upper[i][:, None] * error[None], mask, errors.at[i].set(error)

    start = columns, jnp.zeros(columns.shape, bool), jnp.zeros_like(columns)
    columns, mask, errors = lax.fori_loop(0, columns.shape[0], column, start)
    return jnp.where(mask, columns, 0.0), mask, errors
