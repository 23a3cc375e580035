"""`nm_mask` against the plain reference, and under every transformation."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import jaxsparse as js

FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn")
INTEGERS = ("int8", "int32", "uint32", "uint8")
DTYPES = FLOATS + INTEGERS
SIZES = [
    (1, 1),
    (1, 2),
    (2, 4),
    (4, 8),
    (1, 9),
    (3, 7),
    (5, 12),
    (1, 128),
    (64, 128),
    (127, 128),
    (128, 128),
]


nm_mask = jax.jit(js.nm_mask, static_argnums=(1, 2), static_argnames="axis")


def special_values(dtype):
    """Values of `dtype` that are easily ranked wrongly."""
    if dtype in INTEGERS:
        info = jnp.iinfo(dtype)
        return np.array(
            [info.min, info.min, info.min + 1, 0, 0, 1, info.max - 1, info.max, info.max], dtype
        )
    info = jnp.finfo(dtype)
    tiny = info.smallest_subnormal
    values = [
        0.0,
        -0.0,
        tiny,
        -tiny,
        info.tiny,
        -info.tiny,
        1,
        -1,
        info.max,
        info.min,
        np.nan,
        -np.nan,
    ]
    if dtype != "float8_e4m3fn":  # which has no infinity
        values += [np.inf, -np.inf]
    return np.array(values, "float32" if dtype == "float32" else "float64").astype(jnp.dtype(dtype))


def random_scores(rng, dtype, shape):
    """Small integers with many ties, and special values among them."""
    dtype = jnp.dtype(dtype)
    few = rng.integers(0 if dtype.name.startswith("u") else -3, 4, shape).astype(dtype)
    return np.where(rng.random(shape) < 0.3, rng.choice(special_values(dtype.name), shape), few)


@st.composite
def cases(draw):
    m = draw(st.one_of(st.integers(1, 10), st.integers(1, 10), st.integers(11, 33), st.just(128)))
    n = draw(st.one_of(st.integers(1, m), st.just(m // 2 or 1)))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4 if m < 11 else 2))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] = m * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_scores(rng, draw(st.sampled_from(DTYPES)), tuple(shape)), n, m, axis


@pytest.mark.slow
@hypothesis.given(cases())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_reference(case):
    scores, n, m, axis = case
    mask = nm_mask(scores, n, m, axis=axis)
    assert mask.dtype == bool and mask.shape == scores.shape
    np.testing.assert_array_equal(mask, reference.nm_mask(scores, n, m, axis))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (4, 16)])
def test_ranks_every_dtype_as_the_reference(dtype, n, m):
    scores = random_scores(np.random.default_rng(m), dtype, (48, 16))
    np.testing.assert_array_equal(nm_mask(scores, n, m, axis=1), reference.nm_mask(scores, n, m, 1))


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_exactly_n_of_every_m_stay(n, m):
    scores = random_scores(np.random.default_rng(0), "float32", (3 * m, 2))
    mask = js.nm_mask(scores, n, m, axis=0)
    np.testing.assert_array_equal(mask, reference.nm_mask(scores, n, m, 0))
    np.testing.assert_array_equal(np.asarray(mask).reshape(3, m, 2).sum(1), n)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_all_equal_keeps_the_first_n(n, m):
    expected = np.tile(np.arange(m) < n, 2)
    lowest = jnp.iinfo("int32").min
    for scores in (
        np.zeros(2 * m, "float32"),
        np.full(2 * m, np.nan, "bfloat16"),
        np.full(2 * m, -np.inf),
        np.full(2 * m, lowest),
    ):
        np.testing.assert_array_equal(nm_mask(scores, n, m, axis=0), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [4, 16])
def test_nan_of_either_sign_ranks_highest_and_signs_of_zero_tie(dtype, m):
    top = 1 if dtype == "float8_e4m3fn" else np.inf
    scores = np.zeros(2 * m, "float32")
    scores[[1, 3]], scores[2] = [-np.nan, np.nan], top
    scores[m] = -0.0
    mask = np.asarray(js.nm_mask(jnp.asarray(scores, dtype), 2, m, axis=0))
    assert np.flatnonzero(mask).tolist() == [1, 3, m, m + 1]


@pytest.mark.parametrize("m", [4, 16])
def test_denormals_rank_above_zero(m):
    for dtype in FLOATS:
        tiny = jnp.finfo(dtype).smallest_subnormal
        scores = np.zeros(m, dtype)
        scores[-1] = tiny
        assert np.flatnonzero(js.nm_mask(scores, 1, m, axis=0)).tolist() == [m - 1], dtype


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fnuz", "float4_e2m1fn", "int4"])
def test_the_other_narrow_dtypes_rank_as_their_values(dtype):
    scores = np.array([1, -1, 2, 3, -2, 1, 0, 1], "float32")
    np.testing.assert_array_equal(
        js.nm_mask(jnp.asarray(scores.astype(jnp.dtype(dtype))), 2, 4, axis=0),
        reference.nm_mask(scores, 2, 4, 0),
    )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_no_scores_have_no_mask(shape):
    for axis in range(len(shape)):
        assert js.nm_mask(jnp.zeros(shape), 2, 4, axis=axis).shape == shape


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 12)])
def test_transformations_give_the_same_mask(n, m):
    scores = jnp.asarray(random_scores(np.random.default_rng(1), "float32", (5, 2 * m, 3)))
    expected = reference.nm_mask(scores, n, m, 1)
    one = lambda scores: js.nm_mask(scores, n, m, axis=0)  # noqa: E731
    np.testing.assert_array_equal(js.nm_mask(scores, n, m, axis=1), expected)
    np.testing.assert_array_equal(nm_mask(scores, n, m, axis=1), expected)
    np.testing.assert_array_equal(jax.vmap(one)(scores), expected)
    np.testing.assert_array_equal(
        jax.vmap(lambda s: js.nm_mask(s, n, m, axis=-1), 2, 2)(scores), expected
    )
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(one, 1, 1)))(scores), expected)
    np.testing.assert_array_equal(
        jax.lax.scan(lambda _, s: (None, one(s)), None, scores)[1], expected
    )
    np.testing.assert_array_equal(jax.lax.map(jax.checkpoint(one), scores), expected)


@pytest.mark.parametrize("m", [4, 12])
def test_gradients_stop_at_the_mask(m):
    w = jnp.asarray(np.random.default_rng(2).normal(size=(2 * m, 3)), jnp.float32)

    def loss(w, n):
        return jnp.where(js.nm_mask(jnp.abs(w), n, m, axis=0), w, 0).sum()

    expected = reference.nm_mask(np.abs(w), 2, m, 0).astype("float32")
    np.testing.assert_array_equal(jax.grad(loss)(w, 2), expected)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w, 2), expected)
    value, tangent = jax.jvp(
        lambda w: js.nm_mask(w, 2, m, axis=0).astype(w.dtype), (w,), (jnp.ones_like(w),)
    )
    np.testing.assert_array_equal(tangent, jnp.zeros_like(value))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 4, 8, 20])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8"])
def test_traced_n_equals_static_n_without_a_retrace(m, dtype):
    scores = jnp.asarray(random_scores(np.random.default_rng(3), "bfloat16", (2, 2 * m)))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def mask(scores, n):
        return js.nm_mask(scores, n, m, axis=1)

    for n in {1, m // 2 or 1, m - 1 or 1, m}:
        np.testing.assert_array_equal(
            mask(scores, jnp.asarray(n, dtype)), js.nm_mask(scores, n, m, axis=1)
        )
    for n in range(1, m + 1):
        np.testing.assert_array_equal(
            mask(scores, jnp.asarray(n, dtype)), reference.nm_mask(scores, n, m, 1)
        )
    assert not mask(scores, jnp.asarray(0, dtype)).any()
    assert mask(scores, jnp.asarray(m + 3, dtype)).all()


@pytest.mark.slow
@pytest.mark.parametrize("m", [4, 20])
def test_traced_n_may_differ_from_one_batch_member_to_the_next(m):
    scores = jnp.asarray(random_scores(np.random.default_rng(4), "float32", (m, 2 * m)))
    masks = jax.jit(jax.vmap(lambda s, n: js.nm_mask(s, n, m, axis=0)))(
        scores, jnp.arange(1, m + 1)
    )
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, reference.nm_mask(scores[row], row + 1, m, 0))
    shared = jax.vmap(lambda n: js.nm_mask(scores[0], n, m, axis=0))(jnp.array([1, m]))
    np.testing.assert_array_equal(shared.sum(1), [2, 2 * m])


def test_integer_like_n_m_and_axis_are_accepted():
    scores = jnp.array([3.0, 1.0, 2.0, 2.0])
    for n, m, axis in [
        (np.int64(2), np.uint8(4), np.int32(-1)),
        (jnp.int32(2), jnp.int32(4), jnp.int8(0)),
    ]:
        assert js.nm_mask(scores, n, m, axis=axis).tolist() == [True, False, True, False]


def test_no_wide_types_appear():
    for m in (4, 16):
        program = str(jax.make_jaxpr(lambda s, m=m: js.nm_mask(s, 2, m, axis=0))(jnp.zeros(32)))
        assert "64[" not in program
    with jax.enable_x64(True):
        scores = np.random.default_rng(5).normal(size=(16, 2))
        np.testing.assert_array_equal(
            js.nm_mask(scores, 2, 4, axis=0), reference.nm_mask(scores, 2, 4, 0)
        )


def params():
    w = jnp.asarray(np.random.default_rng(6).normal(size=(8, 3)), jnp.float32)
    return {"b": jnp.zeros(3), "in": {"w": w}, "out": [w.T, jnp.ones(())]}


def test_magnitude_masks_rank_absolute_values_and_are_scalars_where_dense():
    tree = params()
    masks = js.magnitude_masks(
        tree, js.plan(tree, {"in/w": js.NM(2, 4, axis=0), "out/0": js.NM(1, 8, axis=1)})
    )
    assert jax.tree.structure(masks) == jax.tree.structure(tree)
    np.testing.assert_array_equal(
        masks["in"]["w"], reference.nm_mask(np.abs(tree["in"]["w"]), 2, 4, 0)
    )
    np.testing.assert_array_equal(
        masks["out"][0], reference.nm_mask(np.abs(tree["out"][0]), 1, 8, 1)
    )
    for dense in (masks["b"], masks["out"][1]):
        assert dense.shape == () and dense.dtype == bool and dense


def test_magnitude_masks_meet_params_in_tree_map():
    tree = params()
    masks = js.magnitude_masks(tree, js.plan(tree, {"in/*": js.NM(2, 4, axis=0)}))
    masked = jax.tree.map(lambda w, mask: jnp.where(mask, w, 0), tree, masks)
    assert jax.tree.map(jnp.shape, masked) == jax.tree.map(jnp.shape, tree)
    assert np.count_nonzero(masked["in"]["w"]) == 12
    assert optax.tree.sum(jax.tree.map(lambda w, k: jnp.where(k, 0, abs(w)).sum(), tree, masks)) > 0


def test_magnitude_masks_agree_under_jit_and_in_narrow_dtypes():
    tree = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params())
    plan = js.plan(tree, {"in/w": js.NM(2, 4, axis=0)})
    eager, jitted = js.magnitude_masks(tree, plan), jax.jit(js.magnitude_masks)(tree, plan)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    np.testing.assert_array_equal(
        eager["in"]["w"], reference.nm_mask(np.abs(tree["in"]["w"].astype("float32")), 2, 4, 0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "int64", "float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 16), (2, 32), (5, 32)])
def test_masks_in_64_bits(n, m, dtype):
    with jax.enable_x64(True):
        scores = jnp.asarray(np.random.default_rng(0).permutation(2 * m).reshape(m, 2), dtype)
        np.testing.assert_array_equal(
            js.nm_mask(scores, n, m, axis=0),
            reference.nm_mask(np.asarray(scores, float), n, m, axis=0),
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4", "uint4"])
def test_every_mask_takes_numbers_of_8_bits_and_fewer(dtype):
    values = np.random.default_rng(0).integers(0, 8, (32, 8))
    scores = jnp.asarray(values, dtype)
    for mask in (
        lambda s: js.nm_mask(s, 5, 32, axis=0),
        lambda s: js.nm_mask(s, 1, 16, axis=0),
        lambda s: js.topk_mask(s, 0.3),
        lambda s: js.transposable_nm_mask(s, 2, 4, axes=(0, 1)),
        lambda s: js.block_mask(s, (4, 4), 0.5, axes=(0, 1)),
        lambda s: js.block_mask(s, (4, 4), 0.5, axes=(0, 1), pool="mean"),
    ):
        np.testing.assert_array_equal(mask(scores), mask(values.astype(np.float32)))


def test_leaves_of_8_bits_rank_together_with_others():
    values = np.random.default_rng(0).permutation(32).reshape(2, 16) / 4
    params = {"a": jnp.asarray(values[0], "float8_e4m3fn"), "b": jnp.asarray(values[1], "bfloat16")}
    masks = js.magnitude_masks(params, js.plan(params, {"*": js.Unstructured(0.25, "global")}))
    rounded = np.concatenate([np.asarray(params[name], np.float32) for name in "ab"])
    np.testing.assert_array_equal(
        np.concatenate([masks["a"], masks["b"]]), reference.topk_mask(rounded, 8)
    )
