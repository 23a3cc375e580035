"""A training loop around the masks: donated, scanned, over seeds, traced once, and resumed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import jaxsparse as js

NUMBERS = {"every": 3, "reset_every": 4, "grad_scale": 0.5, "weight_decay": 0.1, "fix_after": 30}


def make_params(key=None):
    key = jax.random.key(0) if key is None else key
    return {"b": jnp.zeros(4), "w": jax.random.normal(key, (16, 4))}


PLAN = js.plan(make_params(), {"w": js.NM(2, 4, axis=0)})
TX = js.recipes.explore_exploit(optax.adamw(optax.linear_schedule(0.1, 0.0, 50)), PLAN, **NUMBERS)


def batch(t):
    key = jax.random.fold_in(jax.random.key(5), t)
    return jax.random.normal(key, (8, 16))


def loss(params, state, x):
    params = js.effective_params(params, state)
    return ((x @ params["w"] + params["b"][None] - x[:, :4]) ** 2).mean()


def train_step(params, state, x):
    updates, state = TX.update(jax.grad(loss)(params, state, x), state, params)
    return optax.apply_updates(params, updates), state


def loop(params, state, begin, end, step=None):
    step = step or jax.jit(train_step)
    for t in range(begin, end):
        params, state = step(params, state, batch(t))
    return params, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_loss_falls():
    params = make_params()
    start = loss(params, TX.init(params), batch(99))
    params, state = loop(params, TX.init(params), 0, 40)
    assert loss(params, state, batch(99)) < 0.5 * start


def test_no_step_is_traced_again_as_schedules_advance():
    params = make_params()
    loop(params, TX.init(params), 0, 50, jax.jit(chex.assert_max_traces(n=1)(train_step)))


def test_a_state_from_another_init_and_an_equal_plan_is_not_traced_again():
    params, step = make_params(), jax.jit(chex.assert_max_traces(n=1)(train_step))
    plan = js.plan(make_params(), {"w": js.NM(2, 4, axis=0)})
    other = js.recipes.explore_exploit(
        optax.adamw(optax.linear_schedule(0.1, 0.0, 50)), plan, **NUMBERS
    )
    loop(params, TX.init(params), 0, 1, step)
    loop(params, other.init(params), 0, 1, step)


def test_donated_buffers_are_taken_and_give_the_same():
    step = jax.jit(train_step, donate_argnums=(0, 1))
    params = make_params()
    state = TX.init(params)
    expected = loop(params, state, 0, 6)
    donated = jax.tree.map(jnp.copy, (params, state))
    new = step(*donated, batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert_same(loop(*new, 1, 6, step), expected)


def test_a_scan_over_steps_equals_the_python_loop():
    params = make_params()
    state = TX.init(params)
    expected = loop(params, state, 0, 12)

    @jax.jit
    def scanned(carry):
        return jax.lax.scan(
            lambda carry, x: (train_step(*carry, x), None), carry, jax.vmap(batch)(jnp.arange(12))
        )[0]

    results = scanned((params, state))
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results, expected
    )
    assert_same(js.masks(results[1]), js.masks(expected[1]))


def test_vmap_over_seeds_equals_one_run_each():
    keys = jax.random.split(jax.random.key(3), 3)
    stacked = jax.vmap(make_params)(keys)
    states = jax.vmap(TX.init)(stacked)
    step = jax.jit(jax.vmap(train_step, in_axes=(0, 0, None)))
    results = loop(stacked, states, 0, 8, step)
    for i, key in enumerate(keys):
        params = make_params(key)
        expected = loop(params, TX.init(params), 0, 8)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], results)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, expected
        )
        assert_same(js.masks(one[1]), js.masks(expected[1]))


@pytest.mark.parametrize("stop", [5, 31])  # between two rewirings; after the fix
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(stop, tmp_path):
    params = make_params()
    half = loop(params, TX.init(params), 0, stop)
    expected = loop(*half, stop, stop + 6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", half)
        checkpointer.wait_until_finished()
        fresh = jax.eval_shape(lambda: (make_params(), TX.init(make_params())))
        restored = checkpointer.restore(tmp_path / "run", fresh)
    assert_same(restored, half)
    assert_same(loop(*restored, stop, stop + 6), expected)


def test_abstract_init_matches_the_real_one():
    params = make_params()
    abstract = jax.eval_shape(TX.init, params)
    real = TX.init(params)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail("layout"),
        abstract,
        real,
    )


def test_flax_serialization_restores_the_state_and_compressed_weights():
    params = {"w": jnp.arange(1.0, 9.0)}
    tx = js.recipes.explore_exploit(optax.sgd(0.1), js.plan(params, {"w": js.NM(2, 4, axis=0)}))
    kept = (tx.init(params), js.compress(params, tx.init(params)))
    fresh = jax.tree.map(jnp.zeros_like, kept)
    assert js.flax  # registers what flax.serialization has to know
    chex.assert_trees_all_equal(serialization.from_bytes(fresh, serialization.to_bytes(kept)), kept)
