"""An optimizer wrapper that records, in bounded memory, how weights, masks and gradients evolve."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxsparse import _checks
from jaxsparse._analysis.metrics import mask_density, retained_magnitude, second_moments
from jaxsparse._plan.paths import by_path
from jaxsparse._plan.plan import Leaf, Plan, check_plan, match
from jaxsparse._training.state import is_placeholder, mask_words, unpack_mask

__all__ = ["RecordState", "Recordings", "record", "recordings"]


class Recordings(NamedTuple):
    """What `record` keeps: S samples in time.

    All fields except `steps` map the path of a sparse leaf to an array whose first axis is time.

    Attributes:
      steps: int32 `[S]`, the number of updates before each sample.
      weights: float32 `[S, K]`, the same K weights of the leaf at each sample.
      gradient_variance: float32 `[S]`, the variance of the last update's gradient, as `update`
        received it.
      second_moment_variance: float32 `[S]`, the variance of Adam's second moment; empty if the
        optimizer has none.
      density: float32 `[S]`, the fraction of weights that participate; empty without masks.
      retained_magnitude: float32 `[S]`, the participating share of the magnitude; empty without
        masks.
      churn: float32 `[S]`, the number of mask changes since the previous sample, per weight of the
        leaf. Divided by the number of rewirings in between, it is their mean `mask_churn`. Empty
        without masks.
    """

    steps: jax.Array
    weights: dict[str, jax.Array]
    gradient_variance: dict[str, jax.Array]
    second_moment_variance: dict[str, jax.Array]
    density: dict[str, jax.Array]
    retained_magnitude: dict[str, jax.Array]
    churn: dict[str, jax.Array]


class RecordState(NamedTuple):
    """The state of `record`.

    Attributes:
      count: the number of updates so far, int32 scalar.
      churn: for each masked leaf, by path, the number of mask changes since the last sample, per
        weight, float32 scalars.
      steps: int32 `[S]`, the number of updates before each sample; 0 for samples to come.
      samples: for each recorded leaf, by path, the fields of `Recordings` by name; 0 for samples to
        come.
      inner_state: the state of the wrapped transformation.
    """

    count: jax.Array  # type: ignore[assignment]
    churn: dict[str, jax.Array]
    steps: jax.Array
    samples: dict[str, dict[str, jax.Array]]
    inner_state: optax.OptState


def record(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    total_steps: int,
    samples: int = 512,
    weights: int = 256,
) -> optax.GradientTransformationExtraArgs:
    """Records the sparse leaves of a plan while `inner` trains; updates pass through unchanged.

    Wrap it around `rewire` or a recipe: it then sees the gradients, the masks before and after, the
    optimizer's moments and the updated weights. Around a plain optimizer it records a dense run for
    comparison. `optax.MultiSteps` belongs outside of it. Samples are `ceil(total_steps / samples)`
    updates apart and show the state after an update; in between, an update only compares masks, at
    one bit a weight. All buffers have a fixed size, so it works under `jit`, `lax.scan` and
    donation, is checkpointed with the optimizer, and never recompiles.

    Args:
      inner: the transformation to record.
      plan: its sparse leaves are recorded.
      total_steps: the number of updates to record; later ones are not recorded.
      samples: the largest number of samples in time.
      weights: how many weights of each leaf to follow, the same ones in every run; all of a leaf
        that has fewer.

    Returns:
      A transformation with state `RecordState`, which `recordings` reads. Its `update` needs
      `params`.

    Raises:
      TypeError: `plan` is not a plan, or a number is not an integer; in `update`, the state was not
        created by `record`.
      ValueError: no leaf of the plan is sparse, or a number is below 1; in `init` and `update`, the
        parameters or their gradients do not match the plan; in `update`, `params` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.recipes.explore_exploit(optax.adamw(1e-3), plan)
      >>> tx = js.analysis.record(tx, plan, total_steps=100, samples=50)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     _, state = tx.update({"w": jnp.ones(4)}, state, params)
      >>> js.analysis.recordings(state).steps
      array([2, 4], dtype=int32)

    References:
      Advances in Sparse Neural Model Training, section 2, for the weights; Bambhaniya et al.,
      Progressive Gradient Flow, section 4, for the variances (arXiv:2402.04744).
    """
    check_plan("record", plan)
    if not plan.sparse:
        raise ValueError(f"record: the plan keeps every leaf dense:\n{plan}")
    for name, value in {"total_steps": total_steps, "samples": samples, "weights": weights}.items():
        if _checks.integer(value, f"record: `{name}`") < 1:
            raise ValueError(f"record: {name}={value} is below 1. Pass 1 or more.")
    inner = optax.with_extra_args_support(inner)
    stride = math.ceil(total_steps / samples)
    length = total_steps // stride
    places = {path: _places(leaf, weights) for path, leaf in plan.sparse.items()}

    def samplers(params, gradients, churn, inner_state):
        """Maps every recorded leaf to the function that takes its sample."""
        known = (
            by_path(params),
            by_path(gradients),
            second_moments(inner_state),
            mask_words(inner_state),
            churn,
        )
        return {
            path: functools.partial(_sample, place, path, *(values.get(path) for values in known))
            for path, place in places.items()
        }

    def init(params):
        if is_placeholder(params):  # called by optax.tree_utils.tree_map_params
            zero = jnp.zeros((), jnp.int32)
            return RecordState(zero, zero, zero, zero, inner.init(params))  # type: ignore[arg-type]
        match(plan, params, "record")
        inner_state = inner.init(params)
        churn = {
            path: jnp.zeros((), jnp.float32) for path in mask_words(inner_state) if path in places
        }
        one = {
            path: jax.eval_shape(take)
            for path, take in samplers(params, params, churn, inner_state).items()
        }
        empty = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), one)
        return RecordState(
            jnp.zeros((), jnp.int32), churn, jnp.zeros(length, jnp.int32), empty, inner_state
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "record: `params` is missing, but weights are recorded. Call update(grads, "
                "opt_state, params)."
            )
        if not isinstance(state, RecordState):
            raise TypeError(
                f"record: this {type(state).__name__} is not a RecordState. Pass the optimizer "
                "state that init returned."
            )
        match(plan, params, "record")
        match(plan, updates, "record", "gradients")
        gradients = updates
        updates, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        old, new = mask_words(state.inner_state), mask_words(inner_state)
        churn = {
            path: before + _flips(old[path], new[path]) for path, before in state.churn.items()
        }
        due = (count % stride == 0) & (count <= total_steps)
        row = (count - 1) // stride % length

        # updates one row in place; a cond over the buffers would copy them at every step
        def write(buffer, x):
            return jax.lax.dynamic_update_index_in_dim(
                buffer, jnp.where(due, x, buffer[row]), row, 0
            )

        new_samples = {}
        with jax.numpy_dtype_promotion("standard"):  # as optax adds, whatever the dtypes
            updated = optax.apply_updates(params, updates)
        for path, take in samplers(updated, gradients, churn, inner_state).items():
            none = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), state.samples[path])
            # one cond for each leaf, so that their temporary arrays do not coexist
            new_samples[path] = jax.lax.cond(due, take, lambda none=none: none)
        steps, buffers = jax.tree.map(write, (state.steps, state.samples), (count, new_samples))
        churn = jax.tree.map(lambda x: jnp.where(due, 0, x), churn)
        return updates, RecordState(count, churn, steps, buffers, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def recordings(opt_state: PyTree) -> Recordings:
    """Reads what `record` has recorded so far from an optimizer state, however deep it is nested.

    Args:
      opt_state: an optimizer state, or an `nnx.Optimizer`, with a `record` somewhere in it.

    Returns:
      The samples so far, as NumPy arrays.

    Raises:
      ValueError: the state holds no recordings, or those of several `record`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import jaxsparse as js
      >>> params = {"w": jnp.zeros(4)}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> tx = js.analysis.record(optax.sgd(1.0), plan, total_steps=10)  # a dense run
      >>> _, state = tx.update({"w": jnp.array([1.0, 2.0, 3.0, 4.0])}, tx.init(params), params)
      >>> js.analysis.recordings(state).weights
      {'w': array([[-1., -2., -3., -4.]], dtype=float32)}
    """

    def is_one(node):
        return isinstance(node, RecordState)

    inside = getattr(opt_state, "opt_state", opt_state)
    states = [node for node in jax.tree.leaves(inside, is_leaf=is_one) if is_one(node)]
    if len(states) != 1:
        raise ValueError(
            f"recordings: this {type(opt_state).__name__} holds {len(states)} RecordState, not "
            "one. Wrap the optimizer in jaxsparse.analysis.record and pass the state that its "
            "update returned, or pass the part of the state that holds one."
        )
    steps, samples = jax.tree.map(np.asarray, (states[0].steps, states[0].samples))
    count = np.count_nonzero(steps)
    names = Recordings._fields[1:]
    fields = (
        {path: sample[name][:count] for path, sample in samples.items() if name in sample}
        for name in names
    )
    return Recordings(steps[:count], *fields)


def _places(leaf: Leaf, count: int) -> tuple[np.ndarray, ...]:
    """The indices of `count` weights of a leaf, drawn the same way in every run."""
    size = math.prod(leaf.shape)
    indices = np.random.default_rng(0).choice(size, min(count, size), replace=False, shuffle=False)
    return np.unravel_index(np.sort(indices), leaf.shape)


def _flips(before: tuple[Any, Leaf], after: tuple[Any, Leaf]) -> jax.Array:
    """The fraction of weights of a leaf whose mask differs, computed from the packed masks."""
    changed = jax.lax.population_count(before[0] ^ after[0])
    size = math.prod(before[1].shape)
    return jnp.sum(changed, dtype=jnp.int32).astype(jnp.float32) / jnp.float32(size)


def _sample(
    place: Any, path: str, w: Any, gradient: Any, moment: Any, masked: Any, churn: Any
) -> dict[str, jax.Array]:
    """The fields of `Recordings` for one leaf at one time, by name."""
    sample = {
        "weights": w[place].astype(jnp.float32),
        "gradient_variance": jnp.var(gradient, dtype=jnp.float32),
    }
    if moment is not None:
        sample["second_moment_variance"] = jnp.var(moment, dtype=jnp.float32)
    if masked is not None:
        mask = {path: unpack_mask(*masked)}
        sample["density"] = mask_density(mask)[path]
        sample["retained_magnitude"] = retained_magnitude({path: w}, mask)[path]
        sample["churn"] = churn
    return sample
