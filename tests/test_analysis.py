"""Metrics of masks, weights and gradients against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import jaxsparse as js
from jaxsparse import analysis
from jaxsparse._analysis.metrics import second_moments


def correlations(series):
    """Pearson's coefficient of one series with itself at every lag; NaN for constant windows."""
    by_lag = []
    for lag in range(len(series) - 1):
        x, y = series[: len(series) - lag].astype(float), series[lag:].astype(float)
        constant = (x == x[0]).all() or (y == y[0]).all()
        by_lag.append(np.nan if constant else np.corrcoef(x, y)[0, 1])
    return by_lag


def first_lag(rho, length):
    if np.isnan(rho[0]):
        return np.nan
    return next((lag for lag, value in enumerate(rho) if not value > 0), length)  # or NaN


def walks(offset, scale, shape=(60, 3, 4)):
    steps = np.random.default_rng(0).normal(size=shape)
    return (offset + scale * steps.cumsum(0)).astype(np.float32)


@pytest.mark.parametrize("offset, scale", [(0, 1), (1e4, 1), (0, 1e-25), (0, 1e25), (-3, 1e-4)])
def test_autocorrelation_is_numpys(offset, scale):
    series = walks(offset, scale)
    rho = analysis.autocorrelation(series)
    assert rho.shape == (59, 3, 4) and rho.dtype == jnp.float32
    expected = np.stack(
        [[correlations(series[:, i, j]) for j in range(4)] for i in range(3)]
    ).transpose(2, 0, 1)
    np.testing.assert_allclose(rho, expected, atol=3e-6)
    assert (rho[0] >= 1 - 1e-6).all() and (jnp.abs(rho) <= 1).all()


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.int32, (12, 6), elements=st.integers(-3, 3)))
def test_decorrelation_time_is_the_first_lag_at_zero_or_below(series):
    rho = np.array([correlations(one) for one in series.T])
    clear = ~(np.abs(rho) < 1e-6).any(1)  # where rounding does not decide
    expected = np.array([first_lag(one, 12) for one in rho])
    lags = np.asarray(analysis.decorrelation_time(series))
    np.testing.assert_array_equal(lags[clear], expected[clear])
    np.testing.assert_array_equal(np.isnan(lags), (series == series[0]).all(0))


def test_decorrelation_time_of_known_series():
    steps = np.arange(64)
    series = np.stack(
        [
            steps,
            np.exp(steps / 9),
            (-1.0) ** steps,
            0 * steps + 0.1,
            np.where(steps < 30, 0, np.nan),
            steps >= 32,
        ],
        1,
    )
    # a trend never decorrelates, an alternation does at once; for a constant or non-finite series
    # the time is undefined
    np.testing.assert_array_equal(
        analysis.decorrelation_time(series)[:5], [64, 64, 1, np.nan, np.nan]
    )
    assert analysis.decorrelation_time(np.array([0, 1, 0, -1, 0, 1])) == 1  # where it is exactly 0
    assert analysis.decorrelation_time(series)[5] == 32
    # a weight that FIX switches off
    assert analysis.decorrelation_time(np.array([5, 5, 5, 5, 0, 0, 0, 0])) == 4


def test_windows_that_are_constant_have_no_correlation():
    # a weight that FIX holds at 0
    series = np.r_[np.linspace(0.1, 0.97, 8), np.full(43, 0.71234)].astype(np.float32)
    rho = analysis.autocorrelation(series)
    np.testing.assert_allclose(rho, correlations(series), atol=3e-6)
    assert np.isnan(rho[8:]).all() and not np.isnan(rho[:7]).any()


@pytest.mark.slow
def test_decorrelation_by_magnitude_is_the_median_of_each_bin():
    series = walks(0, 1, (40, 5, 5))
    series[:, 0, :2] = 0
    flat = series.reshape(40, 25)
    order = np.argsort(np.abs(flat[-1]), kind="stable")
    times = np.array([first_lag(correlations(one), 40) / 40 for one in flat.T])
    magnitude, delta = analysis.decorrelation_by_magnitude(series, bins=4)
    parts = np.array_split(order, 4)
    np.testing.assert_allclose(
        magnitude, [np.median(np.abs(flat[-1, part])) for part in parts], rtol=1e-6
    )
    np.testing.assert_allclose(delta, [np.nanmedian(times[part]) for part in parts], rtol=1e-6)
    assert np.isnan(analysis.decorrelation_by_magnitude(np.zeros((9, 3)), bins=3)[1]).all()


@pytest.mark.parametrize(
    "function",
    [analysis.autocorrelation, analysis.decorrelation_time, analysis.decorrelation_by_magnitude],
)
def test_series_that_are_none_are_refused(function):
    name = function.__name__
    with pytest.raises(ValueError, match=rf"{name}: `series` has shape \(1, 4\)"):
        function(np.zeros((1, 4)))
    with pytest.raises(TypeError, match=f"{name}: `series` is complex64"):
        function(np.zeros((4, 4), np.complex64))
    with pytest.raises(TypeError, match=f"{name}: `series` must be an array"):
        function({"w": np.zeros(4)})


def test_bins_are_between_one_and_the_weights():
    for bins in (0, 5):
        with pytest.raises(ValueError, match=f"bins={bins} is not in 1..4"):
            analysis.decorrelation_by_magnitude(np.zeros((3, 4)), bins)


@settings(max_examples=25, deadline=None)
@given(arrays.arrays(bool, (5, 6)), arrays.arrays(bool, (5, 6)), arrays.arrays(np.int8, (5, 6)))
def test_masks_by_counting(before, after, weights):
    old, new = (
        {"params": {"a": {"w": jnp.asarray(mask)}, "b": jnp.asarray(True)}}
        for mask in (before, after)
    )
    params = {"params": {"a": {"w": jnp.asarray(weights)}, "b": jnp.ones(3)}}
    size = 30
    flat = [
        (int(b), int(a), abs(int(w)))
        for b, a, w in zip(before.flat, after.flat, weights.flat, strict=True)
    ]
    expected = sum(b for b, _, _ in flat) / size, sum(b != a for b, a, _ in flat) / size
    kept, total = sum(w for b, _, w in flat if b), sum(w for _, _, w in flat)
    measures = (
        analysis.mask_density(old),
        analysis.mask_churn(old, new),
        analysis.retained_magnitude(params, old),
    )
    assert all(values.keys() == {"a/w"} for values in measures)
    np.testing.assert_allclose(
        [values["a/w"] for values in measures], [*expected, kept / total if total else 1], rtol=1e-6
    )


def test_a_mask_of_more_weights_than_a_float32_counts():
    mask = {"w": jnp.ones(2**24 + 2, bool)}
    assert analysis.mask_density(mask)["w"] == 1
    assert analysis.mask_churn(mask, {"w": ~mask["w"]})["w"] == 1


def test_masks_of_different_parameters_are_refused():
    with pytest.raises(
        ValueError, match=r"mask_churn: the mask of w has shape \(4,\) before, but \(8,\) after"
    ):
        analysis.mask_churn({"w": jnp.ones(4, bool)}, {"w": jnp.ones(8, bool)})
    with pytest.raises(ValueError, match=r"mask_churn: the mask of v has shape None before"):
        analysis.mask_churn(
            {"w": jnp.ones(4, bool)}, {"v": jnp.ones(4, bool), "w": jnp.ones(4, bool)}
        )
    with pytest.raises(ValueError, match="mask_density: this ScaleByAdamState is neither masks"):
        analysis.mask_density(optax.scale_by_adam().init({"w": jnp.ones(4)}))
    with pytest.raises(ValueError, match="retained_magnitude: w has shape"):
        analysis.retained_magnitude({"w": jnp.ones(8)}, {"w": jnp.ones(4, bool)})


@pytest.mark.promotes("optax.MultiSteps divides by an integer")
def test_the_second_moment_is_found_however_deep():
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones(3)}
    plan = js.plan(params, {"a": js.NM(2, 4, axis=0)})
    grads = jax.tree.map(lambda p: jnp.arange(p.size, dtype=float).reshape(p.shape), params)
    adam = lambda: optax.adamw(1e-3, b2=0.75)  # noqa: E731
    wrapped = {
        "explore_exploit": js.recipes.explore_exploit(adam(), plan),
        "MultiSteps": optax.MultiSteps(js.recipes.explore_exploit(adam(), plan), 1),
        "hyperparams": optax.inject_hyperparams(optax.rmsprop)(1e-3, decay=0.75),
        "two": optax.multi_transform({"x": adam(), "y": adam()}, {"a": "x", "b": "y"}),
    }
    for name, tx in wrapped.items():
        _, state = jax.jit(tx.update)(grads, tx.init(params), params)
        moments = second_moments(state)
        assert moments.keys() == {"a", "b"}, name
        for path, nu in moments.items():
            np.testing.assert_allclose(nu, 0.25 * grads[path] ** 2, rtol=1e-5)
    assert second_moments(optax.sgd(0.1, momentum=0.9).init(params)) == {}
