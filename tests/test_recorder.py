"""Recorded runs: the content of the samples, and that recording changes nothing else."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import promotion
import pytest
from flax import linen as nn
from flax import nnx

import jaxsparse as js
from jaxsparse import analysis


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "a": {"b": jnp.zeros(4), "w": jax.random.normal(keys[0], (16, 4))},
        "c": {"w": jax.random.normal(keys[1], (20, 4))},
    }


NOISE = np.random.default_rng(0).normal(size=(32, 20, 4)).astype(np.float32)


def gradient(params, t):
    return jax.tree.map(
        lambda p: p + jnp.asarray(NOISE, p.dtype)[t].ravel()[: p.size].reshape(p.shape), params
    )


PLAN = js.plan(make_params(), {"*/w": js.NM(2, 4, axis=0)})
PATHS = {"a/w", "c/w"}


def recipe(optimizer=None, **kwargs):
    return js.recipes.explore_exploit(optimizer or optax.adamw(0.3), PLAN, reset_every=7, **kwargs)


def recorded(tx, total_steps=12, **kwargs):
    return analysis.record(
        tx, PLAN, **{"total_steps": total_steps, "samples": 4, "weights": 24} | kwargs
    )


def run(tx, steps, params=None, state=None, begin=0):
    params = make_params() if params is None else params
    state = jax.jit(tx.init)(params) if state is None else state

    @jax.jit
    def step(params, state, t):
        updates, state = tx.update(gradient(params, t), state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for t in range(begin, steps):
        before = params, state
        params, state = step(params, state, t)
        history.append((*before, params, state))
    return params, state, history


@functools.cache
def a_run():
    return run(recorded(recipe(every=2)), 12)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def weight(tree, path):
    outer, inner = path.split("/")
    return np.asarray(tree[outer][inner])


@pytest.mark.parametrize("every", [1, 2])
def test_samples_are_what_the_run_went_through(every):
    _, state, history = a_run() if every == 2 else run(recorded(recipe()), 12)
    recordings = analysis.recordings(state)
    np.testing.assert_array_equal(recordings.steps, [3, 6, 9, 12])
    for name in (
        "weights",
        "gradient_variance",
        "second_moment_variance",
        "density",
        "retained_magnitude",
        "churn",
    ):
        assert getattr(recordings, name).keys() == PATHS
    for path in PATHS:
        assert recordings.weights[path].shape == (4, 24)
        for i, t in enumerate((3, 6, 9, 12)):
            before, _, params, after = history[t - 1]
            grads = gradient(before, t - 1)
            w, mask, nu = (
                weight(params, path),
                weight(js.masks(after), path),
                weight(find_nu(after), path),
            )
            assert (
                np.isin(recordings.weights[path][i], w).all()
                and len(np.unique(recordings.weights[path][i])) > 10
            )
            np.testing.assert_allclose(
                recordings.gradient_variance[path][i], weight(grads, path).var(), rtol=1e-4
            )
            np.testing.assert_allclose(
                recordings.second_moment_variance[path][i], nu.var(), rtol=1e-4
            )
            np.testing.assert_allclose(
                recordings.retained_magnitude[path][i],
                np.abs(w[mask]).sum() / np.abs(w).sum(),
                rtol=1e-5,
            )
            assert recordings.density[path][i] == 0.5
            masks = [weight(js.masks(one[1]), path) for one in history[t - 3 : t]] + [mask]
            flips = sum((old != new).mean() for old, new in itertools.pairwise(masks))
            np.testing.assert_allclose(recordings.churn[path][i], flips, rtol=1e-5)
        assert recordings.churn[path].sum() > 0.1


def find_nu(state):
    return next(
        node.nu
        for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState))
        if hasattr(node, "nu")
    )


def test_the_same_weights_are_followed():
    _, state, history = run(recorded(optax.sgd(0.1), weights=1000), 12)
    weights = analysis.recordings(state).weights
    for i, t in enumerate((3, 6, 9, 12)):
        for path in PATHS:  # all weights of a small leaf, in order
            np.testing.assert_array_equal(weights[path][i], weight(history[t - 1][2], path).ravel())
    some = analysis.recordings(run(recorded(optax.sgd(0.1)), 12)[1]).weights
    for path in PATHS:
        places = [int(np.flatnonzero(weights[path][0] == value)[0]) for value in some[path][0]]
        assert places == sorted(set(places)) and len(places) == 24
        np.testing.assert_array_equal(some[path], weights[path][:, places])


def test_the_run_is_the_same_as_without():
    plain, recording = run(recipe(every=2), 12), a_run()
    for (_, expected, params, _), (_, state, same, _) in zip(plain[2], recording[2], strict=True):
        assert_same(js.masks(state), js.masks(expected))
        # rounding differs
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), same, params
        )
    assert jax.tree.structure(recording[1].inner_state) == jax.tree.structure(plain[1])


@pytest.mark.parametrize("total, samples, steps", [(11, 4, range(3, 10, 3)), (7, 100, range(1, 8))])
def test_samples_are_as_far_apart_as_the_number_of_steps_asks(total, samples, steps):
    tx = recorded(optax.sgd(0.1), total, samples=samples)
    _, state, _ = run(tx, total + 5)
    recordings = analysis.recordings(state)
    np.testing.assert_array_equal(recordings.steps, steps)  # later steps are not recorded


def test_a_dense_run_has_weights_and_gradients_alone():
    recordings = analysis.recordings(run(recorded(optax.sgd(0.1)), 12)[1])
    assert recordings.weights.keys() == recordings.gradient_variance.keys() == PATHS
    assert (
        recordings.second_moment_variance
        == recordings.density
        == recordings.retained_magnitude
        == recordings.churn
        == {}
    )


def test_nothing_is_traced_again_copied_or_changed_in_layout():
    tx = recorded(recipe(every=2))
    last = a_run()[:2]

    def step(params, state, t):
        updates, state = tx.update(gradient(params, t), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(chex.assert_max_traces(n=1)(step), donate_argnums=(0, 1))
    params = make_params()
    arguments = params, tx.init(params)
    layout = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(arguments)]
    for t in range(12):
        new = jitted(*arguments, t)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments))
        assert jax.tree.structure(new) == jax.tree.structure(arguments)
        arguments = new
    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(arguments)] == layout
    assert_same(arguments, last)

    start = make_params()
    scan = jax.jit(
        lambda carry: jax.lax.scan(lambda carry, t: (step(*carry, t), None), carry, jnp.arange(12))[
            0
        ]
    )
    scanned = scan((start, tx.init(start)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), scanned, last)


def test_a_restored_run_goes_on_recording(tmp_path):
    tx = recorded(recipe(every=2))
    params, state = a_run()[2][7][:2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, state))
        checkpointer.wait_until_finished()
        fresh = jax.eval_shape(lambda: (make_params(), tx.init(make_params())))
        restored = checkpointer.restore(tmp_path / "run", fresh)
    assert_same(restored, (params, state))
    assert_same(run(tx, 12, *restored, begin=7)[1], a_run()[1])


LABELS = {"a": "x", "c": "y"}
ONLY = {one: js.plan(make_params(), {f"{one}/w": js.NM(2, 4, axis=0)}) for one in "ac"}
WRAPPED = {
    "MultiSteps outside": lambda: optax.MultiSteps(recorded(recipe()), 2).gradient_transformation(),
    "chain": lambda: optax.chain(optax.clip(1.0), recorded(recipe())),
    "hyperparams inside": lambda: recorded(
        recipe(optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.5, 0.1, 12)))
    ),
    "hyperparams outside": lambda: optax.inject_hyperparams(
        lambda learning_rate: recorded(recipe(optax.adamw(learning_rate)))
    )(learning_rate=optax.linear_schedule(0.5, 0.1, 12)),
    "two rewires": lambda: recorded(
        optax.multi_transform(
            {one: js.recipes.explore_exploit(optax.adam(0.1), ONLY[one]) for one in "ac"},
            {"a": "a", "c": "c"},
        )
    ),
    "under a label": lambda: optax.multi_transform(
        {
            "x": analysis.record(
                js.recipes.explore_exploit(optax.adam(0.1), ONLY["a"]),
                ONLY["a"],
                total_steps=12,
                samples=4,
            ),
            "y": optax.sgd(0.1),
        },
        LABELS,
    ),
    "one path alone": lambda: analysis.record(recipe(), ONLY["a"], total_steps=12, samples=4),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    promotion.marked(WRAPPED, ["MultiSteps outside"], "optax.MultiSteps divides by an integer"),
)
def test_recordings_and_masks_are_found_however_deep(name):
    _, state, _ = run(WRAPPED[name](), 12)
    recordings = analysis.recordings(state)
    assert len(recordings.steps) == (2 if name == "MultiSteps outside" else 4)
    paths = {"a/w"} if name in ("under a label", "one path alone") else PATHS
    for values in recordings[1:]:
        assert values.keys() == paths
        assert all(np.isfinite(one).all() and one.any() for one in values.values())
    assert js.masks(state)["a"]["w"].shape == (16, 4)
    if name == "one path alone":
        assert state.churn.keys() == paths  # the others cost nothing


def test_nnx_and_the_interceptor_see_through_it():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    plan = js.plan(nnx.state(model, nnx.Param), {"kernel": js.NM(2, 4, axis=0)})
    tx = analysis.record(js.recipes.explore_exploit(optax.adam(0.1), plan), plan, total_steps=2)
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    opt.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(
        analysis.recordings(opt).weights["kernel"], model.kernel.get_value().reshape(1, -1)
    )

    dense, x = nn.Dense(4, use_bias=False), jnp.ones((1, 8))
    params = dense.init(jax.random.key(0), x)
    plan = js.flax.plan(dense, {"kernel": "2:4"}, x)
    state = analysis.record(
        js.recipes.explore_exploit(optax.adam(0.1), plan), plan, total_steps=2
    ).init(params)
    with js.flax.intercept(state):
        output = dense.apply(params, x)
    np.testing.assert_allclose(
        output, x @ js.effective_params(params, state)["params"]["kernel"], rtol=1e-6
    )


def test_memory_does_not_grow_with_the_run():
    sizes = {
        total: sum(
            x.size
            for x in jax.tree.leaves(jax.eval_shape(recorded(recipe(), total).init, make_params()))
        )
        for total in (16, 10**9)
    }
    assert len(set(sizes.values())) == 1


def test_low_precision_weights_are_recorded_as_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    recordings = analysis.recordings(run(recorded(optax.adam(0.1)), 3, params)[1])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(recordings[1:]))


@pytest.mark.promotes("optax.add_noise raises an integer step to a float")
def test_what_is_no_array_of_numbers_may_be_in_the_state():
    tx = recorded(
        recipe(optax.chain(optax.add_noise(0.01, 0.55, key=jax.random.key(0)), optax.sgd(0.1)))
    )
    _, state, _ = run(tx, 12)
    assert len(analysis.recordings(state).steps) == 4


def test_errors_name_the_call():
    params, tx = make_params(), recorded(recipe())
    with pytest.raises(TypeError, match="record: `plan` is a dict"):
        analysis.record(optax.sgd(0.1), {}, total_steps=3)
    with pytest.raises(ValueError, match="record: the plan keeps every leaf dense"):
        analysis.record(optax.sgd(0.1), js.plan(params, {}), total_steps=3)
    for name in ("total_steps", "samples", "weights"):
        with pytest.raises(ValueError, match=f"record: {name}=0 is below 1"):
            recorded(recipe(), **{name: 0})
        with pytest.raises(TypeError, match=f"record: `{name}` must be an integer"):
            recorded(recipe(), **{name: 1.5})
    with pytest.raises(ValueError, match="record: `params` is missing"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="record: this RewireState is not a RecordState"):
        tx.update(params, recipe().init(params), params)
    with pytest.raises(ValueError, match="record: the plan makes"):
        tx.init({"a": params["a"]})
    with pytest.raises(ValueError, match="recordings: this RewireState holds 0 RecordState"):
        analysis.recordings(recipe().init(params))
    with pytest.raises(ValueError, match="recordings: this tuple holds 2 RecordState"):
        analysis.recordings((tx.init(params), tx.init(params)))
