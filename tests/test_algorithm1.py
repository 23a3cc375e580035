"""`recipes.explore_exploit` equals a NumPy transcription of Algorithm 1 for ten steps.

The algorithm is that of "Advances in Sparse Neural Model Training".
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

STEPS = 10
N, M = 2, 4


def top_magnitudes(w):
    """The mask of the 2 largest magnitudes of every 4 rows; ties keep the lower row."""
    mask = np.zeros(w.shape, bool)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], M):
            group = list(range(start, start + M))
            for row in sorted(group, key=lambda r: (-abs(w[r, column]), r))[:N]:
                mask[row, column] = True
    return mask


class Momentum:
    def __init__(self, rate=0.1, momentum=0.9):
        self.rate, self.momentum, self.velocity = rate, momentum, {}

    def step(self, name, w, g, t):
        self.velocity[name] = g + self.momentum * self.velocity.get(name, np.zeros_like(w))
        return w - self.rate * self.velocity[name]

    def optax(self):
        return optax.sgd(self.rate, momentum=self.momentum)


class AdamW:
    def __init__(self, rate=0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2):
        self.rate, self.b1, self.b2, self.eps, self.weight_decay = rate, b1, b2, eps, weight_decay
        self.first, self.second = {}, {}

    def step(self, name, w, g, t):
        zero = np.zeros_like(w)
        self.first[name] = self.b1 * self.first.get(name, zero) + (1 - self.b1) * g
        self.second[name] = self.b2 * self.second.get(name, zero) + (1 - self.b2) * g**2
        mean = self.first[name] / (1 - self.b1 ** (t + 1))
        variance = self.second[name] / (1 - self.b2 ** (t + 1))
        return w - self.rate * (mean / (np.sqrt(variance) + self.eps) + self.weight_decay * w)

    def optax(self):
        return optax.adamw(self.rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)


def gradients(effective, x, y):
    """Gradients of the mean squared error of `x @ w + b` for the effective weights, by hand."""
    error = x @ effective["w"] + effective["b"][None] - y
    return {"w": 2 * x.T @ error / error.size, "b": 2 * error.sum(0) / error.size}


def algorithm_1(
    params,
    batches,
    optimizer,
    *,
    every=1,
    grad_scale=1.0,
    reset_every=None,
    fix_after=None,
    weight_decay=0.0,
):
    """The weights after each step, and the masks that each step's forward pass used."""
    w, b, mask = params["w"].copy(), params["b"].copy(), None
    history = []
    for t, (x, y) in enumerate(batches):
        fixed = fix_after is not None and t >= fix_after
        if mask is None or (t % every == 0 and not fixed):
            mask = top_magnitudes(w)
        grads = gradients({"w": w * mask, "b": b}, x, y)
        grads["w"] = np.where(mask, grads["w"], grad_scale * grads["w"])
        w = optimizer.step("w", w, grads["w"], t)
        b = optimizer.step("b", b, grads["b"], t)
        if fixed or (reset_every is not None and t % reset_every == 0):
            w = np.where(mask, w, 0.0)
        w = np.where(mask, w, w - weight_decay * w)
        history.append((w.copy(), b.copy(), mask))
    return history


def library(params, batches, optimizer, **recipe):
    params = jax.tree.map(jnp.asarray, params)
    tx = js.recipes.explore_exploit(
        optimizer.optax(),
        js.plan(params, {"w": js.NM(N, M, axis=0)}),
        **{"reset_every": None, **recipe},
    )

    def loss(params, state, x, y):
        effective = js.effective_params(params, state)
        return jnp.mean((x @ effective["w"] + effective["b"][None] - y) ** 2)

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, state, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for x, y in batches:
        mask = np.asarray(js.masks(state)["w"])
        params, state = step(params, state, x, y)
        history.append((np.asarray(params["w"]), np.asarray(params["b"]), mask))
    return history


RECIPES = {
    "none": {},
    "fix": {"fix_after": 5},
    "fix from the start": {"fix_after": 0},
    "reset": {"reset_every": 3},
    "reset every step": {"reset_every": 1},
    "regularize": {"weight_decay": 0.3},
    "rewire every third": {"every": 3},
    "gradient scaled": {"grad_scale": 0.25},
    "gradient of non-participating weights off": {"grad_scale": 0.0},
    "fix between two rewirings": {"every": 4, "fix_after": 6},
    "all": {"every": 2, "grad_scale": 0.5, "reset_every": 4, "fix_after": 7, "weight_decay": 0.1},
}


@pytest.mark.parametrize("optimizer", [Momentum, AdamW])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_ten_steps_equal_algorithm_1(recipe, optimizer):
    random = np.random.default_rng(3)
    params = {"w": random.normal(size=(16, 6)), "b": random.normal(size=6)}
    batches = [(random.normal(size=(8, 16)), random.normal(size=(8, 6))) for _ in range(STEPS)]
    expected = algorithm_1(params, batches, optimizer(), **recipe)
    with jax.enable_x64(True):
        steps = library(params, batches, optimizer(), **recipe)
    assert len(steps) == STEPS
    for t, ((w, b, mask), (w_expected, b_expected, mask_expected)) in enumerate(
        zip(steps, expected, strict=True)
    ):
        assert w.dtype == np.float64
        np.testing.assert_array_equal(mask, mask_expected, err_msg=f"masks at step {t}")
        np.testing.assert_allclose(
            w, w_expected, rtol=1e-9, atol=1e-12, err_msg=f"weights after step {t}"
        )
        np.testing.assert_allclose(
            b, b_expected, rtol=1e-9, atol=1e-12, err_msg=f"bias after step {t}"
        )
        np.testing.assert_array_equal(w == 0, w_expected == 0, err_msg=f"zeros after step {t}")


def test_fix_may_be_a_fraction_of_training():
    random = np.random.default_rng(3)
    params = {"w": random.normal(size=(16, 6)), "b": random.normal(size=6)}
    batches = [(random.normal(size=(8, 16)), random.normal(size=(8, 6))) for _ in range(STEPS)]
    by_step, by_fraction = (
        library(params, batches, Momentum(), **fix)
        for fix in ({"fix_after": 5}, {"fix_after": 0.5, "total_steps": STEPS})
    )
    jax.tree.map(np.testing.assert_array_equal, by_fraction, by_step)


def test_the_recipes_differ_in_these_ten_steps():
    random = np.random.default_rng(3)
    params = {"w": random.normal(size=(16, 6)), "b": random.normal(size=6)}
    batches = [(random.normal(size=(8, 16)), random.normal(size=(8, 6))) for _ in range(STEPS)]
    runs = [algorithm_1(params, batches, Momentum(), **recipe) for recipe in RECIPES.values()]
    ends = {name: run[-1][0].tobytes() for name, run in zip(RECIPES, runs, strict=True)}
    # z = 1 is training without rewiring
    assert ends.pop("reset every step") == ends["fix from the start"]
    assert len(set(ends.values())) == len(ends)
    rewired = sum((a[2] != b[2]).any() for a, b in zip(runs[0], runs[0][1:], strict=False))
    assert rewired >= 5
