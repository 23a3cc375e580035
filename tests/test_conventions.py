"""Conventions of optax that every transformation and recipe of the library follows."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

PARAMS = {"a": {"w": jnp.arange(1.0, 33.0).reshape(8, 4) * jnp.array([[1.0, -1.0, 1.0, -1.0]])}}
PARAMS["b"] = jnp.ones(3)
PLAN = js.plan(PARAMS, {"a/w": js.NM(2, 4, axis=0)})
FREE = js.plan(PARAMS, {"a/w": js.Unstructured(0.5)})
MASKS = js.magnitude_masks(PARAMS, PLAN)
PHASES = {"total_steps": 10, "dense_until": 1, "fine_tune_from": 5}

WRAPPERS = {
    "rewire": lambda inner: js.rewire(inner, PLAN),
    "rewire by first order": lambda inner: js.rewire(
        inner, PLAN, renew=js.by_score("first_order"), every=2
    ),
    "rewire by a running mean": lambda inner: js.rewire(
        inner,
        PLAN,
        renew=js.by_score(js.running_mean(js.Score(lambda path, w: jnp.abs(w)), 0.9)),
    ),
    "explore_exploit": lambda inner: js.recipes.explore_exploit(
        inner, PLAN, every=2, grad_scale=0.5, reset_every=3, fix_after=6, weight_decay=0.1
    ),
    "sr_ste": lambda inner: js.recipes.sr_ste(inner, PLAN),
    "mdgf": lambda inner: js.recipes.mdgf(inner, PLAN, **PHASES),
    "sdgf": lambda inner: js.recipes.sdgf(inner, PLAN, **PHASES),
    "gradual": lambda inner: js.recipes.gradual(inner, FREE, **PHASES),
    "static": lambda inner: js.recipes.static(inner, PLAN),
    "static with masks": lambda inner: js.recipes.static(inner, PLAN, masks=MASKS),
    "record": lambda inner: js.analysis.record(js.rewire(inner, PLAN), PLAN, total_steps=10),
}
PIECES = {
    "scale_nonparticipating": lambda: js.scale_nonparticipating(0.5),
    "add_decayed_nonparticipating": lambda: js.add_decayed_nonparticipating(0.1),
    "decay_nonparticipating": lambda: js.decay_nonparticipating(0.1),
    "reset_nonparticipating": lambda: js.reset_nonparticipating(2),
    "fix_nonparticipating": lambda: js.fix_nonparticipating(1),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


def grads(dtype=jnp.float32, scale=0.1):
    return jax.tree.map(lambda p: (scale * jnp.cos(p)).astype(dtype), PARAMS)


def forms(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def transformation(name, inner=None):
    """A wrapper around an optimizer, or a piece in a chain after it, inside `rewire`."""
    inner = optax.adamw(1e-2) if inner is None else inner
    if name in WRAPPERS:
        return WRAPPERS[name](inner)
    return js.rewire(optax.chain(inner, PIECES[name]()), PLAN)


EVERY = pytest.mark.parametrize("name", [*WRAPPERS, *PIECES])


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_keep_the_dtype_of_the_gradients_and_the_state_its_form(name, dtype):
    tx = transformation(name, optax.sgd(0.1))
    state = tx.init(PARAMS)
    before = forms(state)
    params = PARAMS
    for _ in range(4):
        updates, state = jax.jit(tx.update)(grads(dtype), state, params)
        assert forms(updates) == forms(grads(dtype))
        assert forms(state) == before
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)


@pytest.mark.slow
@pytest.mark.promotes("optax.apply_updates adds updates of another dtype")
@EVERY
def test_apply_if_finite(name):
    tx = optax.apply_if_finite(transformation(name, optax.sgd(0.1)), 2)
    state = tx.init(PARAMS)
    for g in (grads(jnp.bfloat16), jax.tree.map(lambda g: g * jnp.nan, grads(jnp.bfloat16))):
        updates, state = jax.jit(tx.update)(g, state, PARAMS)
        assert forms(updates) == forms(g)
    assert all((u == 0).all() for u in jax.tree.leaves(updates)) and state.total_notfinite == 1


@EVERY
def test_unknown_extra_arguments_pass_and_reach_the_optimizer(name):
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(set(extra_args))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = transformation(name, inner)
    tx.update(grads(), tx.init(PARAMS), PARAMS, value=jnp.float32(1.0), other=3)
    assert seen == [{"value", "other", "masks"}]


@pytest.mark.slow
@pytest.mark.promotes("optax.MultiSteps divides by an integer")
@EVERY
def test_multi_steps(name):
    tx = optax.MultiSteps(transformation(name), 2)
    state = tx.init(PARAMS)
    before = forms(state)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(grads(), state, PARAMS)
    assert forms(state) == before and forms(updates) == forms(PARAMS)
    assert js.masks(state)["a"]["w"].shape == (8, 4)


@pytest.mark.slow
@pytest.mark.promotes("optax.contrib.sam multiplies by booleans")
@EVERY
def test_sharpness_aware_minimization(name):
    tx = optax.contrib.sam(transformation(name), optax.sgd(0.05), sync_period=2)
    state = tx.init(PARAMS)
    before = forms(state)
    for _ in range(4):
        _, state = jax.jit(tx.update)(grads(), state, PARAMS)
        assert forms(state) == before


@EVERY
def test_tree_map_params(name):
    """The optimizer's own trees of parameters are found; masks and counts are not among them."""
    tx = transformation(name, optax.adam(1e-2))
    state = tx.init(PARAMS)
    specs = {"a": {"w": "matrix"}, "b": "vector"}
    told = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "other"
    )
    labels = jax.tree.leaves(told)
    assert labels.count("matrix") == labels.count("vector") == 2 and "other" in labels
    assert set(labels) == {"matrix", "vector", "other"}


@EVERY
def test_states_and_transformations_can_be_pickled(name):
    tx = transformation(name)
    state = tx.init(PARAMS)
    again = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    updates, _ = tx.update(grads(), again, PARAMS)
    expected, _ = tx.update(grads(), state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["zoom", "backtracking"])
def test_line_searches_run_inside(outer):
    search = {
        "zoom": optax.scale_by_zoom_linesearch(5),
        "backtracking": optax.scale_by_backtracking_linesearch(5),
    }[outer]
    tx = js.rewire(optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0), search), PLAN)
    state, losses, params = tx.init(PARAMS), [], PARAMS

    def loss(params, target):
        return sum(((p - target) ** 2).sum() for p in jax.tree.leaves(params))

    for _ in range(3):
        value, g = jax.value_and_grad(loss)(params, 0.5)
        updates, state = tx.update(g, state, params, value=value, grad=g, value_fn=loss, target=0.5)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_a_flattened_optimizer_belongs_inside():
    tx = js.rewire(optax.flatten(optax.adam(1e-2)), PLAN)
    tx.update(grads(), tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="rewire: the plan makes a/w sparse, but the parameters"):
        optax.flatten(js.rewire(optax.adam(1e-2), PLAN)).init(PARAMS)
    piece = js.rewire(optax.flatten(js.scale_nonparticipating(0.5)), PLAN)
    with pytest.raises(ValueError, match=r"scale_nonparticipating: the parameters have a leaf"):
        piece.update(grads(), piece.init(PARAMS), PARAMS)


@pytest.mark.promotes("optax.apply_updates adds updates of another dtype")
@pytest.mark.parametrize(
    "numbers",
    [
        {"scale_nonparticipating": {"s": 0.5}},
        {"add_decayed_nonparticipating": {"weight_decay": 0.1}},
        {"decay_nonparticipating": {"weight_decay": 0.1}},
        {"reset_nonparticipating": {"every": 2}},
        {"fix_nonparticipating": {"after": 1}},
    ],
    ids=lambda numbers: next(iter(numbers)),
)
def test_injected_numbers_do_what_plain_ones_do(numbers):
    ((name, arguments),) = numbers.items()
    piece = getattr(js, name)
    plain = js.rewire(optax.chain(optax.sgd(0.1), piece(**arguments)), PLAN)
    injected = optax.inject_hyperparams(piece)(**arguments)
    injected = js.rewire(optax.chain(optax.sgd(0.1), injected), PLAN)
    for dtype in ("float32", "bfloat16"):
        updates = []
        for tx in (plain, injected):
            params, state = PARAMS, tx.init(PARAMS)
            for _ in range(3):
                new, state = jax.jit(tx.update)(grads(dtype), state, params)
                params = optax.apply_updates(params, new)
            updates.append(params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *updates)


@every_wrapper
def test_a_state_of_another_plan_is_refused(name):
    others = {
        "another pattern": {"a/w": js.NM(1, 4, axis=0)},
        "another axis": {"a/w": js.NM(2, 4, axis=1)},
        "unstructured": {"a/w": js.Unstructured(0.25)},
    }
    tx = transformation(name)
    for rules in others.values():
        other = js.rewire(optax.adamw(1e-2), js.plan(PARAMS, rules)).init(PARAMS)
        if name == "record":
            other = tx.init(PARAMS)._replace(inner_state=other)
        with pytest.raises(
            ValueError, match=r"rewire: the state was made for a different plan: a/w is"
        ):
            tx.update(grads(), other, PARAMS)


def test_gradients_of_another_tree_are_called_gradients():
    tx = transformation("rewire")
    with pytest.raises(ValueError, match=r"rewire: .* but the gradients have no such leaf"):
        tx.update({"c": jnp.ones(3)}, tx.init(PARAMS), PARAMS)


def test_scores_that_need_a_gradient_are_refused_where_there_is_none():
    squared = js.Score(lambda path, w, g: g**2, needs_gradient=True)
    for renew in (js.by_score(squared), js.by_score("fisher"), js.by_score("first_order")):
        with pytest.raises(ValueError, match=r"recipes.static: `renew` needs .*score_masks"):
            js.recipes.static(optax.sgd(0.1), PLAN, renew=renew)


def test_a_running_mean_remembers():
    squared = js.Score(lambda path, w, g: g**2, needs_gradient=True)
    tx = js.rewire(optax.sgd(0.0), PLAN, renew=js.by_score(js.running_mean(squared, 0.5)))
    state = tx.init(PARAMS)
    mean = np.zeros((8, 4))
    for t in range(3):
        g = jax.tree.map(lambda p: jnp.sin(p * (t + 1)), PARAMS)  # noqa: B023
        mean = 0.5 * mean + 0.5 * np.asarray(g["a"]["w"]) ** 2
        _, state = jax.jit(tx.update)(g, state, PARAMS)
        np.testing.assert_allclose(state.renew_state["a/w"], mean, rtol=1e-5)
        top = np.argsort(-mean.reshape(2, 4, 4), 1)[:, :2]
        expected = np.zeros((2, 4, 4), bool)
        np.put_along_axis(expected, top, True, 1)
        np.testing.assert_array_equal(js.masks(state)["a"]["w"], expected.reshape(8, 4))


def test_a_rule_that_grows_by_the_gradient_fits_without_a_change_to_rewire():
    """RigL: the four smallest weights that participate give way to the four largest gradients."""
    drop = 4

    def drop_and_grow(plan, params, gradients, masks, step, key, extra):
        if gradients is None:
            return js.magnitude_masks(params, plan)

        def score(w, g, mask):
            if not mask.ndim:
                return w
            size, kept = jnp.abs(w), mask.sum(dtype=jnp.int32)
            staying = js.topk_mask(jnp.where(mask, size, -1.0), (kept - drop) / mask.size)
            return jnp.where(staying, 2.0, jnp.where(mask, -1.0, jnp.abs(g)))

        return js.score_masks(jax.tree.map(score, params, gradients, masks), plan, step=step)

    tx = js.rewire(optax.sgd(0.0), FREE, renew=js.Renew(drop_and_grow, needs_gradient=True))
    state = tx.init(PARAMS)
    _, after = jax.jit(tx.update)(grads(), state, PARAMS)
    w, g = (np.abs(np.asarray(tree["a"]["w"])).ravel() for tree in (PARAMS, grads()))
    expected = np.zeros(32, bool)
    expected[np.argsort(-w)[: 16 - drop]] = True
    others = np.argsort(-w)[16:]
    expected[others[np.argsort(-g[others])[:drop]]] = True
    np.testing.assert_array_equal(np.asarray(js.masks(after)["a"]["w"]).ravel(), expected)


def test_keys_change_with_the_step_and_not_with_the_run():
    def random(plan, params, gradients, masks, step, key, extra):
        scores = jax.tree.map(lambda w: jax.random.uniform(key, w.shape), params)
        return js.score_masks(scores, plan)

    def run():
        tx = js.rewire(optax.sgd(0.0), PLAN, renew=js.Renew(random, seed=3))
        state, drawn = tx.init(PARAMS), []
        for _ in range(3):
            drawn.append(np.asarray(js.masks(state)["a"]["w"]))
            _, state = jax.jit(tx.update)(grads(), state, PARAMS)
        return drawn

    first, again = run(), run()
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and (first[1] != first[2]).any()
