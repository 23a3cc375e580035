"""Each optax transformation alone, and all of them under the optimizers and wrappers of optax."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import promotion
import pytest
from flax import nnx

import jaxsparse as js

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2),
}
RECIPE = {"reset_every": 2, "grad_scale": 0.5, "weight_decay": 0.1}
W, MASK = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([False, False, True, True])


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    weights = [jax.random.normal(key, (8, 4), dtype) for key in keys]
    return {"a": {"b": jnp.zeros(4, dtype), "w": weights[0]}, "c": {"w": weights[1]}}


def make_grads(params, step, dtype=None):
    key = jax.random.fold_in(jax.random.key(7), step)
    return jax.tree.map(lambda p: jax.random.normal(key, p.shape, dtype or p.dtype), params)


def both(n=2, m=4):
    return js.plan(make_params(), {"*/w": js.NM(n, m, axis=0)})


def only(rule, n=2, m=4):
    return js.plan(make_params(), {rule: js.NM(n, m, axis=0)})


def test_scale_multiplies_the_gradient_of_non_participating_weights():
    tx = js.scale_nonparticipating(0.25)
    np.testing.assert_array_equal(
        tx.update(jnp.full(4, 8.0), tx.init(W), W, masks=MASK)[0], [2, 2, 8, 8]
    )


def test_sr_ste_worked_values():
    tx = js.add_decayed_nonparticipating(2e-4)
    updates = tx.update(jnp.full(4, 10.0), tx.init(W), W, masks=MASK)[0]
    np.testing.assert_allclose(updates, [10.0002, 10.0004, 10, 10], rtol=1e-7)


def test_decay_shrinks_the_updated_weight():
    tx = js.decay_nonparticipating(0.25)
    updates, _ = tx.update(jnp.ones(4), tx.init(W), W, masks=MASK)
    np.testing.assert_array_equal(W + updates, [1.5, 2.25, 4, 5])


@pytest.mark.parametrize(
    "tx, zero_at",
    [(js.reset_nonparticipating(3), {0, 3, 6}), (js.fix_nonparticipating(4), {4, 5, 6, 7})],
)
def test_reset_and_fix_zero_at_their_steps(tx, zero_at):
    state = tx.init(W)
    for step in range(8):
        updates, state = tx.update(jnp.full(4, 0.5), state, W, masks=MASK)
        np.testing.assert_array_equal(
            W + updates, [0, 0, 3.5, 4.5] if step in zero_at else [1.5, 2.5, 3.5, 4.5]
        )


def test_rewire_holds_masks_between_and_after_its_steps():
    params = {"w": W}
    tx = js.rewire(optax.identity(), js.plan(params, {"w": js.NM(2, 4, axis=0)}), every=3, until=7)
    state, seen = tx.init(params), []
    for step in range(12):
        seen.append(np.flatnonzero(js.masks(state)["w"]).tolist())
        target = jnp.roll(jnp.array([1.0, 2.0, 3.0, 4.0]), step + 1)  # the weights before step + 1
        updates, state = tx.update({"w": target - params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
    at = {0: [2, 3], 3: [1, 2], 6: [0, 1]}  # the indices of the two largest of roll(step)
    assert seen == [at[min(step // 3 * 3, 6)] for step in range(12)]


@pytest.mark.promotes("optax.apply_updates adds updates of another dtype")
@pytest.mark.parametrize(
    "weights, updates", list(itertools.product([jnp.float32, jnp.bfloat16, jnp.float16], repeat=2))
)
def test_reset_weights_are_zero_as_exactly_as_updates_are_wide(weights, updates):
    params = jax.tree.map(lambda p: p * 1.2345, make_params(weights))
    tx = js.rewire(optax.chain(optax.sgd(0.3), js.reset_nonparticipating(1)), both())
    state = tx.init(params)
    step, state = tx.update(make_grads(params, 0, updates), state, params)
    new = optax.apply_updates(params, step)
    mask = js.magnitude_masks(params, both())
    assert all(u.dtype == updates for u in jax.tree.leaves(step))
    for leaf, kept in ((new["a"]["w"], mask["a"]["w"]), (new["c"]["w"], mask["c"]["w"])):
        assert leaf.dtype == weights
        rounding = 0 if jnp.promote_types(weights, updates) == updates else jnp.finfo(updates).eps
        dropped = np.asarray(leaf, np.float32)[~np.asarray(kept)]
        np.testing.assert_array_less(abs(dropped), 10 * rounding + 1e-38)
        assert (np.asarray(leaf, np.float32)[np.asarray(kept)] != 0).all()


def labelled(x, y):
    return optax.multi_transform({"x": x, "y": y}, {"a": "x", "c": "y"})


def hyper(factory, *args, static=(), **kwargs):
    return optax.inject_hyperparams(factory, static_args=static)(*args, **kwargs)


LINEAR = optax.linear_schedule(0.5, 0.0, 10)
WRAPPED = {
    "plain": lambda inner: js.recipes.explore_exploit(inner, both(), **RECIPE),
    "chain inside": lambda inner: js.recipes.explore_exploit(
        optax.chain(optax.clip_by_global_norm(1.0), inner), both(), **RECIPE
    ),
    "chain outside": lambda inner: optax.chain(
        optax.clip(1.0), js.recipes.explore_exploit(inner, both(), **RECIPE)
    ),
    "MultiSteps inside": lambda inner: js.recipes.explore_exploit(
        optax.MultiSteps(inner, 2).gradient_transformation(), both(), **RECIPE
    ),
    "MultiSteps outside": lambda inner: optax.MultiSteps(
        js.recipes.explore_exploit(inner, both(), **RECIPE), 2
    ),
    "hyperparams of reset": lambda inner: js.rewire(
        optax.chain(inner, hyper(js.reset_nonparticipating, every=2)), both()
    ),
    "hyperparams of fix": lambda inner: js.rewire(
        optax.chain(inner, hyper(js.fix_nonparticipating, after=2)), both(), until=2
    ),
    "hyperparams of scale": lambda inner: js.rewire(
        optax.chain(hyper(js.scale_nonparticipating, s=LINEAR), inner), both()
    ),
    "hyperparams of sr_ste": lambda inner: js.rewire(
        optax.chain(hyper(js.add_decayed_nonparticipating, weight_decay=LINEAR), inner), both()
    ),
    "hyperparams of decay": lambda inner: js.rewire(
        optax.chain(inner, hyper(js.decay_nonparticipating, weight_decay=LINEAR)), both()
    ),
    "hyperparams of the recipe": lambda inner: hyper(
        js.recipes.explore_exploit,
        inner,
        both(),
        static=("inner", "plan"),
        **{**RECIPE, "every": 2, "weight_decay": LINEAR},
    ),
    "rewire around labels": lambda inner: js.recipes.explore_exploit(
        labelled(inner, optax.chain(js.scale_nonparticipating(0.5), optax.sgd(0.1))),
        both(),
        **RECIPE,
    ),
    "rewire under one label": lambda inner: labelled(
        js.recipes.explore_exploit(inner, only("a/w"), **RECIPE), optax.sgd(0.1)
    ),
    "rewire under the second label": lambda inner: labelled(
        optax.sgd(0.1), js.recipes.explore_exploit(inner, only("c/w"), **RECIPE)
    ),
    "two rewires": lambda inner: labelled(
        js.recipes.explore_exploit(inner, only("a/w"), **RECIPE),
        js.recipes.explore_exploit(inner, only("c/w", 1, 4), **RECIPE),
    ),
    "masked inside": lambda inner: js.recipes.explore_exploit(
        optax.masked(inner, {"a": True, "c": False}), both(), **RECIPE
    ),
    "masked outside": lambda inner: optax.masked(
        js.recipes.explore_exploit(inner, only("a/w"), **RECIPE), {"a": True, "c": False}
    ),
}
KEPT = {"two rewires": {"a/w": 2, "c/w": 1}, "rewire under the second label": {"c/w": 2}}
KEPT |= {name: {"a/w": 2} for name in ("rewire under one label", "masked outside")}
CORE = (
    "plain",
    "MultiSteps inside",
    "MultiSteps outside",
    "hyperparams of the recipe",
    "rewire around labels",
    "masked inside",
)
CASES = [
    *((name, "adamw", jnp.float32) for name in WRAPPED),
    *((name, optimizer, jnp.float32) for name in CORE for optimizer in list(OPTIMIZERS)[1:]),
    *(("MultiSteps outside", optimizer, jnp.bfloat16) for optimizer in OPTIMIZERS),
    ("hyperparams of the recipe", "adamw", jnp.bfloat16),
    ("two rewires", "lion", jnp.bfloat16),
]


def layout(tree):
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, optimizer, dtype",
    promotion.marked(
        CASES,
        ["MultiSteps inside", "MultiSteps outside"],
        "optax.MultiSteps divides by an integer",
    ),
)
def test_masks_are_found_and_the_state_is_stable(name, optimizer, dtype):
    tx, params = WRAPPED[name](OPTIMIZERS[optimizer]()), make_params(dtype)
    kept = KEPT.get(name, {"a/w": 2, "c/w": 2})

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    expected = layout((params, state))
    for t in range(4):
        params, state = step(params, state, make_grads(params, t))
        assert layout((params, state)) == expected
    masks = js.masks(state)
    for path, n in kept.items():
        outer, inner = path.split("/")
        mask = np.asarray(masks[outer][inner])
        assert mask.dtype == bool
        assert (mask.reshape(2, 4, 4).sum(1) == n).all()
        effective = js.effective_params(params, state)[outer][inner]
        np.testing.assert_array_equal(np.asarray(effective == 0), ~mask)
    # one True for the dense leaf, or for the whole part without a recipe
    dense = masks["a"]["b"] if isinstance(masks["a"], dict) else masks["a"]
    assert dense.shape == () and bool(dense)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_hyperparams_of_the_recipe_do_what_plain_numbers_do():
    numbers = {"every": 2, "reset_every": 3, "fix_after": 5, "grad_scale": 0.5, "weight_decay": 0.1}
    plain = js.recipes.explore_exploit(optax.adamw(1e-2), both(), **numbers)
    injected = hyper(
        js.recipes.explore_exploit, optax.adamw(1e-2), both(), static=("inner", "plan"), **numbers
    )
    a = b = make_params()
    state, state_injected = plain.init(a), injected.init(b)
    for t in range(8):
        updates, state = plain.update(make_grads(a, t), state, a)
        a = optax.apply_updates(a, updates)
        updates, state_injected = injected.update(make_grads(b, t), state_injected, b)
        b = optax.apply_updates(b, updates)
        jax.tree.map(np.testing.assert_array_equal, js.masks(state), js.masks(state_injected))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_injected_learning_rate_of_the_inner_optimizer_is_reachable():
    tx = js.recipes.explore_exploit(hyper(optax.adamw, learning_rate=LINEAR), both(), **RECIPE)
    params = make_params()
    state = tx.init(params)
    for t in range(3):
        _, state = tx.update(make_grads(params, t), state, params)
    rate = optax.tree_utils.tree_get(
        state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
    assert rate == LINEAR(2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nnx_optimizer_trains_and_shows_its_masks(optimizer):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    plan = js.plan(nnx.state(model, nnx.Param), {"kernel": js.NM(2, 4, axis=0)})
    opt = nnx.Optimizer(
        model, js.recipes.explore_exploit(optimizer(), plan, reset_every=1), wrt=nnx.Param
    )
    before = model.kernel.get_value()

    @nnx.jit
    def step(model, opt, x):
        def loss(params):
            return (nnx.merge(nnx.graphdef(model), js.effective_params(params, opt))(x) ** 2).sum()

        opt.update(model, jax.grad(loss)(nnx.state(model, nnx.Param)))

    mask = np.asarray(js.masks(opt)["kernel"].get_value())
    step(model, opt, jnp.ones((2, 8)))
    np.testing.assert_array_equal(np.asarray(model.kernel.get_value() == 0), ~mask)
    assert (np.asarray(model.kernel.get_value() != before)).all()
    for source in (opt, opt.opt_state):
        assert (
            np.asarray(js.masks(source)["kernel"].get_value()).reshape(2, 4, 4).sum(1) == 2
        ).all()


def test_a_missing_params_or_masks_is_an_error_that_names_the_call():
    tx = js.recipes.explore_exploit(optax.sgd(0.1), both())
    params = make_params()
    with pytest.raises(ValueError, match="rewire: `params` is missing"):
        tx.update(params, tx.init(params))
    for name, part in {
        "scale_nonparticipating": js.scale_nonparticipating(0.5),
        "reset_nonparticipating": js.reset_nonparticipating(2),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: there are no masks"):
            part.update(params, part.init(params), params)
    with pytest.raises(ValueError, match="holds no masks"):
        js.masks(optax.adam(1e-3).init(params))
