"""Full short runs of every recipe equal a NumPy transcription of its paper, also when resumed."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithm1 import AdamW, Momentum, gradients

import jaxsparse as js
from jaxsparse._training.phases import as_step

STEPS = 20  # dense_until=0.1 is step 2, fine_tune_from=0.7 is step 14
PHASES = {"total_steps": STEPS, "dense_until": 0.1, "fine_tune_from": 0.7}


def largest(w, n, m):
    """The n of every m rows with the largest magnitudes; ties keep the lower row."""
    mask = np.zeros(w.shape, bool)
    for column in range(w.shape[1]):
        for start in range(0, len(w), m):
            rows = sorted(range(start, start + m), key=lambda row: (-abs(w[row, column]), row))
            mask[rows[:n], column] = True
    return mask


def top(w, density):
    mask = np.zeros(w.size, bool)
    mask[np.argsort(-abs(w).ravel(), kind="stable")[: math.floor(density * w.size + 0.5)]] = True
    return mask.reshape(w.shape)


def top_blocks(w, density, size=2):
    worth = abs(w).reshape(len(w) // size, size, w.shape[1] // size, size).max((1, 3))
    return np.kron(top(worth, density), np.ones((size, size), bool))


def phased(tables):
    """The mask that changes by `tables`: (first step, last step + 1, every, how).

    Outside of these steps every weight participates.
    """

    def mask_of(t, w, last):
        for begin, end, every, mask in tables:
            if begin <= t < end:
                return mask(w) if (t - begin) % every == 0 else last
        return np.ones(w.shape, bool) if last is None or last.all() else last

    return mask_of


def kept(n, m):
    return lambda w: largest(w, n, m)


def linear(t):
    return max(1 - max(t - 2, 0) / 12, 0)


def exponential(t):
    return math.exp(-math.log(100) / 12 * max(t - 2, 0)) if t < 14 else 0.0


def density(initial, t, first=2, last=14):
    """Zhu and Gupta's sparsity s_t as a density, for a planned density of 0.25."""
    return 1 - (0.75 + (1 - initial - 0.75) * (1 - (t - first) / (last - first)) ** 3)


def falling(select, initial, every):
    """The masks of gradual pruning: they change every few steps, for the last time at step 14."""

    def mask_of(t, w, last):
        if t < 2:
            return np.ones(w.shape, bool)
        due = t == 14 or (t < 14 and (t - 2) % every == 0)
        return select(w, density(initial, t)) if due else last

    return mask_of


class Case(NamedTuple):
    """A recipe, and its paper's definition of step t, the weights and the last mask."""

    recipe: Callable
    mask: Callable
    factor: Callable = lambda t: 0.0
    gradient: str = "dense"
    pull: float = 0.0
    zeroed: bool = False
    pattern: object = js.NM(1, 4, axis=0)


GIVEN = np.random.default_rng(9).random((16, 6)) < 0.6
R = js.recipes
U, B, T = js.Unstructured(0.25), js.Block((2, 2), 0.25, (0, 1)), js.TransposableNM(2, 4, (0, 1))
ONE = kept(1, 4)
CASES = {
    "sr-ste": Case(
        functools.partial(R.sr_ste, weight_decay=0.3), phased([(0, 99, 1, ONE)]), pull=0.3
    ),
    "sr-ste, dense before": Case(
        functools.partial(R.sr_ste, weight_decay=0.3, dense_until=0.25, total_steps=STEPS),
        phased([(5, 99, 1, ONE)]),
        pull=0.3,
    ),
    "sr-ste, every third": Case(
        functools.partial(R.sr_ste, weight_decay=0.3, dense_until=4, every=3),
        phased([(4, 99, 3, ONE)]),
        pull=0.3,
    ),
    "mdgf": Case(
        functools.partial(R.mdgf, **PHASES), phased([(2, 99, 1, ONE)]), exponential, "masked"
    ),
    "mdgf linear": Case(
        functools.partial(R.mdgf, curve="linear", **PHASES),
        phased([(2, 99, 1, ONE)]),
        linear,
        "masked",
    ),
    "mdgf as the authors' code": Case(
        functools.partial(R.mdgf, gradient="dense", **PHASES),
        phased([(2, 99, 1, ONE)]),
        exponential,
    ),
    "mdgf linear, dense gradient, every fifth": Case(
        functools.partial(R.mdgf, curve="linear", gradient="dense", every=5, **PHASES),
        phased([(2, 99, 5, ONE)]),
        linear,
    ),
    "mdgf from the start": Case(
        functools.partial(
            R.mdgf, total_steps=STEPS, dense_until=0, fine_tune_from=19, curve="linear"
        ),
        phased([(0, 99, 1, ONE)]),
        lambda t: 1 - t / 19,
        "masked",
    ),
    "mdgf unstructured": Case(
        functools.partial(R.mdgf, **PHASES),
        phased([(2, 99, 1, lambda w: top(w, 0.25))]),
        exponential,
        "masked",
        pattern=U,
    ),
    "sdgf": Case(
        functools.partial(R.sdgf, **PHASES),
        phased([(2, 6, 1, kept(3, 4)), (6, 10, 1, kept(2, 4)), (10, 99, 1, kept(1, 4))]),
    ),
    "sdgf 2:4, every fourth": Case(
        functools.partial(R.sdgf, every=4, **PHASES),
        lambda t, w, last: (
            np.ones(w.shape, bool)
            if t < 2
            else kept(3 if t < 8 else 2, 4)(w)
            if t in (2, 6, 8, 10, 14, 18)
            else last
        ),
        pattern=js.NM(2, 4, axis=0),
    ),
    "sdgf geometric": Case(
        functools.partial(R.sdgf, stages="geometric", k=4, **PHASES),
        phased([(2, 6, 1, kept(4, 16)), (6, 10, 1, kept(2, 8)), (10, 99, 1, kept(1, 4))]),
    ),
    "sdgf in stages of one step": Case(
        functools.partial(R.sdgf, total_steps=STEPS, dense_until=0, fine_tune_from=3),
        phased([(0, 1, 1, kept(3, 4)), (1, 2, 1, kept(2, 4)), (2, 99, 1, kept(1, 4))]),
    ),
    "sdgf in uneven stages": Case(
        functools.partial(R.sdgf, total_steps=STEPS, dense_until=3, fine_tune_from=14),
        phased([(3, 6, 1, kept(3, 4)), (6, 10, 1, kept(2, 4)), (10, 99, 1, kept(1, 4))]),
    ),
    "gradual": Case(
        functools.partial(R.gradual, **PHASES), falling(top, 1.0, 1), gradient="masked", pattern=U
    ),
    "gradual, every fifth": Case(
        functools.partial(R.gradual, every=5, initial=0.75, **PHASES),
        falling(top, 0.75, 5),
        gradient="masked",
        pattern=U,
    ),
    "gradual blocks": Case(
        functools.partial(R.gradual, **PHASES),
        falling(top_blocks, 1.0, 1),
        gradient="masked",
        pattern=B,
    ),
    "static": Case(
        R.static,
        lambda t, w, last: kept(1, 4)(w) if last is None else last,
        gradient="masked",
        zeroed=True,
    ),
    "static, given masks": Case(
        functools.partial(R.static, masks={"w": GIVEN, "b": True}),
        lambda t, w, last: GIVEN,
        gradient="masked",
        zeroed=True,
    ),
}


def problem():
    random = np.random.default_rng(3)
    params = {"w": random.normal(size=(16, 6)), "b": random.normal(size=6)}
    batches = [(random.normal(size=(8, 16)), random.normal(size=(8, 6))) for _ in range(STEPS)]
    return params, batches


def transcription(case, optimizer):
    """The weights after each step, and the mask and decay factor of its forward pass."""
    params, batches = problem()
    w, b, mask, history = params["w"], params["b"], None, []
    for t, (x, y) in enumerate(batches):
        mask = case.mask(t, w, mask)
        factor = case.factor(t)
        grads = gradients({"w": np.where(mask, w, factor * w), "b": b}, x, y)
        if case.gradient == "masked":
            grads["w"] = np.where(mask, grads["w"], factor * grads["w"])
        grads["w"] = np.where(mask, grads["w"], grads["w"] + case.pull * w)
        w, b = optimizer.step("w", w, grads["w"], t), optimizer.step("b", b, grads["b"], t)
        if case.zeroed:
            w = np.where(mask, w, 0.0)
        history.append((w, b, mask, factor))
    return history


def trainer(case, optimizer):
    params, batches = problem()
    tx = case.recipe(optimizer.optax(), js.plan(params, {"w": case.pattern}))

    def loss(params, state, x, y):
        effective = js.effective_params(params, state)
        return jnp.mean((x @ effective["w"] + effective["b"][None] - y) ** 2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, state, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    return step, params, tx.init(params), batches


def used_factor(params, state):
    """The factor on non-participating weights in the next forward pass; None if there are none."""
    ones = jax.tree.map(jnp.ones_like, params)
    factors = np.asarray(js.effective_params(ones, state)["w"])[~np.asarray(js.masks(state)["w"])]
    return factors.mean() if factors.size else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *((name, AdamW) for name in CASES),
        *((name, Momentum) for name in ("sr-ste", "mdgf", "sdgf", "static")),
    ],
)
def test_a_run_equals_the_transcription_and_itself_when_resumed_at_any_step(name, optimizer):
    case = CASES[name]
    expected, saved = transcription(case, optimizer()), []
    # the decay factor is a float32
    tight = (
        {"rtol": 1e-5, "atol": 1e-6} if name.startswith("mdgf") else {"rtol": 1e-9, "atol": 1e-12}
    )
    with jax.enable_x64(True):
        step, params, state, batches = trainer(case, optimizer())
        for t, ((x, y), (w, b, mask, factor)) in enumerate(zip(batches, expected, strict=True)):
            saved.append([np.asarray(leaf) for leaf in jax.tree.leaves((params, state))])
            np.testing.assert_array_equal(js.masks(state)["w"], mask, err_msg=f"mask at step {t}")
            used = used_factor(params, state)
            if used is not None:
                np.testing.assert_allclose(
                    used, factor, rtol=1e-6, atol=0, err_msg=f"decay factor at step {t}"
                )
            params, state = step(params, state, x, y)
            np.testing.assert_allclose(params["w"], w, **tight, err_msg=f"weights after step {t}")
            np.testing.assert_allclose(params["b"], b, **tight, err_msg=f"bias after step {t}")
            np.testing.assert_array_equal(params["w"] == 0, w == 0, err_msg=f"zeros after step {t}")

        # a new recipe with the same arguments, as another process would make it
        _, *fresh, _ = trainer(case, optimizer())
        for begin, leaves in enumerate(saved):
            resumed = jax.tree.unflatten(jax.tree.structure(tuple(fresh)), map(jnp.asarray, leaves))
            for x, y in batches[begin:]:
                resumed = step(*resumed, x, y)
            jax.tree.map(
                functools.partial(np.testing.assert_array_equal, err_msg=f"from step {begin}"),
                resumed,
                (params, state),
            )


def test_the_transcriptions_differ_and_rewire():
    ends = {name: transcription(case, Momentum())[-1][0].tobytes() for name, case in CASES.items()}
    assert len(set(ends.values())) == len(ends)
    for name in ("sr-ste", "mdgf", "mdgf as the authors' code", "sdgf"):
        masks = [mask for *_, mask, _ in transcription(CASES[name], Momentum())[11:]]
        assert any((a != b).any() for a, b in itertools.pairwise(masks)), name


@pytest.mark.parametrize(
    ("value", "total", "step"),
    [
        *[
            (0, 10, 0),
            (3, 10, 3),
            (10, 10, 10),
            (np.int64(4), 10, 4),
            (7, None, 7),
            (0.0, 10, 0),
            (1.0, 10, 10),
            (0.05, 30, 2),
        ],
        *[
            (0.7, 10, 7),
            (0.7, 15, 11),
            (1 / 3, 3000, 1000),
            (np.float32(0.7), 10, 7),
            (0.05, 10, 1),
            (0.0125, 1000, 13),
        ],
    ],
)
def test_a_boundary_is_a_step_or_a_fraction_rounded_to_the_nearest(value, total, step):
    assert as_step("recipe", "boundary", value, total) == step


@pytest.mark.parametrize("total_steps", [4, 5, 10, 37, 100, 350, 1001])
@pytest.mark.parametrize("curve", ["linear", "exponential"])
def test_the_factor_is_1_at_the_start_above_0_before_fine_tuning_and_exactly_0_from_there(
    total_steps, curve
):
    params = {"w": jnp.arange(8.0)}
    tx = js.recipes.mdgf(
        optax.sgd(0.0),
        js.plan(params, {"w": js.NM(2, 4, axis=0)}),
        total_steps=total_steps,
        curve=curve,
        dense_until=1,
    )
    begin, end = 1, as_step("recipe", "boundary", 0.7, total_steps)
    _, factors = jax.lax.scan(
        lambda state, _: (tx.update(params, state, params)[1], state.forward.decay_factor),
        tx.init(params),
        None,
        total_steps,
    )
    assert (factors[: begin + 1] == 1).all() and (factors[end:] == 0).all()
    assert (factors[:end] > 0).all() and (np.diff(factors[begin : end + 1]) < 0).all()
    if curve == "exponential":
        np.testing.assert_allclose(
            factors[end - 1], 0.01 ** ((end - 1 - begin) / (end - begin)), rtol=1e-5
        )
