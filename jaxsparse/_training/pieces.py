"""Optax transformations for non-participating weights, for use inside `rewire`.

Order matters. `scale_nonparticipating` and `add_decayed_nonparticipating` act on gradients, before
the optimizer; `decay_nonparticipating`, `reset_nonparticipating` and `fix_nonparticipating` act on
updates, after it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _checks
from jaxsparse._masks.ranking import common_dtype
from jaxsparse._plan.paths import by_path
from jaxsparse._training.forward import map_masked

__all__ = [
    "add_decayed_nonparticipating",
    "decay_nonparticipating",
    "fix_nonparticipating",
    "reset_nonparticipating",
    "scale_nonparticipating",
]


def scale_nonparticipating(s: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient of non-participating weights by `s`; place it before the optimizer.

    Args:
      s: the factor; 1 leaves the gradient dense. In the paper, the error grows as it falls to 0.

    Returns:
      A transformation without state. Its `update` needs the extra argument `masks`, which `rewire`
      provides.

    Raises:
      ValueError: `s` is below 0 or not finite; in `update`, there are no masks, or they were made
        for other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.scale_nonparticipating(0.5)
      >>> tx.update(jnp.ones(2), tx.init(None), masks=jnp.array([True, False]))[0]
      Array([1. , 0.5], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 3.2.
    """
    _checks.factor("scale_nonparticipating", "s", s)

    def scaled(g):
        return g * jnp.asarray(s, g.dtype)

    return _stateless("scale_nonparticipating", scaled)


def add_decayed_nonparticipating(
    weight_decay: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """Adds `weight_decay * w` to the gradient of non-participating weights, as SR-STE does.

    This pulls them towards zero. Place it before the optimizer.

    Args:
      weight_decay: `lambda` in the paper, which uses 2e-4.

    Returns:
      A transformation without state. Its `update` needs `params` and the extra argument `masks`,
      which `rewire` provides.

    Raises:
      ValueError: `weight_decay` is below 0 or not finite; in `update`, the masks or `params` are
        missing, or do not match the updates.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.add_decayed_nonparticipating(2e-4)
      >>> w, mask = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([False, False, True, True])
      >>> tx.update(jnp.full(4, 10.0), tx.init(w), w, masks=mask)[0]
      Array([10.0002, 10.0004, 10.    , 10.    ], dtype=float32)

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
      (arXiv:2102.04010).
    """
    _checks.factor("add_decayed_nonparticipating", "weight_decay", weight_decay)

    def pulled(g, w):
        dtype = common_dtype(g.dtype, w.dtype)
        pull = jnp.asarray(weight_decay, dtype) * w.astype(dtype)
        return (g.astype(dtype) + pull).astype(g.dtype)

    return _stateless("add_decayed_nonparticipating", pulled, needs_params=True)


def decay_nonparticipating(
    weight_decay: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks updated non-participating weights by `1 - weight_decay` (REGULARIZE).

    Place it after the optimizer.

    Args:
      weight_decay: the fraction that they lose in each step; the paper uses 2e-4.

    Returns:
      A transformation without state. Its `update` needs `params` and the extra argument `masks`,
      which `rewire` provides.

    Raises:
      ValueError: `weight_decay` is not in [0, 1]; in `update`, the masks or `params` are missing,
        or do not match the updates.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.decay_nonparticipating(0.25)
      >>> w, mask = jnp.array([4.0, 4.0]), jnp.array([True, False])
      >>> w + tx.update(jnp.zeros(2), tx.init(w), w, masks=mask)[0]
      Array([4., 3.], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, line 11.
    """
    _checks.factor("decay_nonparticipating", "weight_decay", weight_decay, most=1)

    def shrunk(u, w):
        dtype = common_dtype(u.dtype, w.dtype)
        wide = u.astype(dtype)
        lost = jnp.asarray(weight_decay, dtype) * (w.astype(dtype) + wide)
        return (wide - lost).astype(u.dtype)

    return _stateless("decay_nonparticipating", shrunk, needs_params=True)


class ResetState(NamedTuple):
    """The state of `reset_nonparticipating` and `fix_nonparticipating`.

    Attributes:
      count: the number of updates so far, int32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]


def reset_nonparticipating(every: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Sets non-participating weights to 0 at every step that is a multiple of `every` (RESET).

    Place it after the optimizer. Steps count from 0, so the first update resets too, as in
    Algorithm 1. Updates keep their dtype: if it is narrower than that of the weights, a weight is
    reset up to rounding.

    Args:
      every: the steps between two resets (`z` in the paper, about 1000); 1 trains without rewiring.

    Returns:
      A transformation that counts its updates. Its `update` needs `params` and the extra argument
      `masks`, which `rewire` provides.

    Raises:
      ValueError: `every` is below 1; in `update`, the masks or `params` are missing, or do not
        match the updates.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.reset_nonparticipating(1000)
      >>> w, mask = jnp.array([4.0, 4.0]), jnp.array([True, False])
      >>> w + tx.update(jnp.ones(2), tx.init(w), w, masks=mask)[0]
      Array([5., 0.], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 3.3 and Algorithm 1, line 10.
    """
    _checks.steps("reset_nonparticipating", "every", every)
    return _zeroing("reset_nonparticipating", lambda count: count % every == 0)


def fix_nonparticipating(after: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Holds non-participating weights at exactly 0 from step `after` on (FIX).

    Place it after the optimizer. Updates keep their dtype, as in `reset_nonparticipating`. Rewiring
    must stop at the same step, `rewire(..., until=after)`, as in
    `recipes.explore_exploit(fix_after=...)`.

    Args:
      after: the first step that holds them at 0 (`v` in the paper: half of training).

    Returns:
      A transformation that counts its updates. Its `update` needs `params` and the extra argument
      `masks`, which `rewire` provides.

    Raises:
      ValueError: `after` is below 0; in `update`, the masks or `params` are missing, or do not
        match the updates.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.fix_nonparticipating(0)
      >>> w, mask = jnp.array([4.0, 4.0]), jnp.array([True, False])
      >>> w + tx.update(jnp.ones(2), tx.init(w), w, masks=mask)[0]
      Array([5., 0.], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 3.3 and Algorithm 1, line 9.
    """
    _checks.steps("fix_nonparticipating", "after", after, least=0)
    return _zeroing("fix_nonparticipating", lambda count: count >= after)


def _on_nonparticipating(call, f, updates, params, masks, needs_params):
    if masks is None:
        raise ValueError(
            f"{call}: there are no masks. Wrap the chain in jaxsparse.rewire, which passes them. "
            "optax.MultiSteps must go outside of rewire, since it drops them."
        )
    if needs_params and params is None:
        raise ValueError(f"{call}: `params` is missing. Call update(grads, opt_state, params).")
    if needs_params:
        _check_alike(call, updates, params)

    def masked_update(path, mask, u, *w):
        return jnp.where(mask, u, f(u, *w))

    rest = (params,) if needs_params else ()
    return map_masked(masked_update, masks, updates, *rest, call=call, partial=True)


def _check_alike(call, updates, params):
    update_leaves, param_leaves = by_path(updates), by_path(params)
    for path in (*param_leaves, *update_leaves):
        shapes = [
            jnp.shape(tree[path]) if path in tree else None
            for tree in (update_leaves, param_leaves)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{call}: {path} has shape {shapes[0]} in the updates, but {shapes[1]} in "
                "`params`. Pass the parameters that the gradients were computed for."
            )


def _stateless(call, f, needs_params=False):
    def update(updates, state, params=None, *, masks=None, **extra_args):
        del extra_args
        return _on_nonparticipating(call, f, updates, params, masks, needs_params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _zeroing(call, when):
    def init(params):
        del params
        return ResetState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, masks=None, **extra_args):
        del extra_args
        due = when(state.count)

        def zeroed(u, w):
            return jnp.where(due, (-w).astype(u.dtype), u)

        updates = _on_nonparticipating(call, zeroed, updates, params, masks, needs_params=True)
        return updates, ResetState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
