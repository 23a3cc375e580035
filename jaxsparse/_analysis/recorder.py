"""A wrapper of any optimizer that records, in bounded memory, how weights, masks and gradients move
in training.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _checks
from jaxsparse._analysis.metrics import mask_density, retained_magnitude, second_moments
from jaxsparse._plan.paths import by_path
from jaxsparse._plan.plan import Leaf, Plan, check_plan, match
from jaxsparse._training.state import is_placeholder, mask_words, unpack_mask

__all__ = ["RecordState", "Recordings", "record", "recordings"]


class Recordings(NamedTuple):
    """What `record` keeps: S samples in time, each a dict from the path of a sparse leaf to an
    array whose first axis is time.

    Attributes:
      steps: int32 `[S]`, the updates done at each sample.
      weights: float32 `[S, K]`, the same K weights of the leaf at each sample.
      gradient_variance: float32 `[S]`, the variance of the gradient of the last update, as `update`
        received it.
      second_moment_variance: float32 `[S]`, that of Adam's second moment; no paths where the
        optimizer keeps none.
      density: float32 `[S]`, the fraction of weights that participate; no paths where there are no
        masks.
      retained_magnitude: float32 `[S]`, the share of magnitude that participates; no paths where
        there are no masks.
      churn: float32 `[S]`, the changes of mask since the sample before per weight of the leaf,
        summed over the updates between; divided by the number of rewirings between, it is their
        mean `mask_churn`. No paths where there are no masks.
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
      count: updates so far, int32 scalar.
      churn: path of each masked leaf to the changes of its mask since the last sample per weight,
        float32 scalars.
      steps: int32 `[S]`, the updates done at each sample, 0 where it is still to come.
      samples: path of each recorded leaf to what `Recordings` says of it by name, the samples still
        to come 0.
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
    """Records the sparse leaves of a plan while `inner` trains; the updates are those of `inner`,
    unchanged.

    It goes outside `rewire` and the recipes, where it sees the gradients, the masks before and
    after, the optimizer's moments and the updated weights; around a plain optimizer it records the
    dense run that a sparse one is compared with. `optax.MultiSteps` goes outside it. Samples are
    equally far apart, `ceil(total_steps / samples)` updates, and show the state after an update.
    Between them all that an update does is to compare masks, at one bit a weight. Nothing grows, so
    it runs under `jit`, `lax.scan` and donation, is checkpointed with the optimizer, and never
    recompiles.

    Args:
      inner: the transformation to record.
      plan: which leaves to record; those that it makes sparse.
      total_steps: the number of updates to come; what comes after is not recorded.
      samples: how many samples in time to keep at most.
      weights: how many weights of each leaf to follow, the same ones in every run; of a smaller
        leaf all.

    Returns:
      A transformation with state `RecordState`, from which `recordings` reads. Its `update` needs
      `params`.

    Raises:
      TypeError: `plan` is no plan, or a number is no integer; in `update`, the state is none of
        `record`.
      ValueError: no leaf of the plan is sparse, or a number is below 1; in `init` and `update`, the
        parameters or their gradients are not those of the plan; in `update`, the parameters are
        missing.

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
      Progressive Gradient Flow, section 4, for the variances.
    """
    check_plan("record", plan)
    if not plan.sparse:
        raise ValueError(f"record: the plan keeps every leaf dense:\n{plan}")
    for name, value in {"total_steps": total_steps, "samples": samples, "weights": weights}.items():
        if _checks.integer(value, f"record: `{name}`") < 1:
            raise ValueError(f"record: {name}={value} is below 1. Pass how many there are.")
    inner = optax.with_extra_args_support(inner)
    stride = math.ceil(total_steps / samples)
    length = total_steps // stride
    places = {path: _places(leaf, weights) for path, leaf in plan.sparse.items()}

    def samplers(params, gradients, churn, inner_state):
        """For every recorded leaf the function that takes its sample."""
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
        if is_placeholder(params):  # of optax.tree_utils.tree_map_params
            zero = jnp.zeros((), jnp.int32)
            return RecordState(zero, zero, zero, zero, inner.init(params))
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
                "record: `params` is missing. It follows weights: call update(grads, opt_state, "
                "params)."
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

        # one row, in place: a cond over the buffers would copy them at every step
        def write(buffer, x):
            return jax.lax.dynamic_update_index_in_dim(
                buffer, jnp.where(due, x, buffer[row]), row, 0
            )

        taken = {}
        for path, take in samplers(
            optax.apply_updates(params, updates), gradients, churn, inner_state
        ).items():
            none = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), state.samples[path])
            # one for each leaf, which take turns with memory
            taken[path] = jax.lax.cond(due, take, lambda none=none: none)
        steps, kept = jax.tree.map(write, (state.steps, state.samples), (count, taken))
        churn = jax.tree.map(lambda x: jnp.where(due, 0, x), churn)
        return updates, RecordState(count, churn, steps, kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def recordings(opt_state) -> Recordings:
    """What `record` has kept so far, read from the optimizer state however deep it is nested.

    Args:
      opt_state: an optimizer state, or an `nnx.Optimizer`, with a `record` somewhere in it.

    Returns:
      The samples taken so far, as NumPy arrays.

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
    found = [node for node in jax.tree.leaves(inside, is_leaf=is_one) if is_one(node)]
    if len(found) != 1:
        raise ValueError(
            f"recordings: this {type(opt_state).__name__} holds {len(found)} RecordState, not one. "
            "Wrap the optimizer in jaxsparse.analysis.record and pass the state that its update "
            "returned, or pass the part of the state that holds one."
        )
    steps, samples = jax.tree.map(np.asarray, (found[0].steps, found[0].samples))
    taken = np.count_nonzero(steps)
    names = Recordings._fields[1:]
    kept = (
        {path: sample[name][:taken] for path, sample in samples.items() if name in sample}
        for name in names
    )
    return Recordings(steps[:taken], *kept)


def _places(leaf: Leaf, count: int) -> tuple[np.ndarray, ...]:
    """The indices of `count` weights of a leaf, drawn the same way in every run."""
    size = math.prod(leaf.shape)
    drawn = np.random.default_rng(0).choice(size, min(count, size), replace=False, shuffle=False)
    return np.unravel_index(np.sort(drawn), leaf.shape)


def _flips(before: tuple[jax.Array, Leaf], after: tuple[jax.Array, Leaf]) -> jax.Array:
    """The fraction of weights of a leaf whose mask differs, from the masks as they are packed."""
    changed = jax.lax.population_count(before[0] ^ after[0])
    size = math.prod(before[1].shape)
    return jnp.sum(changed, dtype=jnp.int32).astype(jnp.float32) / jnp.float32(size)


def _sample(place, path, w, gradient, moment, masked, churn) -> dict[str, jax.Array]:
    """What `Recordings` says of one leaf at one time, by name."""
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
