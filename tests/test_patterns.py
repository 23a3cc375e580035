"""Transposable, unstructured and block masks against plain references and under transformations."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_masks import random_scores

import jaxsparse as js

DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "uint8")
topk_mask = jax.jit(js.topk_mask)
transposable = jax.jit(js.transposable_nm_mask, static_argnums=(1, 2), static_argnames="axes")
block_mask = jax.jit(js.block_mask, static_argnums=(1, 2), static_argnames=("axes", "pool"))


def wide(scores):
    return scores.astype(np.float32) if scores.dtype.kind not in "iuf" else scores


def few(rng, dtype, shape):
    """Small integers with many ties, with NaN, inf and signed zeros if the dtype has them."""
    scores = rng.integers(0, 4, shape).astype(jnp.dtype(dtype))
    if "float" not in dtype:
        return scores
    special = np.array([np.nan, np.inf, np.inf, 0, -0.0, 0]).astype(jnp.dtype(dtype))
    return np.where(rng.random(shape) < 0.1, rng.choice(special, shape), scores)


@pytest.mark.slow
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(7,), (3, 5, 2)]),  # each shape and dtype is compiled once
    st.sampled_from(DTYPES),
    st.floats(2**-10, 1.0, width=32),
)
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_topk_equals_the_reference(seed, shape, dtype, density):
    scores = random_scores(np.random.default_rng(seed), dtype, shape)
    k = reference.half_up(np.float32(density) * np.float32(scores.size))
    mask = topk_mask(scores, jnp.float32(density))
    np.testing.assert_array_equal(mask, reference.topk_mask(wide(scores), k))


EXTREME = [(), (1,), (10007,), (37, 41, 7), (2, 3, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, "float32") for shape in EXTREME), *(((130, 257), dtype) for dtype in DTYPES)],
)
def test_topk_at_every_density(dtype, shape):
    scores = random_scores(np.random.default_rng(1), dtype, shape)
    smooth = (
        np.random.default_rng(2)
        .normal(size=shape)
        .astype(jnp.dtype("float32" if "int" in dtype else dtype))
    )
    for density in (1e-9, 0.01, 0.3, 0.5, 0.999, 1.0):
        k = reference.half_up(np.float32(density) * np.float32(scores.size))
        for some in (scores, smooth):
            np.testing.assert_array_equal(
                topk_mask(some, jnp.float32(density)),
                reference.topk_mask(wide(some), k),
                str(density),
            )


@pytest.mark.parametrize("value", [0.0, -0.0, np.nan, -np.inf, np.inf, 1e-45])
def test_all_equal_keeps_the_first(value):
    for dtype in ("float32", "bfloat16"):
        mask = np.asarray(js.topk_mask(jnp.full((30, 40), value, dtype), 0.3)).ravel()
        np.testing.assert_array_equal(mask, np.arange(1200) < 360)


def test_numbers_are_rounded_half_up_and_at_least_one_stays():
    for density, size, k in [
        (0.5, 5, 3),
        (0.4, 5, 2),
        (0.1, 5, 1),
        (1.0, 5, 5),
        (0.01, 10, 1),
        (0.3, 10, 3),
        (0.34, 10, 3),
    ]:
        assert js.topk_mask(jnp.arange(size), density).sum() == k
        assert topk_mask(jnp.arange(size), density).sum() == k
    assert js.topk_mask(jnp.zeros((0, 3)), 0.5).shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposable_equals_brute_force(n, dtype):
    assert len(list(reference.transposable_patterns(n))) == {1: 24, 2: 90, 3: 24}[n]
    rng = np.random.default_rng(n)
    for shape, axes in [((8, 12), (0, 1)), ((4, 3, 8), (2, 0)), ((2, 4, 4), (-2, -1))]:
        scores = rng.integers(0, 4, shape).astype(jnp.dtype(dtype))
        mask = np.asarray(transposable(scores, n, 4, axes=axes))
        for block, pattern in zip(
            *(reference.blocks_of_four(x, axes) for x in (scores, mask)), strict=True
        ):
            assert pattern == reference.best_transposable(block, n)


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]), st.integers(-30, 30))
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_transposable_keeps_the_largest_sum(seed, n, exponent):
    scores = (
        np.random.default_rng(seed).integers(-(1 << 16), 1 << 16, (4, 8)) * 2.0**exponent
    ).astype("float32")  # sums are exact
    mask = np.asarray(transposable(scores, n, 4, axes=(0, 1)))
    for block, pattern in zip(
        *(reference.blocks_of_four(x, (0, 1)) for x in (scores, mask)), strict=True
    ):
        assert pattern == reference.best_transposable(block, n)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transposable_keeps_most_nan_and_then_most_inf(n, dtype):
    rng = np.random.default_rng(n)
    top = float(jnp.finfo(dtype).max)
    scores = rng.choice([0, 1, top, np.inf, np.inf, np.nan], (16, 16)).astype(jnp.dtype(dtype))
    mask = np.asarray(transposable(scores, n, 4, axes=(0, 1)))
    for block, pattern in zip(
        *(reference.blocks_of_four(x, (0, 1)) for x in (scores.astype("float64"), mask)),
        strict=True,
    ):
        assert pattern in list(reference.transposable_patterns(n))
        if top < 1e38:  # otherwise the largest values count as inf
            assert reference.kept(block, pattern)[:2] == max(
                reference.kept(block, p)[:2] for p in reference.transposable_patterns(n)
            )
        else:
            assert reference.kept(block, pattern)[0] == max(
                reference.kept(block, p)[0] for p in reference.transposable_patterns(n)
            )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_mask_of_the_transpose_is_the_transposed_mask(n):
    w = jax.random.normal(jax.random.key(0), (64, 32))
    plan = js.plan({"w": w}, {"w": js.TransposableNM(n, 4, axes=(0, 1))})
    turned = js.plan({"w": w.T}, {"w": js.TransposableNM(n, 4, axes=(0, 1))})
    mask = js.magnitude_masks({"w": w}, plan)["w"]
    np.testing.assert_array_equal(js.magnitude_masks({"w": w.T}, turned)["w"], mask.T)
    np.testing.assert_array_equal(mask, js.transposable_nm_mask(abs(w), n, 4, axes=(1, 0)))


def test_transposable_masks_of_negative_and_huge_scores_stay_patterns():
    rng = np.random.default_rng(3)
    for values in (
        [-np.inf, -1, -3e38, np.nan, np.inf],
        [3e38, 3e38, np.inf],
        [-np.inf],
        [np.nan],
        [1e-45, 0],
    ):
        mask = np.asarray(
            transposable(rng.choice(values, (16, 16)).astype("float32"), 2, 4, axes=(0, 1))
        )
        for groups in (mask, mask.T):
            np.testing.assert_array_equal(groups.reshape(-1, 4).sum(1), 2)


@pytest.mark.slow
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(4, 6), (5, 9), (7, 3, 4)]),
    st.sampled_from([(1, 1), (2, 3), (4, 2), (5, 5)]),
    st.sampled_from(["max", "mean", "l2"]),
    st.sampled_from(DTYPES),
    st.floats(0.01, 1),
    st.permutations(range(3)),
)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_blocks_equal_the_reference(seed, sizes, shape, score, dtype, density, order):
    axes = tuple(axis for axis in order if axis < len(sizes))[:2]
    scores = few(np.random.default_rng(seed), dtype, tuple(sizes))
    scores = scores if dtype == "uint8" else scores - scores.dtype.type(2)
    mask = block_mask(scores, shape, density, axes=axes, pool=score)
    np.testing.assert_array_equal(
        mask, reference.block_mask(wide(scores), shape, density, axes, score)
    )


MASKS = {
    "topk": lambda w: js.topk_mask(w, 0.3),
    "transposable": lambda w: js.transposable_nm_mask(w, 2, 4, axes=(0, 1)),
    "block": lambda w: js.block_mask(w, (3, 2), 0.3, axes=(0, 1), pool="l2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_transformations_give_the_same_mask(name):
    mask = MASKS[name]
    w = jnp.asarray(np.random.default_rng(5).integers(0, 9, (3, 8, 16)), jnp.float32)
    expected = np.stack([mask(one) for one in w])
    np.testing.assert_array_equal(jax.jit(jax.vmap(mask))(w), expected)
    np.testing.assert_array_equal(
        jax.vmap(mask, 2, 2)(w.transpose(1, 2, 0)), expected.transpose(1, 2, 0)
    )
    np.testing.assert_array_equal(
        jax.lax.scan(lambda _, one: (None, mask(one)), None, w)[1], expected
    )
    np.testing.assert_array_equal(
        jax.grad(lambda one: jnp.where(mask(one), one, 0).sum())(w[0]),
        expected[0].astype("float32"),
    )
    np.testing.assert_array_equal(
        jax.jit(jax.grad(lambda one: jnp.where(mask(one), one, 0).sum()))(w[0]),
        expected[0].astype("float32"),
    )


def test_a_traced_density_may_differ_from_one_batch_member_to_the_next():
    w = jnp.asarray(np.random.default_rng(6).integers(0, 9, (3, 50)), jnp.float32)
    masks = jax.jit(jax.vmap(js.topk_mask))(w, jnp.array([0.1, 0.5, 1.0]))
    for row, mask, k in zip(w, masks, (5, 25, 50), strict=True):
        np.testing.assert_array_equal(mask, reference.topk_mask(row, k))


@pytest.mark.slow
def test_no_wide_types_appear_and_wide_ones_work():
    for mask in MASKS.values():
        assert "64[" not in str(jax.make_jaxpr(mask)(jnp.zeros((8, 16))))
    with jax.enable_x64(True):
        scores = np.random.default_rng(7).normal(size=(8, 16)) * 1e-9 + 1
        np.testing.assert_array_equal(js.topk_mask(scores, 0.3), reference.topk_mask(scores, 38))
        np.testing.assert_array_equal(
            jax.jit(js.topk_mask)(scores, 0.3), reference.topk_mask(scores, 38)
        )
        np.testing.assert_array_equal(
            js.block_mask(scores, (3, 2), 0.3, axes=(0, 1)),
            reference.block_mask(scores, (3, 2), 0.3, (0, 1), "max"),
        )
        mask = np.asarray(js.transposable_nm_mask(scores, 2, 4, axes=(0, 1)))
        for block, pattern in zip(
            *(reference.blocks_of_four(x, (0, 1)) for x in (scores, mask)), strict=True
        ):
            assert reference.kept(block, pattern)[2] == pytest.approx(
                reference.kept(block, reference.best_transposable(block, 2))[2], 1e-14
            )
