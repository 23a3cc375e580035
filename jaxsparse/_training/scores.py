"""What masks rank: scores of a leaf's path, its weights and their gradient."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse._masks.ranking import wide
from jaxsparse._plan.plan import Plan, leaf_paths

__all__ = ["Score", "as_score", "diagonal_fisher", "random_score", "score_tree"]

Score = Callable[[str, jax.Array, jax.Array], jax.Array]


def random_score(seed: int) -> Score:
    """Scores that say nothing, the same at every step: a random mask that stays, as a control.

    Args:
      seed: another seed gives another mask.

    Returns:
      A function of (path, weights, gradient) for the argument `score` of `rewire` and the recipes.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> js.random_score(0)("encoder/kernel", jnp.zeros((8, 2)), None).shape
      (8, 2)

    References:
      Hoefler et al., Sparsity in Deep Learning, section 3.2, where random selection is the control.
    """

    def score(path, w, g):
        del g
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return jax.random.uniform(key, w.shape)

    return score


def diagonal_fisher(loss: Callable[..., jax.Array], params, *batch):
    """The diagonal of the empirical Fisher information: the mean over examples of their squared
    gradients.

    Not the square of the mean gradient, which vanishes where training has converged. Goes through
    the examples one by one, so that it takes the memory of one gradient. For `score="fisher"`, pass
    it to `update(..., fisher=...)`.

    Args:
      loss: function of (params, *example) to the scalar loss of one example.
      params: pytree of weights.
      *batch: pytrees of arrays whose leading axis runs over the examples.

    Returns:
      A pytree of the structure of `params`, in float32 where these are narrower.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> float(js.diagonal_fisher(lambda w, x: w * x, jnp.array(2.0), jnp.array([1.0, -3.0])))
      5.0

    References:
      Hoefler et al., Sparsity in Deep Learning, section 3.5.
    """

    def add(total, example):
        return jax.tree.map(
            lambda t, g: t + wide(g) ** 2, total, jax.grad(loss)(params, *example)
        ), None

    total, _ = jax.lax.scan(add, jax.tree.map(lambda w: jnp.zeros_like(wide(w)), params), batch)
    count = jax.tree.leaves(batch)[0].shape[0]
    return jax.tree.map(lambda t: t / count, total)


def _first_order(path, w, g):
    del path
    return jnp.abs(wide(w) * wide(g))


def _fisher(path, w, fisher):
    del path
    return wide(w) ** 2 * wide(fisher)


NAMED: dict[str, Score | None] = {
    "magnitude": None,
    "first_order": _first_order,
    "fisher": _fisher,
    "random": random_score(0),
}
BY_GRADIENT = ("first_order", "fisher")


def as_score(score: str | Score, call: str) -> Score | None:
    """The function of a named score; None for magnitude, whose masks need no scores; TypeError or
    ValueError if it is none.
    """
    if isinstance(score, str):
        if score not in NAMED:
            raise ValueError(
                f"{call}: there is no score {score!r}. Pass one of {tuple(NAMED)}, or a function "
                "of (path, weights, gradient)."
            )
        return NAMED[score]
    if not callable(score):
        raise TypeError(
            f"{call}: `score` is {score!r}. Pass one of {tuple(NAMED)}, or a function of (path, "
            "weights, gradient)."
        )
    return score


def score_tree(score: Score, params, gradients, plan: Plan, call: str):
    """The scores of the sparse leaves; dense leaves stay as they are."""
    leaves, treedef = jax.tree.flatten(params)

    def one(path, w, g):
        if path not in plan.sparse:
            return w
        found = score(path, w, g)
        if jnp.shape(found) != jnp.shape(w):
            raise ValueError(
                f"{call}: the score of {path} has shape {jnp.shape(found)}, but its weights have "
                f"{jnp.shape(w)}. Score each weight."
            )
        return found

    scored = [
        one(*each)
        for each in zip(leaf_paths(params), leaves, jax.tree.leaves(gradients), strict=True)
    ]
    return jax.tree.unflatten(treedef, scored)
