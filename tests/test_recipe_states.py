"""The decay factor and the gradient in the optimizer state, wherever it is used.

Under every wrapper, in Flax, in checkpoints and at compression.
"""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import promotion
import pytest
from flax import linen as nn
from flax import nnx, serialization

import jaxsparse as js

STEPS = 12
PHASES = {"total_steps": STEPS, "dense_until": 2, "fine_tune_from": 6}
FACTORS = [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0]  # linear, of the forward passes


def make_params(dtype=jnp.float32, key=0):
    keys = jax.random.split(jax.random.key(key), 2)
    return {
        "a": jax.random.normal(keys[0], (8, 4), dtype),
        "b": jnp.ones(4, dtype),
        "c": jax.random.normal(keys[1], (8, 4), dtype),
    }


def planned(*names, pattern=None):
    return js.plan(make_params(), dict.fromkeys(names, pattern or js.NM(2, 4, axis=0)))


def linear(inner, plan, **kwargs):
    return js.recipes.mdgf(inner, plan, curve="linear", **{**PHASES, **kwargs})


def make_step(tx):
    def loss(params, state):
        return sum(
            (w.astype(jnp.float32) ** 2).sum()
            for w in jax.tree.leaves(js.effective_params(params, state))
        )

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, state), state, params)
        return optax.apply_updates(params, updates), state

    return step


def factor(params, state, name):
    """The factor on non-participating weights in the next forward pass; 1 if all participate."""
    mask = np.asarray(js.masks(state)[name])
    ratio = np.asarray(
        js.effective_params(params, state)[name].astype(jnp.float32)
        / params[name].astype(jnp.float32)
    )
    np.testing.assert_array_equal(ratio[mask], 1)
    return ratio[~mask].mean() if not mask.all() else 1.0


def labelled(x, y):
    return optax.multi_transform({"x": x, "y": y}, {"a": "x", "b": "y", "c": "y"})


def hyper(inner, plan):
    static = ("inner", "plan", "total_steps", "dense_until", "fine_tune_from")
    return optax.inject_hyperparams(js.recipes.mdgf, static_args=static)(
        inner, plan, curve="linear", **PHASES
    )


def hyper_rewire(inner, plan):
    options = {
        "decay_factor": js.linear_decay(1 / 4, 2),
        "gradient": "masked",
        "begin": 2,
        "every": 1,
    }
    return optax.inject_hyperparams(
        js.rewire, static_args=("inner", "plan", "decay_factor", "renew")
    )(inner, plan, **options)


ADAM = optax.adamw(1e-2)
BOTH = planned("a", "c")
LATER = [1, *FACTORS[:-1]]
WRAPPED = {
    "plain": (linear(ADAM, BOTH), {"a": FACTORS, "c": FACTORS}),
    "chain": (optax.chain(optax.clip(1.0), linear(ADAM, BOTH)), {"a": FACTORS, "c": FACTORS}),
    "hyperparams": (hyper(ADAM, BOTH), {"a": FACTORS, "c": FACTORS}),
    "hyperparams of rewire": (hyper_rewire(ADAM, BOTH), {"a": FACTORS, "c": FACTORS}),
    "hyperparams inside": (
        linear(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), BOTH),
        {"a": FACTORS, "c": FACTORS},
    ),
    "MultiSteps": (
        optax.MultiSteps(linear(ADAM, BOTH), 2),
        dict.fromkeys("ac", np.repeat(FACTORS, 2)[:STEPS]),
    ),
    "one label": (labelled(optax.sgd(0.1), linear(ADAM, planned("c"))), {"c": FACTORS}),
    "two recipes": (
        labelled(
            linear(ADAM, planned("a")), linear(ADAM, planned("c"), dense_until=3, fine_tune_from=7)
        ),
        {"a": FACTORS, "c": LATER},
    ),
    "two recipes, one without a factor": (
        labelled(
            js.recipes.explore_exploit(ADAM, planned("a"), reset_every=None),
            linear(ADAM, planned("c")),
        ),
        {"a": [0] * STEPS, "c": FACTORS},
    ),
    "if finite": (optax.apply_if_finite(linear(ADAM, BOTH), 3), {"a": FACTORS, "c": FACTORS}),
}


@pytest.mark.parametrize(
    "name", promotion.marked(WRAPPED, ["MultiSteps"], "optax.MultiSteps divides by an integer")
)
def test_each_leaf_has_the_factor_of_its_own_state(name):
    tx, factors = WRAPPED[name]
    params, once = make_params(), chex.assert_max_traces(n=1)(make_step(tx))
    state, step = jax.jit(tx.init)(params), jax.jit(once, donate_argnums=(0, 1))
    for t in range(STEPS):
        for leaf, expected in factors.items():
            np.testing.assert_allclose(
                factor(params, state, leaf), expected[t], rtol=1e-6, err_msg=f"{leaf} at step {t}"
            )
        params, state = step(params, state)


@pytest.mark.parametrize("recipe", [linear, js.recipes.static], ids=["linear", "static"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_keep_their_dtype(recipe, dtype):
    tx, params = recipe(optax.sgd(0.01, momentum=0.9), BOTH), make_params(dtype)
    state, step = tx.init(params), jax.jit(chex.assert_max_traces(n=1)(make_step(tx)))
    for _ in range(STEPS):
        params, state = step(params, state)
    leaves = jax.tree.leaves((params, js.effective_params(params, state)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    # from other weights, since non-participating weights of `static` are 0
    assert factor(make_params(dtype), state, "a") == 0


@pytest.mark.parametrize(
    "make",
    [linear, lambda inner, plan: js.recipes.sdgf(inner, plan, **PHASES)],
    ids=["mdgf", "sdgf"],
)
def test_scanned_steps_and_vmapped_seeds_equal_the_loop(make):
    tx = make(ADAM, BOTH)
    step = make_step(tx)

    @jax.jit
    @jax.vmap
    def scanned(params):
        return jax.lax.scan(
            lambda carry, _: (step(*carry), js.masks(carry[1])["a"]),
            (params, tx.init(params)),
            None,
            STEPS,
        )

    seeds = [make_params(key=key) for key in range(3)]
    results, masks = scanned(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    jitted = jax.jit(step)
    for i, params in enumerate(seeds):
        state = tx.init(params)
        for t in range(STEPS):
            np.testing.assert_array_equal(masks[i, t], js.masks(state)["a"])
            params, state = jitted(params, state)
        expected, one = (
            jax.tree.leaves((params, state)),
            [leaf[i] for leaf in jax.tree.leaves(results)],
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, expected
        )


def test_an_nnx_optimizer_runs_through_the_phases():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    plan = js.plan(nnx.state(model, nnx.Param), {"kernel": js.NM(2, 4, axis=0)})
    opt = nnx.Optimizer(model, linear(ADAM, plan), wrt=nnx.Param)

    @nnx.jit
    def step(model, opt, x):
        def loss(params):
            return (nnx.merge(nnx.graphdef(model), js.effective_params(params, opt))(x) ** 2).sum()

        opt.update(model, jax.grad(loss)(nnx.state(model, nnx.Param)))

    for expected in FACTORS:
        params = nnx.state(model, nnx.Param)
        mask = np.asarray(js.masks(opt)["kernel"].get_value())
        ratio = np.asarray(
            js.effective_params(params, opt)["kernel"].get_value() / params["kernel"].get_value()
        )
        np.testing.assert_allclose(ratio, np.where(mask, 1, expected), rtol=1e-6)
        if expected:
            with pytest.raises(ValueError, match="the decay factor of kernel is "):
                js.compress(params, opt)
        step(model, opt, jnp.ones((2, 8)))
    js.compress(nnx.state(model, nnx.Param), opt)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.relu(nn.Dense(32)(x))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )()(x, None)[0]


MODEL, X = Model(), jax.random.normal(jax.random.key(1), (5, 8))
KERNELS = {"*/Dense_*/kernel": js.anywhere("2:4")}
RECIPES = {
    "sr_ste": lambda inner, plan: js.recipes.sr_ste(inner, plan, dense_until=2),
    "mdgf": linear,
    "sdgf": lambda inner, plan: js.recipes.sdgf(inner, plan, stages="geometric", k=2, **PHASES),
    "static": js.recipes.static,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_flax_loop_takes_any_recipe_and_compiles_once(name):
    plan = js.flax.plan(MODEL, KERNELS, X)
    assert len(plan.sparse) == 2
    tx = RECIPES[name](optax.adamw(1e-2), plan)
    intercepted, plain = [], []

    @chex.assert_max_traces(n=1)
    def once(params, state):
        def loss(params):
            with js.flax.intercept(state):
                return (MODEL.apply(params, X) ** 2).mean()

        def loss_of_sparse_params(params):
            return (MODEL.apply(js.effective_params(params, state), X) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        expected = jax.value_and_grad(loss_of_sparse_params)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (value, grads), expected

    params = jax.jit(MODEL.init)(jax.random.key(0), X)
    state, step = tx.init(params), jax.jit(once)
    for t in range(STEPS):
        params, state, intercepted, plain = step(params, state)
        jax.tree.map(
            lambda a, b, t=t: np.testing.assert_allclose(
                a, b, rtol=1e-5, atol=1e-6, err_msg=f"step {t}"
            ),
            intercepted,
            plain,
        )

    packed = js.compress(params, state)
    with js.flax.intercept():
        compressed = MODEL.apply(packed, X)
    with js.flax.intercept(state):
        masked = MODEL.apply(params, X)
    np.testing.assert_allclose(compressed, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [None, "dense", "masked"])
@pytest.mark.parametrize("recipe", ["dense", "masked"])
def test_the_gradient_is_that_of_the_recipe_unless_the_call_names_one(recipe, asked):
    tx, params = linear(optax.sgd(0.0), BOTH, gradient=recipe), make_params()
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    grads = jax.grad(lambda p: js.effective_params(p, state, gradient=asked)["a"].sum())(params)
    mask, expected = js.masks(state)["a"], {"dense": 1, "masked": 0.5}[asked or recipe]
    np.testing.assert_allclose(grads["a"], np.where(mask, 1, expected))


def test_rewire_takes_any_factor_and_gradient_by_hand():
    tx = js.rewire(
        optax.sgd(0.0),
        BOTH,
        decay_factor=js.exponential_decay(0.5, begin=1),
        gradient="masked",
        begin=1,
        every=2,
    )
    params = make_params()
    state, step = tx.init(params), jax.jit(make_step(tx))
    for t in range(5):
        np.testing.assert_allclose(
            factor(params, state, "a"), np.exp(-0.5 * max(t - 1, 0)), rtol=1e-6
        )
        params, state = step(params, state)
    masked = js.rewire(optax.sgd(0.1), BOTH, gradient="masked")
    grads = jax.grad(lambda p: js.effective_params(p, masked.init(params))["a"].sum())(params)
    np.testing.assert_array_equal(grads["a"], js.magnitude_masks(params, BOTH)["a"])


def at(tx, steps, params=None):
    params = params or make_params()
    state, step = tx.init(params), jax.jit(make_step(tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_compress_waits_for_the_factor_to_be_zero():
    for steps in range(6):
        with pytest.raises(
            ValueError, match=rf"decay factor of a is {FACTORS[steps]:g}, not 0.* fine_tune_from"
        ):
            js.compress(*at(linear(ADAM, BOTH), steps))
    params, state = at(linear(ADAM, BOTH), 6)
    packed = js.decompress(js.compress(params, state))
    jax.tree.map(np.testing.assert_array_equal, packed, js.effective_params(params, state))


def test_compress_takes_no_traced_factor():
    params, state = at(linear(ADAM, BOTH), 6)
    with pytest.raises(ValueError, match=r"decay factor of a is traced.* outside of jit"):
        jax.jit(js.compress)(params, state)
    packed = jax.jit(lambda params, masks: js.compress(params, masks, BOTH))(
        params, js.masks(state)
    )
    jax.tree.map(np.testing.assert_array_equal, packed, js.compress(params, state))
    static = at(js.recipes.static(ADAM, BOTH), 2)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(js.compress)(*static), js.compress(*static))


def test_compress_waits_for_the_last_stage():
    # 3:4 from step 1, 2:4 from step 3
    tx = js.recipes.sdgf(ADAM, BOTH, total_steps=9, dense_until=1, fine_tune_from=5)
    for steps in range(3):
        with pytest.raises(
            ValueError,
            match=r"the mask of a does not keep exactly 2 of every 4 .* "
            r"after its recipe has reached 2:4",
        ):
            js.compress(*at(tx, steps))
    params, state = at(tx, 3)
    packed = js.decompress(js.compress(params, state))
    jax.tree.map(np.testing.assert_array_equal, packed, js.effective_params(params, state))


def test_the_plan_in_the_state_is_the_last_stage():
    for tx in (
        js.recipes.sdgf(ADAM, BOTH, **PHASES),
        js.recipes.sdgf(ADAM, BOTH, stages="geometric", k=2, **PHASES),
    ):
        assert tx.init(make_params()).plan == BOTH
    unstructured = planned("a", "c", pattern=js.Unstructured(0.25, "global"))
    tx = js.recipes.gradual(ADAM, unstructured, **PHASES)
    assert tx.init(make_params()).plan == unstructured


def test_gradual_pruning_keeps_a_global_density():
    tx = js.recipes.gradual(
        ADAM, planned("a", "c", pattern=js.Unstructured(0.25, "global")), **PHASES
    )
    for steps, kept in ((1, 64), (4, 64 * (0.25 + 0.75 / 8)), (6, 16), (9, 16)):
        masks = js.masks(at(tx, steps)[1])
        assert masks["a"].sum() + masks["c"].sum() == int(kept + 0.5)


def test_leaves_of_different_patterns_have_their_own_stages():
    plan = js.plan(make_params(), {"a": js.NM(1, 8, axis=0), "c": js.TransposableNM(2, 4, (0, 1))})
    tx = js.recipes.sdgf(ADAM, plan, total_steps=14, dense_until=1, fine_tune_from=9)
    params = make_params()
    state, step = tx.init(params), jax.jit(make_step(tx))
    kept = []
    for _ in range(12):
        masks = js.masks(state)
        kept.append((int(masks["a"][:, 0].sum()), int(masks["c"][:4, 0].sum())))
        assert (masks["c"].reshape(2, 4, 4).sum(2) == kept[-1][1]).all()
        params, state = step(params, state)
    assert kept == [
        (8, 4),
        (7, 3),
        (7, 3),
        (4, 3),
        (4, 3),
        (2, 2),
        (2, 2),
        (1, 2),
        (1, 2),
        (1, 2),
        (1, 2),
        (1, 2),
    ]


def test_static_holds_zeros_under_any_optimizer_and_sees_a_smaller_model():
    params = make_params()
    plan, mask = planned("a"), np.asarray(js.magnitude_masks(make_params(), planned("a"))["a"])
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-1, weight_decay=0.1))
    tx = js.recipes.static(inner, plan)
    small = {**params, "a": jnp.where(mask, params["a"], 0)}
    state, small_state = tx.init(params), inner.init(small)

    def loss(params):
        return sum(((w - 1) ** 2).sum() for w in jax.tree.leaves(params))

    for _ in range(5):
        grads = jax.grad(lambda params, state: loss(js.effective_params(params, state)))(
            params, state
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        grads = jax.grad(loss)(small)
        updates, small_state = inner.update(
            {**grads, "a": jnp.where(mask, grads["a"], 0)}, small_state, small
        )
        small = optax.apply_updates(small, updates)
        np.testing.assert_array_equal(params["a"] == 0, ~mask)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, small
        )


@pytest.mark.parametrize("source", ["masks", "numpy masks", "pickled masks", "an optimizer state"])
def test_static_goes_on_with_given_masks(source):
    plan = planned("a", "c")
    params, state = at(js.recipes.explore_exploit(ADAM, plan), 3)
    masks = js.masks(state)
    arrays = jax.tree.map(np.asarray, masks)
    pickled = pickle.loads(pickle.dumps(arrays))
    start = {
        "masks": masks,
        "numpy masks": arrays,
        "pickled masks": pickled,
        "an optimizer state": state,
    }[source]
    new = at(
        js.recipes.static(optax.sgd(0.1, momentum=0.9), plan, masks=start),
        3,
        jax.tree.map(lambda w: w + 1, params),
    )
    jax.tree.map(np.testing.assert_array_equal, js.masks(new[1]), masks)
    np.testing.assert_array_equal(new[0]["a"] == 0, ~masks["a"])
    js.compress(*new)


def test_given_masks_may_have_any_density_and_the_tree_is_that_of_the_parameters():
    params = {"params": {"w": jnp.arange(1.0, 9.0), "b": jnp.zeros(2)}}
    tx = js.recipes.static(
        optax.sgd(0.1), js.plan(params, {"w": js.NM(2, 4, axis=0)}), masks={"w": np.arange(8) < 7}
    )
    params, state = at(tx, 1, params)
    assert jax.tree.structure(js.masks(state)) == jax.tree.structure(params)
    assert np.flatnonzero(params["params"]["w"] == 0).tolist() == [7]
    with pytest.raises(ValueError, match="does not keep exactly 2 of every 4"):
        js.compress(params, state)


@pytest.mark.parametrize("name", ["mdgf", "sdgf", "static"])
def test_checkpoints_hold_the_factor(name, tmp_path):
    tx, params = RECIPES[name](ADAM, BOTH), make_params()
    step = jax.jit(make_step(tx))
    half = at(tx, 4)
    expected = step(*half)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "run", jax.eval_shape(lambda: (params, tx.init(params)))
        )
    jax.tree.map(np.testing.assert_array_equal, step(*restored), expected)
    assert js.flax  # registers what flax.serialization has to know
    from_bytes = serialization.from_bytes((params, tx.init(params)), serialization.to_bytes(half))
    jax.tree.map(np.testing.assert_array_equal, step(*from_bytes), expected)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(half)]
    if name == "mdgf":
        assert (
            sum(leaf.shape == () and leaf.dtype == np.float32 and leaf == 0.5 for leaf in leaves)
            == 1
        )


def test_the_state_is_flat_whatever_the_recipe():
    for tx in (
        js.recipes.explore_exploit(optax.sgd(0.1), BOTH),
        js.recipes.sr_ste(optax.sgd(0.1), BOTH),
        js.recipes.mdgf(optax.sgd(0.1), BOTH, total_steps=10),
        js.rewire(optax.chain(optax.sgd(0.1)), BOTH),
    ):
        state = tx.init(make_params())
        names = ("count", "masks", "plan", "forward", "renew_state", "inner_state")
        assert state._fields == names
        assert isinstance(state.inner_state, tuple) and state.plan == BOTH
