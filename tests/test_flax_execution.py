"""Every kind of Flax layer runs masked and compressed as it would on sparse parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import promotion
import pytest
from flax import linen as nn

import jaxsparse as js

X = jax.random.normal(jax.random.key(1), (2, 8, 16))


class Block(nn.Module):
    features: int = 16

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(self.features)(nn.relu(nn.Dense(24)(x))), None


class Stacked(nn.Module):
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        scan = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scan(name="blocks")(x, None)[0]


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(16)
        return layer(nn.relu(layer(x)))


class Own(nn.Module):
    """A layer that reads its weights in `setup`; one has the name that flax.linen uses."""

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (16, 8))
        self.matrix = self.param("matrix", nn.initializers.lecun_normal(), (16, 8))
        self.sub = nn.Dense(8)

    def __call__(self, x):
        return x @ self.kernel * nn.sigmoid(x @ self.matrix) + self.sub(x)

    def gate(self, x):
        return nn.sigmoid(x @ self.matrix) + self.sub(x)


class Parent(nn.Module):
    def setup(self):
        self.own = Own()
        self.head = nn.Dense(4)

    def __call__(self, x):
        return self.head(self.own(x))

    def half(self, x):
        return self.own.gate(x)


class ListOfWeights(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, second = self.param("pair", lambda key: list(jax.random.normal(key, (2, 16, 16))))
        return nn.Dense(4)(x @ first @ second)


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3,))(x)
        x = nn.relu(nn.Dense(16, use_bias=False)(x))
        return nn.Dense(8)(nn.LayerNorm()(x))


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(8)(x)


def coarse(*arrays, dtype):
    return tuple(None if a is None else a.astype(jnp.bfloat16).astype(jnp.float32) for a in arrays)


ZOO = {
    "Dense": (nn.Dense(8), X),
    "Dense without bias": (nn.Dense(8, use_bias=False), X),
    "Dense of one row": (nn.Dense(8), X[0, 0]),
    "Dense in bfloat16": (nn.Dense(8, dtype=jnp.bfloat16), X),
    "Dense with weights in bfloat16": (nn.Dense(8, param_dtype=jnp.bfloat16), X),
    "Dense with another product": (
        nn.Dense(8, dot_general=lambda *args, **kwargs: 2 * jax.lax.dot_general(*args, **kwargs)),
        X,
    ),
    "Dense with another promotion": (nn.Dense(8, promote_dtype=coarse), X),
    "DenseGeneral": (nn.DenseGeneral((4, 5)), X),
    "DenseGeneral of two axes": (nn.DenseGeneral((4, 5), axis=(-2, -1)), X),
    "DenseGeneral of axes out of order": (nn.DenseGeneral(4, axis=(-1, 1)), X),
    "DenseGeneral of axes of one size out of order": (nn.DenseGeneral(4, axis=(-1, 1)), X[..., :8]),
    "DenseGeneral of the first axis": (nn.DenseGeneral(4, axis=1, use_bias=False), X),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=4), X),
    "Conv": (nn.Conv(8, (3,)), X),
    "Conv of two dimensions": (nn.Conv(8, (3, 2), strides=2), X[:, :, None].repeat(4, 2)),
    "ConvTranspose": (nn.ConvTranspose(8, (3,), strides=(2,)), X),
    "Einsum": (nn.Einsum((16, 4, 8), "btd,dhk->bthk"), X),
    "Einsum with the output first": (nn.Einsum((8, 16), "...d,fd->...f", use_bias=False), X),
    "scan along the first axis": (Stacked(0), X),
    "scan along the second axis": (Stacked(1), X),
    "scan of remat": (Stacked(0, remat=True), X),
    "remat": (nn.remat(Sequence)(), X),
    "vmap": (Mapped(), X),
    "RNN": (nn.RNN(nn.LSTMCell(12)), X),
    "shared": (Shared(), X),
    "own weights": (Own(), X),
    "own weights below": (Parent(), X),
    "list of weights": (ListOfWeights(), X),
    "sequence": (Sequence(), X),
}
PROMOTING = ("Dense with weights in bfloat16",)
RULES = {"*[kK]ernel": js.anywhere("2:4"), "*matrix*": js.anywhere("2:4")}


@functools.cache
def prepared(name):
    """The model, its input, parameters, plan and masks."""
    model, x = ZOO[name]
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(random.normal(size=a.shape) / 4).astype(a.dtype),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    rules = {
        rule: pattern
        for rule, pattern in RULES.items()
        if rule == "*[kK]ernel" or name.startswith("own")
    }
    plan = js.flax.plan(model, rules, x)
    assert plan.sparse, str(plan)
    return model, x, params, plan, js.magnitude_masks(params, plan)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def as_numbers(y):
    return (y.astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize(
    "name, gradient",
    promotion.marked(
        [*((name, "dense") for name in ZOO), ("attention", "masked"), ("own weights", "masked")],
        PROMOTING,
        "flax promotes to the dtype of the input",
    ),
)
def test_intercepted_outputs_and_gradients_equal_those_of_sparse_params(name, gradient):
    model, x, params, _, masks = prepared(name)

    def intercepted(params):
        with js.flax.intercept(masks, gradient=gradient):
            y = model.apply(params, x)
        return as_numbers(y), y

    def plain(params):
        y = model.apply(js.effective_params(params, masks, gradient=gradient), x)
        return as_numbers(y), y

    (_, output), grads = jax.jit(jax.value_and_grad(intercepted, has_aux=True))(params)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    assert output.dtype == expected.dtype
    np.testing.assert_array_equal(output, expected)
    assert_equal(grads, expected_grads)
    assert not np.array_equal(output, jax.jit(model.apply)(params, x))


@pytest.mark.parametrize(
    "name",
    [
        "Dense",
        "attention",
        "scan along the first axis",
        "remat",
        "vmap",
        "RNN",
        "own weights below",
    ],
)
def test_init_under_it_gives_the_usual_parameters(name):
    model, x, _, _, masks = prepared(name)

    def init(key, x):
        with js.flax.intercept(masks):
            return model.init(key, x)

    assert_equal(jax.jit(init)(jax.random.key(0), x), jax.jit(model.init)(jax.random.key(0), x))


@pytest.mark.parametrize(
    "name", promotion.marked(ZOO, PROMOTING, "flax promotes to the dtype of the input")
)
def test_compressed_execution_equals_the_masked_forward(name):
    model, x, params, plan, masks = prepared(name)
    packed = js.compress(params, masks, plan)
    assert sum(
        isinstance(leaf, js.Sparse24)
        for leaf in jax.tree.leaves(packed, is_leaf=lambda a: isinstance(a, js.Sparse24))
    )
    expected = jax.jit(model.apply)(js.effective_params(params, masks), x)
    with js.flax.intercept():
        output = jax.jit(model.apply)(packed, x)
    assert output.dtype == expected.dtype
    tolerance = 2e-2 if output.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(output, np.float32),
        np.asarray(expected, np.float32),
        rtol=tolerance,
        atol=tolerance,
    )


SPARSE_PRODUCTS = {
    "Dense": 1,
    "Dense of one row": 1,
    "Dense in bfloat16": 1,
    "DenseGeneral of two axes": 1,
    "DenseGeneral of axes out of order": 1,
    "DenseGeneral of the first axis": 1,
    "attention": 4,
    "scan along the first axis": 2,
    "scan of remat": 2,
    "vmap": 1,
    "RNN": 8,
    "shared": 2,
    "own weights": 3,
    "own weights below": 4,
    "list of weights": 1,
    "scan along the second axis": 2,
    "Dense with another product": 1,
    "Dense with another promotion": 1,
    "Einsum": 1,
    "Einsum with the output first": 1,
    "Conv": 0,
    "sequence": 2,
}


@pytest.mark.parametrize("name", SPARSE_PRODUCTS)
def test_products_run_compressed(name):
    model, x, params, plan, masks = prepared(name)
    with js.flax.intercept():
        program = jax.make_jaxpr(model.apply)(js.compress(params, masks, plan), x)
    assert str(program).count("sparse_matmul[") == SPARSE_PRODUCTS[name]


@pytest.mark.parametrize("call", ["by place", "by name", "boxed"])
def test_a_dense_layer_runs_the_sparse_product_however_it_is_called_and_its_weight_boxed(call):
    boxes = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "out"))
    model = nn.Dense(8, kernel_init=boxes if call == "boxed" else nn.initializers.lecun_normal())
    params = model.init(jax.random.key(0), X)
    plan = js.flax.plan(model, {"kernel": "2:4"}, X)
    masks = js.magnitude_masks(params, plan)
    packed = js.compress(params, masks, plan)
    x = {"inputs": X} if call == "by name" else {}
    with js.flax.intercept():
        program = jax.make_jaxpr(lambda packed: model.apply(packed, *([] if x else [X]), **x))(
            packed
        )
        y = model.apply(packed, *([] if x else [X]), **x)
    assert str(program).count("sparse_matmul[") == 1
    np.testing.assert_allclose(
        y, model.apply(js.effective_params(nn.meta.unbox(params), masks), X), rtol=1e-5, atol=1e-5
    )


def test_a_named_implementation_is_that_of_every_product():
    model, x, params, plan, masks = prepared("attention")
    packed = js.compress(params, masks, plan)
    for implementation in (None, "dense"):
        with js.flax.intercept(implementation=implementation):
            program = jax.make_jaxpr(model.apply)(packed, x)
        assert str(program).count(f"implementation={implementation}") == 4
    with (
        pytest.raises(ValueError, match='"hopper" cannot compute this: it takes bfloat16'),
        js.flax.intercept(implementation="hopper"),
    ):
        model.apply(packed, x)
    half = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, packed
    )
    with (
        pytest.raises(NotImplementedError, match="it needs a CUDA device"),
        js.flax.intercept(implementation="hopper"),
    ):
        nn.DenseGeneral((4, 4), dtype=jnp.bfloat16).apply(
            {"params": half["params"]["query"]}, x.astype(jnp.bfloat16)
        )


@pytest.mark.parametrize(
    "name",
    [
        "Dense",
        "DenseGeneral of two axes",
        "attention",
        "Conv",
        "scan of remat",
        "own weights below",
    ],
)
def test_gradients_of_compressed_values_are_the_dense_ones_at_their_places(name):
    model, x, params, plan, masks = prepared(name)

    def loss(packed):
        with js.flax.intercept():
            return as_numbers(model.apply(packed, x))

    gradients = jax.jit(jax.grad(loss, allow_int=True))(js.compress(params, masks, plan))
    dense = jax.jit(jax.grad(lambda params: as_numbers(model.apply(params, x))))(
        js.effective_params(params, masks)
    )
    expected = js.compress(dense, masks, plan)
    values = [
        jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, js.Sparse24))
        for tree in (gradients, expected)
    ]
    for a, b in zip(*values, strict=True):
        assert isinstance(a, js.Sparse24) == isinstance(b, js.Sparse24)
        a, b = (leaf.values if isinstance(leaf, js.Sparse24) else leaf for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


LAYERS = {
    "Dense": (lambda **options: nn.Dense(24, **options), (4, 16)),
    "DenseGeneral": (
        lambda **options: nn.DenseGeneral((4, 6), axis=(-2, -1), **options),
        (4, 2, 8),
    ),
}
DTYPES = {
    "bfloat16": (jnp.bfloat16, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}, jnp.bfloat16),
    "float32 made bfloat16": (jnp.float32, {"dtype": jnp.bfloat16}, jnp.bfloat16),
    "bfloat16 made float32": (
        jnp.bfloat16,
        {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
        jnp.float32,
    ),
    "promoted": (jnp.float32, {"param_dtype": jnp.float16}, jnp.float32),
    "float16": (jnp.float16, {"param_dtype": jnp.float16}, jnp.float16),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtypes", promotion.marked(DTYPES, ["promoted"], "flax promotes to the dtype of the input")
)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_the_bias_is_added_as_flax_does_or_before_rounding_where_a_kernel_may_run(layer, dtypes):
    (make, shape), (x_dtype, options, out_dtype) = layer, DTYPES[dtypes]
    # integers: sums are exact in float32 and are rounded in 16 bits
    random = np.random.default_rng(0)
    x = jnp.asarray(random.integers(-40, 41, shape), x_dtype)
    model = make(**options)
    params = jax.tree.map(
        lambda a: jnp.asarray(random.integers(-40, 41, a.shape), a.dtype),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    plan = js.flax.plan(model, {"kernel": "2:4"}, x)
    masks = js.magnitude_masks(params, plan)
    masked = js.effective_params(params, masks)

    def run(params):
        with js.flax.intercept():
            return model.apply(params, x)

    kernel, bias = (np.asarray(masked["params"][name], np.float64) for name in ("kernel", "bias"))
    exact = np.asarray(x, np.float64).reshape(4, -1) @ kernel.reshape(16, 24)
    bias = bias.reshape(1, 24)
    once = jnp.asarray(exact + bias).astype(out_dtype)
    twice = jnp.asarray(exact).astype(out_dtype) + jnp.asarray(bias).astype(out_dtype)
    assert (once != twice).any() == (out_dtype != jnp.float32)
    as_flax = model.apply(masked, x)
    np.testing.assert_array_equal(as_flax.reshape(4, 24), twice)
    expected_grads = jax.grad(lambda params: as_numbers(model.apply(params, x)))(masked)["params"]
    for layout in ("canonical", "mma16")[: 2 if masked["params"]["kernel"].itemsize == 2 else 1]:
        packed = js.compress(params, masks, plan, layout=layout)
        output = run(packed)  # outside of jit, where XLA may leave out the rounding in between
        assert output.dtype == as_flax.dtype == out_dtype and output.shape == as_flax.shape
        np.testing.assert_array_equal(output.reshape(4, 24), once if layout == "mma16" else twice)
        grads = jax.grad(lambda packed: as_numbers(run(packed)), allow_int=True)(packed)["params"]
        np.testing.assert_allclose(
            grads["bias"].astype(jnp.float32), expected_grads["bias"].astype(jnp.float32), rtol=2e-2
        )


def test_precision_of_the_module_reaches_the_sparse_product():
    model = nn.Dense(8, precision="highest")
    params = model.init(jax.random.key(0), X)
    packed = js.compress(
        params, js.magnitude_masks(params, js.flax.plan(model, {"*kernel": js.anywhere("2:4")}, X))
    )
    with js.flax.intercept():
        assert "HIGHEST, HIGHEST" in jax.jit(model.apply).lower(packed, X).as_text()
