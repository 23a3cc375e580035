"""Optax transformations that treat non-participating weights in their own way, for the chain inside
`rewire`.

Order matters: `scale_nonparticipating` and `add_decayed_nonparticipating` act on gradients, before
the optimizer; `decay_nonparticipating`, `reset_nonparticipating` and `fix_nonparticipating` act on
updates, after it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._plan.plan import leaf_paths
from jaxsparse._training.forward import masks_by_path
from jaxsparse._training.rewire import _check_steps

__all__ = [
    "add_decayed_nonparticipating",
    "decay_nonparticipating",
    "fix_nonparticipating",
    "reset_nonparticipating",
    "scale_nonparticipating",
]


def scale_nonparticipating(s: float) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient of non-participating weights by `s`; place it before the optimizer.

    Args:
      s: the factor, 1 for the dense gradient. The paper finds that error grows as it falls to 0.

    Returns:
      A transformation without state. Its `update` needs the extra argument `masks`, which `rewire`
      provides.

    Raises:
      ValueError: `s` is below 0 or not finite; in `update`, there are no masks, or they are of
        other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.scale_nonparticipating(0.5)
      >>> tx.update(jnp.ones(2), tx.init(None), masks=jnp.array([True, False]))[0]
      Array([1. , 0.5], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, section 3.2.
    """
    _check_factor("scale_nonparticipating", s=s)
    return _stateless("scale_nonparticipating", lambda g, w: (g * s).astype(g.dtype))


def add_decayed_nonparticipating(decay: float) -> optax.GradientTransformationExtraArgs:
    """Adds `decay * w` to the gradient of non-participating weights, which pulls them towards zero;
    place it before the optimizer.

    Args:
      decay: `lambda` in the paper, which uses 2e-4.

    Returns:
      A transformation without state. Its `update` needs `params` and the extra argument `masks`,
      which `rewire` provides.

    Raises:
      ValueError: `decay` is below 0 or not finite; in `update`, there are no masks or no
        parameters, or they do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> tx = js.add_decayed_nonparticipating(2e-4)
      >>> w, mask = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([False, False, True, True])
      >>> tx.update(jnp.full(4, 10.0), tx.init(w), w, masks=mask)[0]
      Array([10.0002, 10.0004, 10.    , 10.    ], dtype=float32)

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch.
    """
    _check_factor("add_decayed_nonparticipating", decay=decay)
    return _stateless(
        "add_decayed_nonparticipating",
        lambda g, w: (g + decay * w).astype(g.dtype),
        needs_params=True,
    )


def decay_nonparticipating(beta: float) -> optax.GradientTransformationExtraArgs:
    """Shrinks updated non-participating weights by the factor `1 - beta` (REGULARIZE); place it
    after the optimizer.

    Args:
      beta: what they lose each step; the paper uses 2e-4.

    Returns:
      A transformation without state. Its `update` needs `params` and the extra argument `masks`,
      which `rewire` provides.

    Raises:
      ValueError: `beta` is not in [0, 1]; in `update`, there are no masks or no parameters, or they
        do not belong together.

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
    _check_factor("decay_nonparticipating", most=1, beta=beta)
    return _stateless(
        "decay_nonparticipating",
        lambda u, w: (u - beta * (w + u)).astype(u.dtype),
        needs_params=True,
    )


class ResetState(NamedTuple):
    """The state of `reset_nonparticipating` and `fix_nonparticipating`: updates so far, an int32
    scalar.
    """

    count: jax.Array  # type: ignore[assignment]


def reset_nonparticipating(every: int) -> optax.GradientTransformationExtraArgs:
    """Sets non-participating weights to exactly 0 at every step t that is a multiple of `every`
    (RESET); place it after the optimizer.

    Steps count from 0, so the first update resets too, as Algorithm 1 writes it.

    Args:
      every: the steps between two resets (`z` in the paper, about 1000); 1 trains without rewiring.

    Returns:
      A transformation that counts its updates. Its `update` needs `params` and the extra argument
      `masks`, which `rewire` provides.

    Raises:
      ValueError: `every` is below 1; in `update`, there are no masks or no parameters, or they do
        not belong together.

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
    _check_steps("reset_nonparticipating", every=every)
    return _zeroing("reset_nonparticipating", lambda count: count % every == 0)


def fix_nonparticipating(after: int) -> optax.GradientTransformationExtraArgs:
    """Holds non-participating weights at exactly 0 from step `after` on (FIX); place it after the
    optimizer.

    Rewiring must stop at the same step: `rewire(..., until=after)`, as
    `recipes.explore_exploit(fix_after=...)` does.

    Args:
      after: the first step that holds them at 0 (`v` in the paper: half of training).

    Returns:
      A transformation that counts its updates. Its `update` needs `params` and the extra argument
      `masks`, which `rewire` provides.

    Raises:
      ValueError: `after` is below 0; in `update`, there are no masks or no parameters, or they do
        not belong together.

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
    _check_steps("fix_nonparticipating", after=after, least=0)
    return _zeroing("fix_nonparticipating", lambda count: count >= after)


def _check_factor(call, *, most=math.inf, **factors):
    ((name, value),) = factors.items()
    if isinstance(value, jax.Array):  # as optax.inject_hyperparams passes it
        return
    if not 0 <= value <= most or math.isinf(value):
        raise ValueError(
            f"{call}: {name}={value} is not in [0, {most}{']' if most == 1 else ')'}. Pass a "
            "number that is."
        )


def _on_nonparticipating(call, f, updates, params, masks, needs_params):
    if masks is None:
        raise ValueError(
            f"{call}: there are no masks. Wrap the chain in jaxsparse.rewire, which passes them to "
            "it; optax.MultiSteps between the two would drop them and belongs outside."
        )
    if needs_params and params is None:
        raise ValueError(f"{call}: `params` is missing. Call update(grads, opt_state, params).")

    leaves, treedef = jax.tree.flatten(updates)
    if needs_params:
        _check_alike(call, updates, params)
    weights = jax.tree.leaves(params) if needs_params else leaves
    masks = masks_by_path(masks, updates, call, partial=True)
    new = (
        u if mask is None else jnp.where(mask, u, f(u, w))
        for u, w, mask in zip(leaves, weights, masks, strict=True)
    )
    return jax.tree.unflatten(treedef, new)


def _check_alike(call, updates, params):
    shapes, wanted = (
        dict(zip(leaf_paths(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))
        for tree in (updates, params)
    )
    for path in (*wanted, *shapes):
        if shapes.get(path) != wanted.get(path):
            raise ValueError(
                f"{call}: {path} has shape {shapes.get(path)} in the updates, but "
                f"{wanted.get(path)} in `params`. Pass the parameters that the gradients were "
                "taken of."
            )


def _stateless(call, f, needs_params=False):
    def update(updates, state, params=None, *, masks=None, **extra_args):
        del extra_args
        return _on_nonparticipating(call, f, updates, params, masks, needs_params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _zeroing(call, when):
    def update(updates, state, params=None, *, masks=None, **extra_args):
        del extra_args
        due = when(state.count)
        # in the wider of both dtypes: -w rounded to a narrow update would not give exactly 0
        zero = lambda u, w: jnp.where(due, -w.astype(jnp.promote_types(u.dtype, w.dtype)), u)  # noqa: E731
        updates = _on_nonparticipating(call, zero, updates, params, masks, needs_params=True)
        return updates, ResetState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(
        lambda params: ResetState(jnp.zeros((), jnp.int32)), update
    )
