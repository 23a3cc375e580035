"""Schedules: the papers' worked values, both ends, and traced steps."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

SCHEDULES = {
    "linear": js.linear_decay(0.01, begin=10),
    "exponential": js.exponential_decay(0.01, begin=10, end=90),
    "endless": js.exponential_decay(0.01),
    "gradual": js.gradual_density(0.1, begin=10, end=90, every=4, initial=0.9),
}


def test_linear_decay_gives_the_worked_value():
    assert float(js.linear_decay(0.01)(25)) == 0.75
    np.testing.assert_allclose(js.linear_decay(0.01)(25) * np.array([1.0, 2.0]), [0.75, 1.5])


def test_exponential_decay_gives_the_worked_value():
    np.testing.assert_allclose(
        js.exponential_decay(0.01)(25) * np.array([1.0, 2.0]), [0.7788, 1.5576], atol=5e-5
    )


@pytest.mark.parametrize(
    "beta", [1.0, 0.5, 0.1, 0.01, 0.001, 1e-4, 1 / 3, 1 / 41, 1 / 47, 1 / 700, 3e-4]
)
@pytest.mark.parametrize("begin", [0, 125])
def test_linear_decay_is_exactly_1_up_to_begin_and_exactly_0_at_its_end(beta, begin):
    factor, end = js.linear_decay(beta, begin), begin + math.ceil(1 / beta - 1e-6)
    assert [float(factor(step)) for step in (0, begin)] == [1, 1]
    assert float(factor(end - 1)) > 0 and (end - 1 == begin or float(factor(end - 1)) < 1)
    assert [float(factor(step)) for step in (end, end + 1, 10 * end)] == [0, 0, 0]


def test_linear_decay_falls_by_beta_each_step():
    factor = js.linear_decay(0.004, begin=30)
    for step in range(0, 300, 7):
        np.testing.assert_allclose(factor(step), min(1, max(1 - 0.004 * (step - 30), 0)), atol=1e-6)


def test_exponential_decay_is_exactly_1_up_to_begin_and_exactly_0_from_end():
    factor = js.exponential_decay(0.002, begin=100, end=700)
    assert [float(factor(step)) for step in (0, 99, 100)] == [1, 1, 1]
    assert float(factor(101)) < 1
    np.testing.assert_allclose(factor(699), math.exp(-0.002 * 599), rtol=1e-6)
    assert [float(factor(step)) for step in (700, 701, 10**6)] == [0, 0, 0]
    assert float(js.exponential_decay(0.002)(1000)) > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_traced_step_gives_the_same_without_a_retrace(name):
    schedule = SCHEDULES[name]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(step):
        return schedule(step)

    steps = [0, 9, 10, 11, 13, 14, 50, 89, 90, 91, 1000]
    for step in steps:
        np.testing.assert_allclose(traced(step), schedule(step), rtol=1e-6, atol=1e-7)
    expected = np.array([schedule(step) for step in steps])
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.array(steps)), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(schedule(jnp.array(steps)), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        jax.lax.map(schedule, jnp.array(steps)), expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", ["uint32", "uint8", "int8", "int32", "float32"])
def test_a_step_of_any_type_gives_the_same_float32_scalar(name, dtype):
    schedule = SCHEDULES[name]
    for step in (0, 9, 10, 50, 95):
        for typed in (jnp.asarray(step, dtype), np.asarray(step, dtype)[()]):
            value = schedule(typed)
            assert value.dtype == jnp.float32 and value.shape == ()
            np.testing.assert_allclose(value, schedule(step), rtol=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "kept"),
    [
        (1, 8, [7, 4, 2, 1]),
        (2, 4, [3, 2]),
        (1, 4, [3, 2, 1]),
        (1, 16, [15, 8, 4, 2, 1]),
        (1, 32, [31, 16, 8, 4, 2, 1]),
        (3, 8, [7, 4, 3]),
        (1, 2, [1]),
        (1, 3, [2, 1]),
        (1, 5, [4, 2, 1]),
        (3, 4, [3]),
        (4, 4, [4]),
        (1, 1, [1]),
        (5, 8, [7, 5]),
    ],
)
def test_stepwise_stages_tighten_by_halves_down_to_the_target(n, m, kept):
    assert js.stepwise_stages(n, m) == tuple((k, m) for k in kept)


def test_geometric_stages_halve_the_group_at_one_density():
    assert js.geometric_stages(1, 8) == ((16, 128), (8, 64), (4, 32), (2, 16), (1, 8))
    assert js.geometric_stages(2, 4, k=4) == ((8, 16), (4, 8), (2, 4))
    assert js.geometric_stages(3, 8, k=1) == ((3, 8),)
    assert js.geometric_stages(1, 4, k=2) == ((2, 8), (1, 4))


@pytest.mark.parametrize("stages", [js.stepwise_stages, js.geometric_stages])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (3, 8), (5, 7), (1, 32)])
def test_stages_are_valid_patterns_that_never_loosen_and_end_at_the_target(stages, n, m):
    patterns = [js.NM(*stage) for stage in stages(n, m)]
    assert len(set(patterns)) == len(patterns)
    assert patterns[-1] == js.NM(n, m)
    densities = [pattern.density for pattern in patterns]
    assert densities == sorted(densities, reverse=True)


def test_gradual_density_is_the_cubic_of_the_survey():
    initial, final, begin, every, count = 0.8, 0.25, 20, 5, 12
    density = js.gradual_density(
        final, begin=begin, end=begin + count * every, every=every, initial=initial
    )
    for step in range(begin, begin + count * every + 1, every):
        sparsity = (1 - final) + ((1 - initial) - (1 - final)) * (
            1 - (step - begin) / (count * every)
        ) ** 3
        np.testing.assert_allclose(density(step), 1 - sparsity, rtol=1e-5)


def test_gradual_density_changes_every_so_many_steps_and_falls_each_time():
    density = js.gradual_density(0.1, begin=10, end=50, every=8)
    values = [float(density(step)) for step in range(10, 59)]
    changes = [10 + i for i in range(1, len(values)) if values[i] != values[i - 1]]
    assert changes == [18, 26, 34, 42, 50]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("initial", [1.0, 0.9, 0.7, 1 / 3])
@pytest.mark.parametrize("final", [0.01, 0.1, 0.25, 0.3, 1 / 7])
@pytest.mark.parametrize("end", [101, 130, 1007])
def test_gradual_density_is_exact_at_both_ends(initial, final, end):
    density = js.gradual_density(final, begin=100, end=end, initial=initial)
    for steps, value in (((0, 99, 100), initial), ((end, end + 1, 10**6), final)):
        assert [density(step) for step in steps] == [np.float32(value)] * 3


def test_gradual_density_may_rise():
    density = js.gradual_density(0.5, begin=0, end=10, initial=0.1)
    values = [float(density(step)) for step in range(11)]
    assert values == sorted(values) and density(0) == np.float32(0.1) and values[-1] == 0.5


def test_factors_fit_a_bfloat16_weight():
    factor = js.linear_decay(0.01)(25)
    effective = js.effective_weight(jnp.ones(4, jnp.bfloat16), jnp.zeros(4, bool), factor)
    assert effective.dtype == jnp.bfloat16 and effective.tolist() == [0.75] * 4
