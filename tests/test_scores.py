"""Masks rank the scores that `renew` selects."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import jaxsparse as js

RNG = np.random.default_rng(0)
W = RNG.normal(size=(8, 3)).astype("float32")
G = RNG.normal(size=(8, 3)).astype("float32")
F = RNG.random((8, 3)).astype("float32")
PARAMS, GRADS, FISHER = ({"w": jnp.asarray(x), "b": jnp.zeros(3)} for x in (W, G, F))
PLAN = js.plan(PARAMS, {"w": js.NM(2, 4, axis=0)})


def rewired_masks(score, **extra):
    """The masks of init, and the masks after one update that changes no weight."""
    tx = js.rewire(optax.sgd(0.0), PLAN, renew=js.by_score(score))
    state = tx.init(PARAMS)
    _, new = jax.jit(tx.update)(GRADS, state, PARAMS, **extra)
    return np.asarray(js.masks(state)["w"]), np.asarray(js.masks(new)["w"])


def expected(scores):
    return reference.nm_mask(scores, 2, 4, 0)


@pytest.mark.parametrize(
    ("score", "scores", "extra"),
    [
        ("magnitude", abs(W), {}),
        ("first_order", abs(W * G), {}),
        ("fisher", W**2 * F, {"fisher": FISHER}),
        (
            js.Score(lambda path, w, g: (g if path == "w" else w) - w, needs_gradient=True),
            G - W,
            {},
        ),
    ],
)
def test_masks_rank_the_score(score, scores, extra):
    before, after = rewired_masks(score, **extra)
    np.testing.assert_array_equal(after, expected(scores))
    if isinstance(score, str):
        np.testing.assert_array_equal(before, expected(abs(W)))


def test_random_masks_stay_and_differ_by_seed():
    first, again = rewired_masks("random")
    np.testing.assert_array_equal(first, again)
    assert (first != rewired_masks(js.random_score(1))[0]).any()
    assert (first.reshape(2, 4, 3).sum(1) == 2).all()


def test_recipes_take_a_score():
    tx = js.recipes.explore_exploit(
        optax.sgd(0.0), PLAN, reset_every=None, renew=js.by_score("first_order")
    )
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(js.masks(state)["w"], expected(abs(W * G)))


def test_the_fisher_diagonal_is_the_mean_of_squares():
    x = RNG.normal(size=(5, 3)).astype("float32")
    diagonal = js.diagonal_fisher(lambda p, row: jnp.tanh(row @ p["v"]), {"v": jnp.ones(3)}, x)["v"]
    each = [(1 - np.tanh(row.sum()) ** 2) * row for row in x]
    np.testing.assert_allclose(diagonal, np.mean(np.square(each), 0), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_fisher_diagonal_is_summed_in_float32(dtype):
    diagonal = js.diagonal_fisher(
        lambda w, x: (w * x).sum(),
        jnp.zeros(2, dtype),
        jnp.tile(jnp.array([1.0, 1e-4], dtype), (1000, 1)),
    )
    # in bfloat16 a sum of ones ends at 256; in float16 1e-8 is 0
    np.testing.assert_allclose(diagonal, [1.0, 1e-8], rtol=0.01)


@pytest.mark.parametrize("score", ["first_order", "fisher"])
def test_scores_below_what_float16_holds_still_rank(score):
    w, g = jnp.array([1e-4, 2e-4, 3e-4, 4e-4], "float16"), jnp.full(4, 1e-5, "float16")
    plan = js.plan({"w": w}, {"w": js.NM(2, 4, axis=0)})
    tx = js.rewire(optax.sgd(0.0), plan, renew=js.by_score(score))
    extra = {"fisher": {"w": g}} if score == "fisher" else {}
    _, state = tx.update({"w": g}, tx.init({"w": w}), {"w": w}, **extra)
    assert js.masks(state)["w"].tolist() == [False, False, True, True]


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match="by_score: there is no score 'size'"):
        js.by_score("size")
    with pytest.raises(TypeError, match="by_score: `score` is 3"):
        js.by_score(3)
    with pytest.raises(ValueError, match="rewire: the score of w has shape"):
        renew = js.by_score(js.Score(lambda path, w: w.sum()))
        js.rewire(optax.sgd(0.1), PLAN, renew=renew).init(PARAMS)
    with pytest.raises(ValueError, match="rewire: `fisher` is missing"):
        rewired_masks("fisher")
