"""Scores, which masks rank: computed from a leaf's weights and, for some, its gradient."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._masks.ranking import wide

__all__ = ["SCORES", "Score", "as_score", "diagonal_fisher", "random_score", "running_mean"]


@dataclasses.dataclass(frozen=True)
class Score:
    """The importance of each weight, which masks rank: the highest scores participate.

    Args:
      rank: a function of a leaf's path and weights, and of its gradient if `needs_gradient`, that
        returns scores of the weights' shape. It receives the leaf's part of each of `extra_args`,
        and its state as `state`, as keyword arguments.
      needs_gradient: whether `rank` and `observe` take the gradient.
      extra_args: the names of the extra arguments of `update` that it takes, pytrees of the
        structure of the parameters, as in `update(grads, opt_state, params, fisher=...)`.
      init: a function of a leaf's path and weights that returns the initial state of the score for
        the leaf; None if it keeps no state.
      observe: a function of a leaf's path, its state and the arguments of `rank` that returns the
        new state; called at every update.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> away_from_zero = js.Score(lambda path, w: jnp.abs(w))
      >>> squared_gradient = js.Score(lambda path, w, g: g**2, needs_gradient=True)
      >>> renew = js.by_score(squared_gradient)

    References:
      Hoefler et al., Sparsity in Deep Learning, sections 3.2 to 3.5 (arXiv:2102.00554).
    """

    rank: Callable[..., jax.Array]
    needs_gradient: bool = False
    extra_args: tuple[str, ...] = ()
    init: Callable[..., Any] | None = None
    observe: Callable[..., Any] | None = None


def random_score(seed: int) -> Score:
    """Random scores that are the same at every step: a fixed random mask, as a control.

    Args:
      seed: the seed of the mask.

    Returns:
      A score for `by_score`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.random_score(0).rank("encoder/kernel", jnp.zeros((8, 2))).shape
      (8, 2)

    References:
      Hoefler et al., Sparsity in Deep Learning, section 3.2, where random selection is the control
      (arXiv:2102.00554).
    """
    return Score(functools.partial(_random, seed))


def running_mean(score: Score, decay: float) -> Score:
    """The exponential running mean of a score, kept in the state of `rewire`.

    Args:
      score: a score without a state of its own.
      decay: the share of the mean that stays at each update, in [0, 1).

    Returns:
      A score for `by_score`.

    Raises:
      ValueError: `decay` is not in [0, 1), or `score` keeps a state.

    Example:
      >>> import jaxsparse as js
      >>> squared_gradient = js.Score(lambda path, w, g: g**2, needs_gradient=True)
      >>> renew = js.by_score(js.running_mean(squared_gradient, 0.99))
    """
    if not 0 <= decay < 1:
        raise ValueError(f"running_mean: decay={decay} is not in [0, 1). Pass one in this range.")
    if score.init is not None:
        raise ValueError("running_mean: `score` keeps its own state. Pass one that does not.")

    def init(path, w):
        return jnp.zeros(jnp.shape(w), jnp.float32)

    def observe(path, state, *args, **kwargs):
        return decay * state + (1 - decay) * score.rank(path, *args, **kwargs).astype(jnp.float32)

    def rank(path, *args, state, **kwargs):
        return state

    return Score(rank, score.needs_gradient, score.extra_args, init, observe)


def diagonal_fisher(loss: Callable[..., jax.Array], params: PyTree, *batch: Any) -> Any:
    """The diagonal of the empirical Fisher information: the mean of squared per-example gradients.

    It is not the square of the mean gradient, which vanishes when training has converged. Examples
    are processed one by one, so it needs the memory of one gradient. For `by_score("fisher")`, pass
    it to `update(..., fisher=...)`.

    Args:
      loss: function of (params, *example) that returns the scalar loss of one example.
      params: pytree of weights.
      *batch: pytrees of arrays whose leading axis runs over the examples.

    Returns:
      A pytree of the structure of `params`, in float32 where the weights are narrower.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> loss = lambda w, x: w * x
      >>> float(js.diagonal_fisher(loss, jnp.array(2.0), jnp.array([1.0, -3.0])))
      5.0

    References:
      Hoefler et al., Sparsity in Deep Learning, section 3.5 (arXiv:2102.00554).
    """

    def add(total, example):
        gradient = jax.grad(loss)(params, *example)
        return jax.tree.map(lambda t, g: t + wide(g) ** 2, total, gradient), None

    total = jax.tree.map(lambda w: jnp.zeros_like(wide(w)), params)
    total, _ = jax.lax.scan(add, total, batch)
    count = jax.tree.leaves(batch)[0].shape[0]
    return jax.tree.map(lambda t: t / count, total)


def _random(seed, path, w):
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    return jax.random.uniform(key, w.shape)


def _magnitude(path, w):
    return jnp.abs(wide(w))


def _first_order(path, w, g):
    return jnp.abs(wide(w) * wide(g))


def _fisher(path, w, *, fisher):
    return wide(w) ** 2 * wide(fisher)


SCORES = {
    "magnitude": Score(_magnitude),
    "first_order": Score(_first_order, needs_gradient=True),
    "fisher": Score(_fisher, extra_args=("fisher",)),
    "random": random_score(0),
}


def as_score(score: str | Score, call: str) -> Score:
    """Looks up a score by its name; a score passes through."""
    if isinstance(score, Score):
        return score
    if isinstance(score, str) and score in SCORES:
        return SCORES[score]
    what = f"there is no score {score!r}" if isinstance(score, str) else f"`score` is {score!r}"
    raise (ValueError if isinstance(score, str) else TypeError)(
        f"{call}: {what}. Pass one of {tuple(SCORES)}, or a jaxsparse.Score."
    )
