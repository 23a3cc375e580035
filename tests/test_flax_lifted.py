"""Lifted models, boxed parameters and unusual calls are planned, masked and compressed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from promotion import promoting

import jaxsparse as js

X = jax.random.normal(jax.random.key(1), (4, 16))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.relu(nn.Dense(24)(x)))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Net()(x), None


class Owner(nn.Module):
    """A module that owns its kernel and has a decorated method."""

    @functools.partial(nn.vmap, variable_axes={"params": 0}, split_rngs={"params": True})
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (16, 8))


class Decorated(nn.Module):
    """A recurrence written with a decorated method."""

    @functools.partial(
        nn.scan, variable_broadcast="params", split_rngs={"params": False}, in_axes=0, out_axes=0
    )
    @nn.compact
    def __call__(self, carry, x):
        carry = nn.tanh(nn.Dense(16)(carry) + nn.Dense(16)(x))
        return carry, carry


class Turned(nn.Module):
    """A module that sees its parameters transposed; its square shape does not help."""

    @nn.compact
    def __call__(self, x):
        turn = functools.partial(jax.tree.map, lambda w: w.T)
        return nn.map_variables(
            nn.Dense, "params", turn, turn, init=self.is_initializing(), mutable=True
        )(16, use_bias=False)(x)


class Reads(nn.Module):
    """A module with two methods, one of them compiled."""

    def setup(self):
        self.layer = nn.Dense(8)

    @nn.jit
    def __call__(self, x):
        return self.layer(x)


BOXED_KERNEL = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
BOXED_BIAS = nn.with_logical_partitioning(nn.initializers.zeros, ("out",))
PARAMS = {"params": True}
MODELS = {
    "nn.vmap": (
        nn.vmap(Net, variable_axes={"params": 0}, split_rngs=PARAMS)(),
        (jnp.stack([X, 2 * X, -X]),),
        2,
    ),
    "nn.scan": (
        nn.scan(Body, variable_axes={"params": 0}, split_rngs=PARAMS, length=3)(),
        (X, None),
        2,
    ),
    "nn.scan along axis 1": (
        nn.scan(Body, variable_axes={"params": 1}, split_rngs=PARAMS, length=3)(),
        (X, None),
        2,
    ),
    "nn.remat_scan": (nn.remat_scan(Net, lengths=(2, 2))(), (X,), 2),
    "nn.jit": (nn.jit(Net)(), (X,), 2),
    "nn.remat": (nn.remat(Net)(), (X,), 2),
    "a vmapped method": (Owner(), (jnp.stack([X, 2 * X, -X]),), 1),
    "a scanned method": (Decorated(), (X[0], X), 2),
    "a compiled method": (Reads(), (X,), 1),
    "mapped variables": (Turned(), (X,), 1),
    "RNN": (nn.RNN(nn.OptimizedLSTMCell(16)), (X[None],), 2),
    "WeightNorm": (nn.WeightNorm(nn.Dense(8)), (X,), 1),
    "boxed kernel and bias": (nn.Dense(8, kernel_init=BOXED_KERNEL, bias_init=BOXED_BIAS), (X,), 1),
}


@functools.cache
def prepared(name):
    model, args, _ = MODELS[name]
    params = model.init(jax.random.key(0), *args)
    plan = js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, *args)
    assert len(plan.sparse) == sum(leaf.path.endswith("kernel") for leaf in plan.leaves), str(plan)
    return model, args, params, plan, js.magnitude_masks(params, plan)


def close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_masked(name):
    model, args, params, _, masks = prepared(name)
    expected = jax.jit(model.apply)(js.effective_params(params, masks), *args)
    with js.flax.intercept(masks):
        close(model.apply(params, *args), expected)
        close(jax.jit(model.apply)(params, *args), expected)
    assert not np.allclose(
        jax.tree.leaves(model.apply(params, *args))[-1], jax.tree.leaves(expected)[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compressed(name):
    model, args, params, plan, masks = prepared(name)
    packed = js.compress(params, masks, plan)
    expected = jax.jit(model.apply)(js.effective_params(params, masks), *args)
    with js.flax.intercept():
        close(model.apply(packed, *args), expected)
        program = str(jax.make_jaxpr(model.apply)(packed, *args))
    assert program.count("sparse_matmul[") == MODELS[name][2]
    sparse = js.sparsify(lambda params: model.apply(params, *args))
    close(jax.jit(sparse)(packed), expected)
    assert str(jax.make_jaxpr(sparse)(packed)).count("sparse_matmul[") == MODELS[name][2]


class Trained(nn.Module):
    axis_name: str = "batch"

    @nn.compact
    def __call__(self, x, train, scale=None):
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(nn.Dense(8)(x))
        return nn.Dropout(0.5, deterministic=not train)(x) * (1 if scale is None else scale)


@pytest.mark.parametrize("train", [True, False])
def test_plans_of_models_with_named_axes_positional_booleans_and_keys(train):
    model = Trained()
    for rngs in ({}, {"rngs": jax.random.key(0)}, {"rngs": {"dropout": jax.random.key(1)}}):
        plan = js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, X, train, scale=2, **rngs)
        assert list(plan.sparse) == ["Dense_0/kernel"]
    variables = model.init(jax.random.key(0), X, False)
    params, rest = {"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}
    packed = js.compress(params, js.magnitude_masks(params, plan), plan)
    with js.flax.intercept():
        output = model.apply({**packed, **rest}, X, False)
    masked = js.effective_params(params, js.magnitude_masks(params, plan))
    close(output, model.apply({**masked, **rest}, X, False))


def test_a_static_result_of_a_packed_model_stays_static():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"y": nn.Dense(8)(x), "name": "logits", "none": None, "count": 3}

    model = Named()
    params = model.init(jax.random.key(0), X)
    plan = js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, X)
    masks = js.magnitude_masks(params, plan)
    with js.flax.intercept():
        output = model.apply(js.compress(params, masks, plan), X)
    expected = model.apply(js.effective_params(params, masks), X)
    close(output.pop("y"), expected.pop("y"))
    assert output == expected


def test_parameters_returned_as_mutable_are_the_packed_ones():
    model, args, params, plan, masks = prepared("nn.remat")
    packed = js.compress(params, masks, plan)
    with js.flax.intercept():
        _, collections = jax.jit(functools.partial(model.apply, mutable=True))(packed, *args)
    jax.tree.map(np.testing.assert_array_equal, dict(collections["params"]), packed["params"])


NAMED = {
    "told otherwise": (lambda x, w: x @ w, js.NM(2, 4, axis=1), ValueError),
    "told so": (lambda x, w: x @ w, js.NM(2, 4, axis=0), ""),
    "lost in arithmetic": (
        lambda x, w: x @ (w + w @ w),
        js.NM(2, 4, axis=1),
        "axis as named: shared by products",
    ),
    "never in a product": (
        lambda x, w: (x * w[0]).sum(),
        js.NM(2, 4, axis=1),
        "axis as named: used by mul, not by a matrix product",
    ),
    "scaled along the sum": (
        lambda x, w: x @ (w * x[0][:, None]),
        js.NM(2, 4, axis=0),
        "axis as named: combined before its product",
    ),
    "shared": (
        lambda x, w: x @ w + x @ w.T,
        js.NM(2, 4, axis=1),
        "axis as named: shared by products that sum over different axes",
    ),
    "looked up": (
        lambda x, w: w[jnp.arange(3)] @ w.T,
        js.NM(2, 4, axis=1),
        "axis as named: an embedding table",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_rule_that_names_its_axis_is_checked_and_where_nothing_tells_taken_at_its_word(name):
    use, pattern, outcome = NAMED[name]

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (16, 16))
            return promoting(use)(x, kernel)

    if outcome is ValueError:
        with pytest.raises(
            ValueError, match=r"names axis 1 for kernel.*but the program sums over axis -2"
        ):
            js.flax.plan(One(), {"kernel": pattern}, X)
        return
    (leaf,) = js.flax.plan(One(), {"kernel": pattern}, X).leaves
    assert leaf.pattern.axes == (pattern.axis - 2,)
    assert leaf.reason.startswith(outcome) and bool(leaf.reason) == bool(outcome)
    (unnamed,) = js.flax.plan(One(), {"kernel": "2:4"}, X).leaves
    assert (unnamed.pattern is None) == bool(outcome)


def test_a_wildcard_that_names_one_axis_for_kernels_of_different_rank_warns():
    params = {"q": jnp.zeros((16, 4, 8)), "out": jnp.zeros((16, 8))}
    with pytest.warns(
        UserWarning, match=r"plan: rule '\*' names one axis for weights of 2 and 3 axes"
    ):
        js.plan(params, {"*": js.NM(2, 4, axis=-2)})


def test_the_arguments_of_a_planned_function_are_arrays():
    def fn(params, x, mode):
        return x @ params["w"] if mode == "on" else x

    params = {"w": jnp.zeros((16, 8))}
    with pytest.raises(
        TypeError,
        match=r"plan: argument \[0\]\[1\] of `fn` is a str, not an array. "
        r"Bind it with functools.partial",
    ):
        js.plan(params, {"w": "2:4"}, fn, X, "on")
    assert (
        js.plan(params, {"w": "2:4"}, functools.partial(fn, mode="on"), X).sparse["w"].pattern.axis
        == -2
    )
    with pytest.raises(TypeError, match="plan: there are arguments but no function"):
        js.plan(params, {"w": "2:4"}, None, X)
