"""The axis that `flax.plan` learns for each kind of layer, or the reason why it stays dense."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from planning import planned, spec
from promotion import promoting

import jaxsparse as js

TABLE = "an embedding table: its rows are looked up"
VARIES = "combined before its product with values that vary along the summed axis"
RESHAPED = "reshaped before its matrix product, so its axes cannot be identified"
CHANGED = "differs between the steps or branches of a "
REPEATED = "broadcast, so that all outputs of its matrix product are equal"
GROUPED = "the kernel of a grouped convolution, which sums over some input channels only"


class Custom(nn.Module):
    """A custom kernel, made in `setup` and used by `use(x, w)`."""

    shape: tuple
    use: callable

    def setup(self):
        self.w = self.param("w", nn.initializers.normal(), self.shape)

    def __call__(self, x):
        return promoting(self.use)(x, self.w)


def custom(shape, use, x):
    return planned(Custom(shape, use), x)["w"]


def convolved(kernel):
    return jax.lax.conv(jnp.ones((1, 8, 3, 3)), kernel, (1, 1), "SAME")


X = spec(2, 8)
IMAGE = spec(1, 8, 8, 8)
LAYERS = [
    (nn.Dense(12), X, {"kernel": (-2, 1, ())}),
    (nn.Dense(12, dtype=jnp.bfloat16), X, {"kernel": (-2, 1, ())}),
    (nn.DenseGeneral(12), X, {"kernel": (-2, 1, ())}),
    (nn.DenseGeneral((3, 4)), X, {"kernel": (-3, 1, ())}),
    (nn.DenseGeneral(4, axis=(-2, -1)), spec(2, 3, 8), {"kernel": (-2, 2, ())}),
    (nn.DenseGeneral((4, 12), axis=(-2, -1)), spec(2, 3, 8), {"kernel": (-3, 2, ())}),
    (nn.DenseGeneral(4, axis=(1, 2, 3)), spec(2, 3, 5, 8), {"kernel": (-2, 3, ())}),
    (
        nn.DenseGeneral(4, axis=(-1, 1)),
        spec(2, 3, 8),
        {"kernel": (-2, 2, ())},
    ),  # Flax sorts the axes
    (nn.DenseGeneral(4, batch_dims=0), spec(2, 8), {"kernel": (-2, 1, (-3,))}),
    (nn.Conv(4, (3,)), spec(1, 9, 8), {"kernel": (-2, 2, ())}),
    (nn.Conv(4, (3, 3)), IMAGE, {"kernel": (-2, 3, ())}),
    (
        nn.Conv(4, (3, 3), kernel_dilation=2, strides=2, padding="VALID"),
        IMAGE,
        {"kernel": (-2, 3, ())},
    ),
    (nn.Conv(4, (3, 3), padding="CIRCULAR"), IMAGE, {"kernel": (-2, 3, ())}),
    (nn.Conv(8, (3, 3), feature_group_count=2), IMAGE, {"kernel": GROUPED}),
    (nn.Conv(8, (3, 3), feature_group_count=8), IMAGE, {"kernel": GROUPED}),
    (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), IMAGE, {"kernel": (-2, 3, ())}),
    (nn.Einsum((8, 12), "bi,ij->bj"), X, {"kernel": (-2, 1, ())}),
    (nn.Einsum((12, 8), "bi,ji->bj"), X, {"kernel": (-1, 1, ())}),
    (nn.Einsum((4, 8, 3), "bi,hid->bhd"), X, {"kernel": (-2, 1, ())}),
    (nn.Einsum((5, 3, 8), "bhi,jhi->bj"), spec(2, 3, 8), {"kernel": (-1, 2, ())}),
    (nn.Einsum((8, 5, 4), "bhi,ijh->bj"), spec(2, 4, 8), {"kernel": (-1, 2, ())}),
    (nn.Einsum((3, 8, 5), "bhi,hij->bhj"), spec(2, 3, 8), {"kernel": (-2, 1, (-3,))}),
    (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), IMAGE, {"kernel": (-1, 3, ())}),
    (nn.ConvLocal(4, (3, 3)), IMAGE, {"kernel": (-2, 1, (-4, -3))}),
    (nn.WeightNorm(nn.Dense(8)), X, {"layer_instance/kernel": (-2, 1, ())}),
    (nn.Dense(12), spec(2, 6), {"kernel": "axis -2 has size 6, not a multiple of m=4"}),
    (nn.Conv(4, (4, 4)), spec(1, 8, 8, 3), {"kernel": "axis -2 has size 3, not a multiple of m=4"}),
    (nn.Embed(8, 4), spec(2, dtype="int32"), {"embedding": TABLE}),
]


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    LAYERS,
    ids=[f"{i}-{type(model).__name__}" for i, (model, _, _) in enumerate(LAYERS)],
)
def test_layers(model, x, expected):
    assert planned(model, x) == expected


@pytest.mark.parametrize(
    ("shape", "use", "expected"),
    [
        ((8, 12), lambda x, w: x @ w, (-2, 1, ())),
        ((12, 8), lambda x, w: x @ w.T, (-1, 1, ())),
        ((12, 8), lambda x, w: (w @ x.T).T, (-1, 1, ())),
        ((3, 8, 4), lambda x, w: jnp.einsum("bi,hio->bho", x, w), (-2, 1, ())),
        ((2, 4, 12), lambda x, w: x @ w.reshape(8, 12), (-2, 2, ())),
        ((8, 3, 4), lambda x, w: x @ w.reshape(8, 12), (-3, 1, ())),
        ((8, 12), lambda x, w: x @ w.astype(jnp.bfloat16), (-2, 1, ())),
        ((8, 12), lambda x, w: x @ jax.lax.stop_gradient(w), (-2, 1, ())),
        ((8, 24), lambda x, w: x @ w[:, :12] + x @ w[:, 12:], (-2, 1, ())),
        ((8, 24), lambda x, w: jnp.split(x @ w, 2, axis=-1)[0], (-2, 1, ())),
        ((8, 8), lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), (-2, 1, ())),
        ((8, 8), lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), (-2, 1, ())),
        ((8, 8), lambda x, w: jax.jit(jax.checkpoint(jnp.matmul))(x, w), (-2, 1, ())),
        ((2, 8, 3), lambda x, w: jax.vmap(jnp.matmul)(x, w), (-2, 1, (-3,))),
        (
            (8, 8),
            lambda x, w: x @ w + x @ w.T,
            "shared by products that sum over different axes [-2, -1]",
        ),
        ((8,), lambda x, w: x * w, "used by mul, not by a matrix product"),
        ((1, 8, 12), lambda x, w: x @ w[0], (-2, 1, ())),
        (
            (16, 12),
            lambda x, w: x @ w.reshape(2, 8, 12)[0],
            "reshaped before its matrix product, so its axes cannot be identified",
        ),
        ((12,), lambda x, w: x[:, :1] @ w.reshape(1, 12), "an operand of an outer product"),
        ((8, 12), lambda x, w: x @ jnp.concatenate([w, w], 1), (-2, 1, ())),
        ((8, 8), lambda x, w: x @ jnp.concatenate([w, w], 0)[:8], (-2, 1, ())),
        ((8, 8), lambda x, w: x @ (w * 2), (-2, 1, ())),
        ((8, 8), lambda x, w: x @ (w * jnp.arange(8.0)), (-2, 1, ())),
        ((8, 8), lambda x, w: x @ (w * jnp.arange(8.0)[:, None]), VARIES),
        ((8, 8), lambda x, w: x @ (w * jnp.eye(8)), "used by mul, not by a matrix product"),
        ((8, 8), lambda x, w: x @ (w - w.mean(0)) / w.std(0), (-2, 1, ())),
        ((8, 8), lambda x, w: x @ w + jnp.sum(w**2), (-2, 1, ())),
        ((8, 8), lambda x, w: x @ (w + x.T @ x), "used by add, not by a matrix product"),
        ((8, 12), lambda x, w: x @ jnp.where(w.sum(0) > 0, w, 0), (-2, 1, ())),
        ((8, 12), lambda x, w: x @ w[:, ::-1], (-2, 1, ())),
        ((8, 12), lambda x, w: x @ jnp.pad(w, ((0, 0), (0, 4))), (-2, 1, ())),
        (
            (8, 12),
            lambda x, w: jnp.einsum("bij,ijo->bo", x.reshape(2, 2, 4), w.reshape(2, 4, 12)),
            (-2, 1, ()),
        ),
        ((8, 3, 4), lambda x, w: x @ w.reshape(8, 12).reshape(8, 6, 2)[:, 0], (-3, 1, ())),
        ((4, 8, 2), lambda x, w: jnp.einsum("bi,bio->bo", x, w[jnp.array([0, 3])]), (-2, 1, (-3,))),
        (
            (4, 8, 2),
            lambda x, w: jnp.einsum("bi,bkio->bko", x, w[jnp.array([[0, 3], [1, 1]])]),
            (-2, 1, (-3,)),
        ),
        ((4, 8, 2), lambda x, w: w[jnp.array([0, 3])].sum(-1) @ x.T, TABLE),
        ((9, 8), lambda x, w: x @ w[jnp.array([0, 3])].T, TABLE),
        (
            (9, 8),
            lambda x, w: (
                jax.lax.scan(lambda c, _: (jnp.tanh(c), None), w[jnp.array([0, 3])], length=2)[0]
                @ w.T
            ),
            TABLE,
        ),
        (
            (8, 8),
            lambda x, w: jax.lax.fori_loop(0, 2, lambda _, c: c @ c, w).sum() + x @ w,
            CHANGED,
        ),
        (
            (16, 8),
            lambda x, w: jax.lax.scan(
                lambda c, w: (c, x @ w), 0, jnp.moveaxis(w.reshape(8, 2, 8), 1, 0)
            )[1],
            RESHAPED,
        ),
        (
            (8, 8),
            lambda x, w: x @ jax.lax.cond(x.sum() > 0, lambda w: w, lambda w: w.T, w) + x @ w,
            CHANGED,
        ),
        (
            (8, 8),
            lambda x, w: (
                jax.lax.fori_loop(0, 2, lambda _, c: (c[0] * 0.5, c[1] @ c[0].T), (w, x))[1] + x @ w
            ),
            CHANGED,
        ),
        ((16, 8), lambda x, w: x @ w[::2], RESHAPED),
        ((8, 12), lambda x, w: x @ w[:, ::2], (-2, 1, ())),
        (
            (8, 4),
            lambda x, w: jnp.einsum("ab,ab->", jnp.roll(w, 1, 0), x.reshape(4, 4).repeat(2, 0)),
            (-1, 2, ()),
        ),
        ((8,), lambda x, w: jnp.broadcast_to(w, (2, 8)) @ x.T, REPEATED),
        ((8,), lambda x, w: (jnp.zeros((2, 8)) + w) @ x.T, REPEATED),
        ((8,), lambda x, w: x @ w, (-1, 1, ())),
        ((72, 4), lambda x, w: convolved(w.reshape(3, 3, 8, 4).transpose(3, 2, 0, 1)), (-2, 1, ())),
        ((3, 8, 4), lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([1, 1, 0])), (-2, 1, (-3,))),
        ((8, 8), lambda x, w: jax.nn.one_hot(jnp.arange(2), 8) @ w, TABLE),
        ((8, 8), lambda x, w: (x > 0).astype(jnp.float32) @ w, (-2, 1, ())),
        (
            (8, 8),
            lambda x, w: jax.lax.while_loop(
                lambda s: s[0].sum() < 0, lambda s: (s[0] @ s[1], s[1]), (x, w)
            )[0],
            (-2, 1, ()),
        ),
        (
            (64,),
            lambda x, w: x @ w.reshape(8, 8),
            "reshaped before its matrix product, so its axes cannot be identified",
        ),
        ((2, 8), lambda x, w: w[jnp.zeros(2, int)], TABLE),
        ((8, 8), lambda x, w: x, "not used by the function when it is called with these arguments"),
    ],
)
def test_kernels_of_custom_modules(shape, use, expected):
    planned_or_reason = custom(shape, use, X)
    assert (
        planned_or_reason.startswith(expected)
        if isinstance(expected, str)
        else planned_or_reason == expected
    )


def test_attention_projections():
    kernels = planned(nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32), spec(2, 5, 16))
    heads = dict.fromkeys(["query/kernel", "key/kernel", "value/kernel"], (-3, 1, ()))
    assert kernels == {**heads, "out/kernel": (-2, 2, ())}


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(16, 8)
        return embed.attend(nn.Dense(8)(embed(tokens)))


def test_a_tied_embedding_stays_dense():
    assert planned(Tied(), spec(2, 3, dtype="int32")) == {
        "Dense_0/kernel": (-2, 1, ()),
        "Embed_0/embedding": TABLE,
    }


class Trained(nn.Module):
    """Batch norm and dropout, with an argument that distinguishes training from evaluation."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10)(x)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_and_batch_norm_with_keyword_arguments(train):
    plan = js.flax.plan(Trained(), {"*": js.anywhere("2:4")}, IMAGE, train=train)
    assert {path: leaf.pattern.axis for path, leaf in plan.sparse.items()} == {
        "Conv_0/kernel": -2,
        "Dense_0/kernel": -2,
    }
    reasons = {leaf.path: leaf.reason for leaf in plan.leaves if leaf.pattern is None}
    assert set(reasons) == {"BatchNorm_0/bias", "BatchNorm_0/scale", "Conv_0/bias", "Dense_0/bias"}
    assert all(reason.endswith("not by a matrix product") for reason in reasons.values())


class Tree(nn.Module):
    """A module whose parameter is itself a tree."""

    @nn.compact
    def __call__(self, x):
        first, second = self.param(
            "pair", lambda key: [{"w": jnp.zeros((8, 8))}, jnp.zeros((12, 8))]
        )
        return (
            x
            @ first["w"]
            @ second.T
            @ self.param("more", lambda key: {"w": jnp.zeros((12, 4))})["w"]
        )


def test_parameters_that_are_trees():
    assert planned(Tree(), X) == {
        "pair/0/w": (-2, 1, ()),
        "pair/1": (-1, 1, ()),
        "more/w": (-2, 1, ()),
    }


def test_boxed_parameters():
    dense = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    assert planned(dense, X) == {"kernel": (-2, 1, ())}


@pytest.mark.clock
def test_planning_runs_nothing_on_the_device():
    features, compiled = 2**18, []
    js.flax.plan(nn.Dense(4), {"kernel": "2:4"}, X)  # warms up: creates the random key
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    begin = time.process_time()
    plan = js.flax.plan(nn.Dense(400_000), {"kernel": "2:4"}, spec(1, features))
    took = time.process_time() - begin
    assert plan.sparse["kernel"].shape == (features, 400_000) and "104,857," in str(plan)
    assert compiled == [] and took < 2, took  # 419 GB of weights
    jax.jit(jnp.tan)(0.5)
    assert compiled


def test_planning_twice_gives_an_equal_plan_and_leaves_no_trace_in_the_model():
    model = nn.Dense(12)
    plan = js.flax.plan(model, {"kernel": "2:4"}, X)
    assert plan == js.flax.plan(model, {"kernel": "2:4"}, jnp.zeros((2, 8)))
    assert hash(plan) == hash(js.flax.plan(nn.Dense(12), {"kernel": js.NM(2, 4, axis=0)}, X))
    params = model.init(jax.random.key(0), jnp.zeros((2, 8)))
    for tree in (params, params["params"]):
        assert js.magnitude_masks(tree, plan)["params" if tree is params else "kernel"] is not None
