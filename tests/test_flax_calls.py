"""`flax.intercept` under every way of calling a model.

Collections, random keys, methods, bound modules, jit, and a training step.
"""

import gc
import weakref

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxsparse as js

X = jax.random.normal(jax.random.key(1), (4, 16))


class Net(nn.Module):
    """A net with batch norm, dropout, an intermediate value, and more than one method."""

    def setup(self):
        self.body = nn.Dense(16)
        self.norm = nn.BatchNorm(use_running_average=False)
        self.drop = nn.Dropout(0.5, deterministic=False)
        self.head = nn.Dense(8)

    def __call__(self, x):
        x = self.drop(nn.relu(self.norm(self.body(x))))
        self.sow("intermediates", "hidden", x)
        return self.head(x)

    def encode(self, x):
        return self.body(x)


KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(2)}
RNGS = {"dropout": jax.random.key(3)}
MODEL = Net()
VARIABLES = jax.jit(MODEL.init)(KEYS, X)
PARAMS, REST = {"params": VARIABLES["params"]}, {"batch_stats": VARIABLES["batch_stats"]}


def make_plan():
    params = jax.eval_shape(lambda: PARAMS)
    return js.plan(params, {"*/kernel": js.NM(2, 4, axis=-2)})


PLAN = make_plan()
MASKS = js.magnitude_masks(PARAMS, PLAN)
SPARSE = js.effective_params(PARAMS, MASKS)
PACKED = js.compress(PARAMS, MASKS, PLAN)
CALLS = {
    "mutable statistics": {"mutable": ["batch_stats"], "rngs": RNGS},
    "statistics and sown values": {"mutable": ["batch_stats", "intermediates"], "rngs": RNGS},
    "a method by name": {"method": "encode"},
    "a method as a function": {"method": Net.encode},
    "a function of the module": {"method": lambda net, x: net.encode(x) + 1},
}


@pytest.mark.parametrize("kwargs", CALLS.values(), ids=CALLS)
def test_every_way_to_call_equals_sparse_params(kwargs):
    expected = MODEL.apply({**SPARSE, **REST}, X, **kwargs)
    for params, source, tolerance in ((PARAMS, MASKS, 0), (PACKED, None, 1e-5)):
        with js.flax.intercept(source):
            output = MODEL.apply({**params, **REST}, X, **kwargs)
        assert jax.tree.structure(output) == jax.tree.structure(expected)
        jax.tree.map(
            lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, rtol=t, atol=t),
            output,
            expected,
        )
    assert not np.array_equal(
        jax.tree.leaves(expected)[0],
        jax.tree.leaves(MODEL.apply({**PARAMS, **REST}, X, **kwargs))[0],
    )


def test_parameters_returned_as_mutable_are_the_dense_ones():
    with js.flax.intercept(MASKS):
        _, collections = MODEL.apply({**PARAMS, **REST}, X, rngs=RNGS, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, collections["params"], PARAMS["params"])


@pytest.mark.parametrize(
    "call", [lambda net: net.encode(X), lambda net: net.body(X), lambda net: net.head(net.body(X))]
)
def test_bound_modules_and_their_submodules(call):
    expected = call(MODEL.bind({**SPARSE, **REST}))
    for params, source in ((PARAMS, MASKS), (PACKED, None)):
        with js.flax.intercept(source):
            output = call(MODEL.bind({**params, **REST}))
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def dense(params, x=X):
    return MODEL.apply({**params, **REST}, x, method="encode")


def masked(masks):
    return MODEL.apply({**js.effective_params(PARAMS, masks), **REST}, X, method="encode")


INVERSE = jax.tree.map(lambda m: ~m if m.ndim else m, MASKS)


def test_a_function_compiled_before_runs_with_the_masks_of_each_context_and_dense_after():
    # dense and once for each set of masks; entering again with the same masks traces nothing
    @jax.jit
    @chex.assert_max_traces(n=3)
    def encode(params):
        return dense(params)

    before = encode(PARAMS)
    for masks in (MASKS, INVERSE, MASKS, MASKS):
        with js.flax.intercept(masks):
            np.testing.assert_allclose(encode(PARAMS), masked(masks), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(encode(PARAMS), before)


def test_a_function_first_traced_inside_is_dense_outside():
    encode = jax.jit(dense)
    with js.flax.intercept(MASKS):
        np.testing.assert_allclose(encode(PARAMS), masked(MASKS), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(encode(PARAMS), dense(PARAMS), rtol=1e-6, atol=1e-6)


def test_of_nested_contexts_the_innermost_counts():
    encode = jax.jit(dense)
    with js.flax.intercept(MASKS):
        with js.flax.intercept(INVERSE):
            np.testing.assert_allclose(encode(PARAMS), masked(INVERSE), rtol=1e-6, atol=1e-6)
        with js.flax.intercept(None):
            np.testing.assert_allclose(encode(PARAMS), dense(PARAMS), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(encode(PARAMS), masked(MASKS), rtol=1e-6, atol=1e-6)


def test_the_same_state_may_be_entered_twice():
    tx = js.recipes.explore_exploit(optax.sgd(0.1), PLAN)
    state = tx.init(PARAMS)
    with js.flax.intercept(state):
        with js.flax.intercept(state):
            inner = dense(PARAMS)
        outer = dense(PARAMS)
    np.testing.assert_allclose(inner, masked(MASKS), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(outer, inner)
    assert not np.allclose(dense(PARAMS), inner)


def test_masks_and_packed_leaves_in_one_model():
    params = {"params": {**PARAMS["params"], "head": PACKED["params"]["head"]}}
    masks = {
        "params": {
            **MASKS["params"],
            "head": jax.tree.map(lambda _: jnp.asarray(True), MASKS["params"]["head"]),
        }
    }
    with js.flax.intercept(masks):
        output = MODEL.apply({**params, **REST}, X, mutable=["batch_stats", "params"], rngs=RNGS)
    expected = MODEL.apply({**SPARSE, **REST}, X, mutable=["batch_stats"], rngs=RNGS)
    np.testing.assert_allclose(output[0], expected[0], rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, dict(output[1]["params"]), params["params"])


class Hyper(nn.Module):
    """A model whose output resembles mutated variables."""

    @nn.compact
    def __call__(self, x):
        return x, {"params": {"kernel": nn.Dense(8)(x)}}


@pytest.mark.parametrize("packed", [False, True])
def test_a_result_that_looks_like_variables_is_left_alone(packed):
    model = Hyper()
    params = model.init(jax.random.key(0), X)
    plan = js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, X)
    masks = js.magnitude_masks(params, plan)
    expected = model.apply(js.effective_params(params, masks), X)
    with js.flax.intercept(None if packed else masks):
        output = model.apply(js.compress(params, masks, plan) if packed else params, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), output, expected
    )


def test_frozen_variables_and_parameters_that_are_made_by_apply():
    frozen = flax.core.freeze({**PARAMS, **REST})
    with js.flax.intercept(MASKS):
        y, variables = MODEL.apply(frozen, X, rngs=RNGS, mutable=True)
        _, made = MODEL.apply({}, X, rngs=KEYS, mutable=["params", "batch_stats"])
    np.testing.assert_array_equal(y, MODEL.apply({**SPARSE, **REST}, X, rngs=RNGS, mutable=True)[0])
    jax.tree.map(
        np.testing.assert_array_equal, flax.core.unfreeze(variables["params"]), PARAMS["params"]
    )
    assert jax.tree.structure(dict(made["params"])) == jax.tree.structure(PARAMS["params"])


@pytest.mark.parametrize("packed", [False, True])
def test_no_tracer_is_left_behind(packed):
    with jax.checking_leaks():

        @jax.jit
        def encode(params, masks):
            with js.flax.intercept(None if packed else masks):
                return dense(params)

        encode(PACKED if packed else PARAMS, MASKS)


def test_a_function_that_is_compiled_for_nn_jit_follows_the_masks():
    model = nn.jit(nn.Dense)(8)
    params = model.init(jax.random.key(0), X)
    plan = js.flax.plan(model, {"kernel": "2:4"}, X)
    masks = js.magnitude_masks(params, plan)
    plain = model.apply(params, X)
    for chosen in (masks, jax.tree.map(lambda m: ~m if m.ndim else m, masks)):
        with js.flax.intercept(chosen):
            output = model.apply(params, X)
        np.testing.assert_allclose(
            output, model.apply(js.effective_params(params, chosen), X), rtol=1e-6, atol=1e-6
        )
    np.testing.assert_array_equal(model.apply(params, X), plain)


def test_masks_are_not_kept_alive_by_the_caches_of_jit():
    masks = jax.tree.map(jnp.copy, MASKS)
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(masks)]
    encode = jax.jit(lambda params: dense(params))
    with js.flax.intercept(masks):
        encode(PARAMS)
    del masks, encode
    gc.collect()
    assert not any(ref() for ref in kept)


def test_a_context_in_which_no_module_runs_is_an_error():
    def plain(params, x):
        return x @ params["params"]["body"]["kernel"]

    masks = jax.tree.map(jnp.copy, MASKS)
    with (
        pytest.raises(
            ValueError, match=r"flax\.intercept: no Flax Linen module ran.*effective_params"
        ),
        js.flax.intercept(masks),
    ):
        plain(PARAMS, X)
    with pytest.raises(ZeroDivisionError), js.flax.intercept(masks):
        raise ZeroDivisionError


def test_a_model_that_was_bound_outside_is_an_error_and_not_dense():
    bound = MODEL.bind({**PARAMS, **REST})
    with (
        pytest.raises(ValueError, match=r"flax\.intercept: a Net was bound, or wrapped"),
        js.flax.intercept(MASKS),
    ):
        bound.encode(X)


def test_a_context_leaves_flax_as_it_was():
    apply, bind = flax.core.apply, flax.core.bind
    with js.flax.intercept(MASKS):
        assert flax.core.apply is not apply
        with js.flax.intercept(MASKS):
            dense(PARAMS)
    assert (flax.core.apply, flax.core.bind) == (apply, bind)


@pytest.mark.parametrize("capture", [True, lambda module, method: method == "encode"])
@pytest.mark.parametrize("packed", [False, True])
def test_captured_intermediates_are_those_of_the_plain_model(packed, capture):
    kwargs = {
        "rngs": RNGS,
        "mutable": ["intermediates", "batch_stats"],
        "capture_intermediates": capture,
    }
    expected = MODEL.apply({**SPARSE, **REST}, X, **kwargs)
    with js.flax.intercept(None if packed else MASKS):
        output = MODEL.apply({**(PACKED if packed else PARAMS), **REST}, X, **kwargs)
    assert jax.tree.structure(output) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), output, expected
    )


class Setup(nn.Module):
    """A model with a weight and a layer in `setup`, and a method that Flax does not wrap."""

    def setup(self):
        self.w = self.param("w_kernel", nn.initializers.lecun_normal(), (16, 8))
        self.layer = nn.Dense(8)

    def __call__(self, x):
        return x @ self.w + self.layer(x)

    @nn.nowrap
    def helper(self, x):
        return self.layer(x) * 2


@pytest.mark.parametrize("packed", [False, True])
def test_bound_models_with_setup(packed):
    model = Setup()
    params = model.init(jax.random.key(0), X)
    plan = js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, X)
    masks = js.magnitude_masks(params, plan)
    calls = (
        lambda net: net.w,
        lambda net: net(X),
        lambda net: net.helper(X),
        lambda net: net.layer(X),
    )
    plain = model.bind(js.effective_params(params, masks))
    expected = [call(plain) for call in calls]
    with js.flax.intercept(None if packed else masks):
        bound = model.bind(js.compress(params, masks, plan) if packed else params)
        for call, y in zip(calls, expected, strict=True):
            np.testing.assert_array_equal(call(bound), y)


class Perturbed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(self.perturb("hidden", nn.Dense(8)(x)))


@pytest.mark.parametrize("packed", [False, True])
def test_perturbations_have_the_gradients_of_the_plain_model(packed):
    model = Perturbed()
    variables = model.init(jax.random.key(0), X)
    params, perturbations = {"params": variables["params"]}, variables["perturbations"]
    plan = js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, X)
    masks = js.magnitude_masks(params, plan)

    def loss(perturbations, params):
        return (model.apply({**params, "perturbations": perturbations}, X) ** 2).sum()

    expected = jax.grad(loss)(perturbations, js.effective_params(params, masks))
    with js.flax.intercept(None if packed else masks):
        gradients = jax.grad(loss)(
            perturbations, js.compress(params, masks, plan) if packed else params
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, expected
    )


def test_the_context_inside_of_the_compiled_function_follows_the_masks():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def encode(params, masks):
        with js.flax.intercept(masks):
            return MODEL.apply({**params, **REST}, X, method="encode")

    for masks in (MASKS, INVERSE):
        np.testing.assert_allclose(encode(PARAMS, masks), masked(masks), rtol=1e-6, atol=1e-6)


def test_compressed_leaves_make_a_compiled_function_trace_anew():
    encode = jax.jit(lambda params: MODEL.apply({**params, **REST}, X, method="encode"))
    encode(PARAMS)
    with js.flax.intercept():
        np.testing.assert_allclose(encode(PACKED), encode(SPARSE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["effective_params", "intercept"])
def test_masks_move_inside_a_compiled_train_step_and_the_result_compresses(path):
    tx = js.recipes.explore_exploit(optax.adamw(0.1), PLAN, reset_every=3)

    @jax.jit
    def step(params, state, rest):
        def loss(params):
            if path == "effective_params":
                y, rest_new = MODEL.apply(
                    {**js.effective_params(params, state), **rest},
                    X,
                    mutable=["batch_stats"],
                    rngs=RNGS,
                )
            else:
                with js.flax.intercept(state):
                    y, rest_new = MODEL.apply(
                        {**params, **rest}, X, mutable=["batch_stats"], rngs=RNGS
                    )
            return ((y - X[:, :8]) ** 2).mean(), rest_new

        grads, rest = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, rest

    params, state, rest = PARAMS, tx.init(PARAMS), REST
    for _ in range(5):
        params, state, rest = step(params, state, rest)
    masks = js.masks(state)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(MASKS), strict=True)
    )
    jax.tree.map(np.testing.assert_array_equal, masks, js.magnitude_masks(params, PLAN))
    back = js.decompress(js.compress(params, state))
    jax.tree.map(np.testing.assert_array_equal, back, js.effective_params(params, state))


def test_boxed_parameters_are_masked_as_bare_ones():
    model = nn.Dense(
        8, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "out"))
    )
    boxed = model.init(jax.random.key(0), X)
    bare = nn.meta.unbox(boxed)
    plan = js.flax.plan(model, {"kernel": "2:4"}, X)
    expected = model.apply(js.effective_params(bare, js.magnitude_masks(bare, plan)), X)
    with js.flax.intercept(js.magnitude_masks(boxed, plan)):
        np.testing.assert_array_equal(model.apply(boxed, X), expected)


def test_masks_of_other_parameters_are_refused_with_the_path():
    with (
        js.flax.intercept({"params": {"other": {"kernel": jnp.ones((4, 4), bool)}}}),
        pytest.raises(ValueError, match="other/kernel"),
    ):
        MODEL.apply({**PARAMS, **REST}, X, method="encode")
