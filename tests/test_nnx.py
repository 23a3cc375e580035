"""`jaxsparse.nnx`: plans of Modules, the context for effective weights, and a whole model."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, nnx

import jaxsparse as js
from jaxsparse.examples import char_lm, char_lm_nnx

# compiles in half the time
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
X = jax.random.normal(jax.random.key(1), (8, 16))


class Residual(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.linear(x))


class Net(nnx.Module):
    """A Module with all kinds of state.

    A stack under scan and remat, a Linear in two places, batch norm, dropout, a cache and an
    intermediate value.
    """

    def __init__(self, *, rngs):
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Residual(rngs=rngs)))(rngs)
        self.block = Residual(rngs=rngs)
        self.shared = self.block.linear
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Cache(jnp.array(0))
        self.hidden = nnx.Intermediate(jnp.zeros((8, 16)))
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        self.calls[...] += 1
        x = nnx.scan(nnx.remat(Residual.__call__), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.stack, x
        )
        x = self.drop(self.norm(self.shared(self.block(x))))
        self.hidden[...] = x
        return self.head(x)


@nnx.jit
def create():
    return Net(rngs=nnx.Rngs(0))


@functools.partial(nnx.jit, static_argnums=1)
def optimizer_of(model, recipe):
    plan = js.nnx.plan(model, {"*/kernel": js.anywhere("2:4")}, X)
    return nnx.Optimizer(model, recipe(optax.sgd(0.1), plan), wrt=nnx.Param)


def make(recipe=js.recipes.explore_exploit):
    model = create()
    return model, optimizer_of(model, recipe)


def quick(f):
    return jax.jit(f, compiler_options=QUICK)


def mdgf(inner, plan):
    return js.recipes.mdgf(inner, plan, total_steps=20, dense_until=1, fine_tune_from=19)


def loss_in_the_context(model, optimizer, **kwargs):
    with js.nnx.intercept(model, optimizer, **kwargs):
        return (model(X) ** 2).mean()


def pure(model, filter=...):
    """The arrays of a model by path, with random keys as integers."""
    leaves = nnx.to_flat_state(nnx.state(model, filter))
    arrays = {"/".join(map(str, path)): variable.get_value() for path, variable in leaves}
    return {
        path: jax.random.key_data(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else np.asarray(x)
        for path, x in arrays.items()
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


def nnx_step(model, optimizer):
    value, grads = nnx.value_and_grad(loss_in_the_context)(model, optimizer)
    optimizer.update(model, grads)
    return value, grads


def split_step(model, optimizer):
    """The same training step in pure functions, with `effective_params`."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        model = nnx.merge(graphdef, js.effective_params(params, optimizer), rest, copy=True)
        value = (model(X) ** 2).mean()
        return value, nnx.state(model, nnx.Not(nnx.Param))

    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
    nnx.update(model, rest)
    optimizer.update(model, grads)
    return value, grads


def merged_step(model, optimizer):
    """A training step with `intercept` on a model that is merged inside `jax.value_and_grad`."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return loss_in_the_context(model, optimizer), nnx.state(model, nnx.Not(nnx.Param))

    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
    nnx.update(model, rest)
    optimizer.update(model, grads)
    return value, grads


def through_jax_jit(step):
    """A step with the same signature, in which `jax.jit` sees only arrays."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def compiled(graphdef, state, args):
        model, optimizer = nnx.merge(graphdef, state)
        return step(model, optimizer, *args), nnx.state((model, optimizer))

    def run(model, optimizer, *args):
        result, state = compiled(*nnx.split((model, optimizer)), args)
        nnx.update((model, optimizer), state)
        return result

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "compiled", "recipe"),
    [(nnx_step, nnx.jit, js.recipes.explore_exploit), (merged_step, through_jax_jit, mdgf)],
    ids=["nnx.jit, rewired", "jax.jit, mdgf"],
)
def test_training_equals_that_by_sparse_params_on_split_state(step, compiled, recipe):
    model, optimizer = make(recipe)
    expected_model, expected_optimizer = make(recipe)
    step, expected_step = compiled(step), compiled(split_step)
    for _ in range(3):
        value, grads = step(model, optimizer)
        expected, expected_grads = expected_step(expected_model, expected_optimizer)
        np.testing.assert_array_equal(value, expected)
        assert_same(pure(grads), pure(expected_grads))
    assert_same(pure(model), pure(expected_model))
    assert_same(pure(optimizer), pure(expected_optimizer))
    assert model.calls[...] == 3
    assert model.drop.rngs.count[...] == 3
    assert np.any(model.norm.mean[...])
    assert np.any(model.hidden[...])


def test_the_params_hold_the_effective_weights_in_the_context_and_the_dense_ones_after_it():
    model, optimizer = make()
    dense = jax.tree.leaves(nnx.state(model, nnx.Param))
    others = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    expected = pure(js.effective_params(nnx.state(model, nnx.Param), optimizer))
    with pytest.raises(ZeroDivisionError), js.nnx.intercept(model, optimizer):
        assert_same(pure(model, nnx.Param), expected)
        assert model.shared.kernel is model.block.linear.kernel
        assert all(
            a is b
            for a, b in zip(
                jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param))), others, strict=True
            )
        )
        model.calls[...] += 1
        model.fresh = nnx.Intermediate(jnp.ones(2))
        _ = 1 / 0
    assert all(
        a is b for a, b in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), dense, strict=True)
    )
    assert model.calls[...] == model.fresh[...].sum() - 1 == 1
    assert any(np.any(expected[path] != value) for path, value in pure(model, nnx.Param).items())


def pair():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(16, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 4, rngs=rngs))


def pair_masks(model):
    return js.magnitude_masks(
        nnx.state(model, nnx.Param), js.nnx.plan(model, {"*/kernel": js.anywhere("2:4")}, X)
    )


def test_functions_compiled_before_the_context_follow_it():
    model, forward = pair(), nnx.jit(nnx.Sequential.__call__)
    masks = pair_masks(model)
    dense = forward(model, X)
    expected = forward(
        nnx.merge(nnx.graphdef(model), js.effective_params(nnx.state(model, nnx.Param), masks)), X
    )
    with js.nnx.intercept(model, masks):
        np.testing.assert_array_equal(forward(model, X), expected)
    np.testing.assert_array_equal(forward(model, X), dense)
    assert not np.array_equal(dense, expected)


@pytest.mark.parametrize(
    "source", [lambda optimizer: optimizer, lambda optimizer: optimizer.opt_state, js.masks]
)
def test_an_optimizer_its_state_and_masks_say_the_same(source):
    model = pair()
    plan = js.nnx.plan(model, {"*/kernel": js.anywhere("2:4")}, X)
    optimizer = nnx.Optimizer(
        model, js.recipes.explore_exploit(optax.sgd(0.1), plan), wrt=nnx.Param
    )
    with js.nnx.intercept(model, source(optimizer)):
        weights = pure(model)
    assert_same(weights, pure(js.effective_params(nnx.state(model, nnx.Param), optimizer)))


@pytest.mark.parametrize("gradient", ["dense", "masked"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph mode", "tree mode"])
def test_the_gradient_is_that_of_sparse_params(graph, gradient):
    model = pair()
    masks = pair_masks(model)
    graphdef, params = nnx.split(model)

    def loss(model):
        with js.nnx.intercept(model, masks, gradient=gradient):
            return (model(X) ** 2).mean()

    def expected_loss(params):
        return (
            nnx.merge(graphdef, js.effective_params(params, masks, gradient=gradient))(X) ** 2
        ).mean()

    grads = pure(nnx.grad(loss, graph=graph)(model))
    assert_same(grads, pure(jax.grad(expected_loss)(params)))
    dropped = ~np.asarray(masks["layers"][0]["kernel"].get_value())
    assert np.any(np.asarray(grads["layers/0/kernel"])[dropped]) == (gradient == "dense")


def test_a_vmapped_ensemble_runs_under_masks_of_its_own():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def ensemble(rngs):
        return nnx.Linear(16, 4, rngs=rngs)

    @nnx.vmap
    def forward(model, x):
        return model(x)

    model, x = ensemble(nnx.Rngs(0)), jnp.stack([X, X + 1, X - 1])
    plan = js.plan(nnx.state(model, nnx.Param), {"kernel": js.NM(2, 4, axis=-2)})
    masks = js.magnitude_masks(nnx.state(model, nnx.Param), plan)
    with js.nnx.intercept(model, masks):
        output = forward(model, x)
    kernel, bias = model.kernel[...], model.bias[...]
    for i in range(3):
        np.testing.assert_allclose(
            output[i],
            x[i] @ js.effective_weight(kernel[i], masks["kernel"][...][i]) + bias[i][None],
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_model_from_outside_of_the_traced_function_is_refused_and_left_as_it_was():
    model = pair()
    before = jax.tree.leaves(nnx.state(model))
    masks = pair_masks(model)

    @jax.jit
    def closed_over(x):
        with js.nnx.intercept(model, masks):
            return model(x)

    with pytest.raises(
        errors.TraceContextError,
        match=r"nnx\.intercept: `model` comes from outside.* as an argument",
    ):
        closed_over(X)
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(model)), before, strict=True))


def test_errors_name_the_call():
    model = pair()
    with pytest.raises(
        TypeError, match=r"nnx\.plan: `model` is a function, not a flax\.nnx\.Module"
    ):
        js.nnx.plan(pair, {"*": js.anywhere("2:4")}, X)
    with (
        pytest.raises(TypeError, match=r"nnx\.intercept: `model` is a State"),
        js.nnx.intercept(nnx.state(model), pair_masks(model)),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"nnx\.intercept: .* neither masks nor an optimizer state"),
        js.nnx.intercept(model, optax.EmptyState()),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"nnx\.intercept: the masks have a leaf layers/0"),
        js.nnx.intercept(model.layers[0], pair_masks(model)),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"nnx\.intercept: gradient='none'"),
        js.nnx.intercept(model, pair_masks(model), gradient="none"),
    ):
        pass


class Bare(nnx.Module):
    """A Module with weights in a list and in a dict, outside of other Modules."""

    def __init__(self, *, rngs):
        self.weights = nnx.List([nnx.Param(jnp.ones((16, 8)))])
        self.more = nnx.Dict(out=nnx.Param(jnp.ones((4, 8))))

    def __call__(self, x):
        return x @ self.weights[0] @ self.more["out"].T


KINDS = {
    "Linear": (lambda rngs: nnx.Linear(16, 4, rngs=rngs), X, {"kernel": ("Linear", -2, 1)}),
    "LinearGeneral": (
        lambda rngs: nnx.LinearGeneral((4, 8), (2, 8), axis=(-2, -1), rngs=rngs),
        jnp.ones((2, 4, 8)),
        {"kernel": ("LinearGeneral", -3, 2)},
    ),
    "Einsum": (
        lambda rngs: nnx.Einsum("be,ehd->bhd", (16, 4, 8), rngs=rngs),
        X,
        {"kernel": ("Einsum", -3, 1)},
    ),
    "Conv": (lambda rngs: nnx.Conv(16, 8, 3, rngs=rngs), X[None], {"kernel": ("Conv", -2, 2)}),
    "MultiHeadAttention": (
        lambda rngs: nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs),
        X[None],
        {
            **{f"{name}/kernel": ("LinearGeneral", -3, 1) for name in ("query", "key", "value")},
            "out/kernel": ("LinearGeneral", -2, 2),
        },
    ),
    "LoRA": (
        lambda rngs: nnx.LoRA(16, 4, 8, rngs=rngs),
        X,
        {"lora_a": ("LoRA", -2, 1), "lora_b": ("LoRA", -2, 1)},
    ),
    "Bare": (
        lambda rngs: Bare(rngs=rngs),
        X,
        {"weights/0": ("Bare", -2, 1), "more/out": ("Bare", -1, 1)},
    ),
    "Net": (
        lambda rngs: Net(rngs=rngs),
        X,
        {f"{path}/kernel": ("Linear", -2, 1) for path in ("block/linear", "stack/linear", "head")},
    ),
}


@pytest.mark.parametrize(("make", "x", "expected"), KINDS.values(), ids=KINDS)
def test_plans_learn_the_axes_and_say_whose_the_weights_are(make, x, expected):
    plan = js.nnx.plan(
        nnx.eval_shape(make, nnx.Rngs(0)),
        {"*": js.anywhere("2:4")},
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    assert {
        path: (leaf.layer, leaf.pattern.axis, len(leaf.summed))
        for path, leaf in plan.sparse.items()
    } == expected
    assert str(plan) == str(js.nnx.plan(make(nnx.Rngs(0)), {"*": js.anywhere("2:4")}, x))


def test_a_plan_leaves_the_model_as_it_was():
    model = create()
    before = jax.tree.leaves(nnx.state(model))
    plan = js.nnx.plan(model, {"*/kernel": js.anywhere("2:4")}, X)
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(model)), before, strict=True))
    model.calls[...] += 1
    assert [leaf.stack for leaf in plan.sparse.values()] == [(), (), (-3,)]


class Switched(nnx.Module):
    """A Module whose calls take static arguments."""

    def __init__(self, *, rngs):
        self.a = nnx.Linear(16, 4, rngs=rngs)
        self.b = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, first, *, rngs=None, mode="none", scale=1.0):
        y = self.a(x) if first else self.b(x)
        return y + rngs.noise.normal(y.shape) if mode == "noise" else scale * y

    def both(self, pair):
        return self.a(pair["a"]) + self.b(pair["b"])


def test_arguments_that_are_no_arrays_and_other_methods():
    model, rngs = Switched(rngs=nnx.Rngs(0)), nnx.Rngs(1)
    rules = {"*/kernel": js.anywhere("2:4")}
    assert js.nnx.plan(model, rules, X, True).sparse.keys() == {"a/kernel"}
    assert js.nnx.plan(model, rules, X, False, rngs=rngs, mode="noise").sparse.keys() == {
        "b/kernel"
    }
    assert js.nnx.plan(model, rules, np.asarray(X), first=True, scale=2).sparse.keys() == {
        "a/kernel"
    }
    assert js.nnx.plan(model, rules, {"a": X, "b": X}, method="both").sparse.keys() == {
        "a/kernel",
        "b/kernel",
    }
    assert rngs.default.count[...] == 0


PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "nnx.md").read_text()


def test_the_loop_of_the_documentation_runs_as_printed():
    loop, _ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    namespace = {}
    exec(loop, namespace)
    model, optimizer, params, packed, x = (
        namespace[name] for name in ("model", "optimizer", "params", "packed", "x")
    )
    assert isinstance(packed.layers[0].kernel.get_value(), js.Sparse24)
    mask = js.masks(optimizer)["layers"][0]["kernel"].get_value()
    np.testing.assert_array_equal(
        mask, js.nm_mask(jnp.abs(model.layers[0].kernel[...]), 2, 4, axis=0)
    )
    initial = nnx.Linear(64, 256, rngs=nnx.Rngs(0)).kernel[...]
    assert np.any(mask != js.nm_mask(jnp.abs(initial), 2, 4, axis=0))
    with js.nnx.intercept(model, optimizer):
        np.testing.assert_allclose(namespace["logits"], model(x), rtol=1e-5, atol=1e-5)
    assert not np.allclose(namespace["logits"], model(x), atol=1e-3)
    assert nnx.state(model, nnx.Param)["layers"][0]["kernel"] is params["layers"][0]["kernel"]


def test_a_trained_model_runs_compressed_with_its_statistics_and_gradients():
    model, optimizer = make()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    packed = jax.jit(js.compress)(params, optimizer.opt_state)

    def forward(params, rest):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return (model(X) ** 2).mean(), nnx.state(model, nnx.Not(nnx.Param))

    sparse = js.sparsify(forward)
    (sparse_value, sparse_rest), grads = quick(
        jax.value_and_grad(sparse, has_aux=True, allow_int=True)
    )(packed, rest)
    (expected, expected_rest), dense_grads = quick(jax.value_and_grad(forward, has_aux=True))(
        js.effective_params(params, optimizer), rest
    )
    np.testing.assert_allclose(sparse_value, expected, rtol=1e-5)
    for path, value in pure(expected_rest).items():
        np.testing.assert_allclose(
            pure(sparse_rest)[path], value, rtol=1e-5, atol=1e-5, err_msg=path
        )
    for path, grad in nnx.to_flat_state(js.compress(dense_grads, optimizer.opt_state)):
        actual = dict(nnx.to_flat_state(grads))[path].get_value()
        values = (
            (actual.values, grad.get_value().values)
            if isinstance(actual, js.Sparse24)
            else (actual, grad.get_value())
        )
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5, err_msg=str(path))
    ran = {use.path for use in sparse.report(packed, rest).products if not use.reason}
    assert ran == {"block/linear/kernel", "head/kernel", "stack/linear/kernel"}


@pytest.mark.slow
@pytest.mark.promotes("the example adds positions to a batch")
def test_the_character_model_trains_as_in_linen():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 11, (5, 2, char_lm.CONTEXT + 1))
    linen = char_lm.Transformer(11, 16, 2, heads=2)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), tokens[0, :, :-1])
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(scale=0.1, size=leaf.shape), leaf.dtype), shapes
    )

    rules, example = {"*/kernel": js.anywhere("2:4")}, tokens[0, :, :-1]
    plan = js.flax.plan(linen, rules, example)

    def recipe(plan):
        return js.recipes.explore_exploit(optax.adamw(1e-2), plan, reset_every=2)

    @nnx.jit
    def converted(params):
        model = char_lm_nnx.Transformer(11, 16, 2, heads=2, rngs=nnx.Rngs(0))
        nnx.update(model, char_lm_nnx.convert(params))
        nnx_plan = js.nnx.plan(model, rules, example)
        assert {path: leaf.pattern for path, leaf in nnx_plan.sparse.items()} == {
            path: leaf.pattern for path, leaf in plan.sparse.items()
        }
        return model, nnx.Optimizer(model, recipe(nnx_plan), wrt=nnx.Param)

    @through_jax_jit
    def step(model, optimizer, tokens):
        def loss(model):
            with js.nnx.intercept(model, optimizer):
                logits = model(tokens[:, :-1])
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean() / jnp.log(2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model, optimizer = converted(params)
    before = jax.jit(js.masks)(optimizer.opt_state)
    opt_state = jax.jit(recipe(plan).init)(params)
    linen_step = (
        char_lm.trainer(linen, recipe(plan), sparse=True)
        .lower(params, opt_state, tokens[0])
        .compile(QUICK)
    )
    losses = []
    for batch in tokens:
        params, opt_state, expected = linen_step(params, opt_state, batch)
        losses.append((step(model, optimizer, batch), expected))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-5)
    masks, expected = jax.jit(js.masks)(optimizer.opt_state), jax.jit(js.masks)(opt_state)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(masks), char_lm_nnx.convert(expected)
    )
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(before), strict=True)
    )
