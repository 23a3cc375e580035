"""Channels of traced programs reordered together, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from zoo import MODELS
from zoo.vision import ResNet

import jaxsparse as js
from jaxsparse._pruning import permute as permuting
from jaxsparse._pruning.channels import channels

ARGUMENT = "an argument of the function has them"
OUTPUT = "they reach an output of the function"


def normal(*shape, seed=0, scale=0.5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def like(shapes):
    """Random numbers of the given shapes; all are positive, as variances must be."""
    leaves, structure = jax.tree.flatten(shapes)
    random = [jnp.abs(normal(*leaf.shape, seed=i)) + 0.1 for i, leaf in enumerate(leaves)]
    signs = [jnp.sign(normal(*leaf.shape, seed=i)) for i, leaf in enumerate(leaves)]
    kernels = [a * s if a.ndim > 1 else a for a, s in zip(random, signs, strict=True)]
    return jax.tree.unflatten(structure, kernels)


def by_path(tree):
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return {path.removeprefix("params/"): leaf for path, leaf in named.items()}


def kept(leaf, axis, size, n, m):
    """The magnitude that n:m keeps of rows of a size, and how much unstructured sparsity keeps."""
    rows = np.abs(np.moveaxis(leaf, axis, -1)).reshape(-1, size).astype(float)
    groups = np.sort(rows.reshape(len(rows), -1, m), -1)
    top = np.sort(rows, -1)[:, rows.shape[1] - rows.shape[1] // m * n :]
    return np.array([groups[..., m - n :].sum(), top.sum()])


def reordered(leaf, place, order):
    """A leaf with its channels in another order, one set of channels after the other."""
    leaf, whole = leaf.reshape(place.shape), leaf.shape
    out = leaf.copy()
    for index in np.ndindex(order.shape[:-1]):
        at = [slice(None)] * leaf.ndim
        for axis, i in zip(place.stack, index, strict=True):
            at[axis] = i
        left = place.axis - sum(axis < place.axis for axis in place.stack)
        out[tuple(at)] = leaf[tuple(at)].take(order[index], left)
    return out.reshape(whole)


def check(fn, params, plan, *args, rtol=1e-4, **options):
    """Permutes a model and compares all of the result with NumPy."""
    options = {"rounds": 20, **options}
    result = js.permute(fn, params, plan, *args, **options)
    old, new = by_path(params), by_path(result.params)
    expected = dict(old)
    for group in result.groups:
        assert (group.order is None) == bool(group.reason)
        assert set(group.weights) <= {place.path for place in group.axes}
        if group.order is None:
            assert np.isnan([group.kept, group.before, group.unstructured]).all()
            continue
        assert group.order.shape[-1] == group.size
        for index in np.ndindex(group.order.shape[:-1]):
            assert sorted(group.order[index]) == list(range(group.size))
        for place in group.axes:
            expected[place.path] = reordered(expected[place.path], place, group.order)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(new[path], leaf, err_msg=path)
    for group in result.groups:
        if group.order is not None:
            sums = [
                sum(kept(leaves[path], *pattern(plan, path, group.size)) for path in group.weights)
                for leaves in (old, new)
            ]
            assert (group.before, group.kept) == pytest.approx([one[0] for one in sums], rel=1e-5)
            assert group.unstructured == pytest.approx(sums[0][1], rel=1e-5)
            assert group.before < group.kept < group.unstructured
    ends = [jax.tree.leaves(fn(one, *args)) for one in (params, result.params)]
    for one, other in zip(*ends, strict=True):
        scale = np.abs(np.asarray(one, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=rtol * scale, rtol=0
        )
    return result


def pattern(plan, path, size):
    one = plan.sparse[path].pattern
    return one.axis, size, one.n, one.m


def table(result):
    """For the weights of each group: the axes in the group and the stack, or the reason."""
    return {
        group.weights: group.reason
        or ({(place.path, place.axis) for place in group.axes}, group.order.shape[:-1])
        for group in result.groups
    }


def test_an_mlp_with_biases_and_a_norm():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.gelu(nn.Dense(32)(x)))
            return nn.Dense(8)(x)

    module, x = Mlp(), normal(4, 16)
    params = like(jax.eval_shape(module.init, jax.random.key(0), x))
    plan = js.plan(params, {"*/kernel": js.anywhere("2:4")}, module.apply, x)
    result = check(module.apply, params, plan, x)
    assert table(result) == {
        ("Dense_0/kernel",): ARGUMENT,
        ("Dense_1/kernel",): (
            {
                ("Dense_0/bias", 0),
                ("Dense_0/kernel", 1),
                ("Dense_1/kernel", 0),
                ("LayerNorm_0/bias", 0),
                ("LayerNorm_0/scale", 0),
            },
            (),
        ),
    }


def gated(params, x):
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def gated_params(*stack, d=16, f=32):
    return {
        "gate": normal(*stack, d, f, seed=1),
        "up": normal(*stack, d, f, seed=2),
        "down": normal(*stack, f, d, seed=3),
    }


def test_a_gated_mlp():
    params, x = gated_params(), normal(4, 16)
    result = check(gated, params, js.plan(params, {"*": "1:4"}, gated, x), x)
    assert table(result) == {
        ("down",): ({("down", 0), ("gate", 1), ("up", 1)}, ()),
        ("gate", "up"): ARGUMENT,
    }
    text = str(result)
    group = result.groups[0]
    assert f"{group.before / group.unstructured:.4f}" in text
    assert f"{group.kept / group.unstructured:.4f}" in text
    assert "gate axis 1" in text and ARGUMENT in text and "1 of 2 groups of channels" in text


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_gated_mlp_has_one_order_for_each_layer(remat):
    def fn(params, x):
        def layer(x, w):
            return x + gated(w, x), None

        x = x @ params["embed"]
        return lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])[0].sum(-1)

    params = {"embed": normal(12, 16), "layers": gated_params(3)}
    x = normal(4, 12)
    plan = js.plan(params, {"layers/*": js.anywhere("2:4")}, fn, x)
    result = check(fn, params, plan, x)
    stream = {("embed", 1), ("layers/down", 2), ("layers/gate", 1), ("layers/up", 1)}
    assert table(result) == {
        ("layers/down",): ({("layers/down", 1), ("layers/gate", 2), ("layers/up", 2)}, (3,)),
        ("layers/gate", "layers/up"): (stream, ()),
    }
    orders = result.groups[0].order
    assert not np.array_equal(orders[0], orders[1])


def test_weights_that_a_scan_shares_have_one_order():
    def fn(params, x):
        def step(x, up):
            return jnp.tanh(jax.nn.relu(x @ up) @ params["down"]), None

        return lax.scan(step, x, params["up"])[0]

    params = {"up": normal(3, 16, 32), "down": normal(32, 16, seed=1)}
    result = check(fn, params, js.plan(params, {"down": js.NM(2, 4, 0)}), normal(4, 16))
    assert table(result) == {("down",): ({("down", 0), ("up", 2)}, ())}


def test_batched_experts_have_separate_orders_unless_they_are_mixed():
    def experts(params, x):
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
        return jnp.einsum("etf,efd->td", h, params["down"])

    def mixed(params, x):
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, params["up"])).max(0)
        return jnp.einsum("tf,efd->td", h, params["down"])

    params, x = {"up": normal(3, 16, 32), "down": normal(3, 32, 16, seed=1)}, normal(4, 16)
    plan = js.plan(params, {"down": js.NM(2, 4, axis=1)})
    places = {("down", 1), ("up", 2)}
    assert table(check(experts, params, plan, x)) == {("down",): (places, (3,))}
    assert table(check(mixed, params, plan, x)) == {("down",): (places, ())}


def transformer(p, tokens):
    def norm(x, scale):
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale

    def layer(x, w):
        h = norm(x, w["norm"])
        q, k, v = (jnp.einsum("td,dhk->htk", h, w[name]) for name in "qkv")
        scores = jnp.einsum("htk,hsk->hts", q, k)
        mask = jnp.tril(jnp.ones(scores.shape[1:], bool))
        scores = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        x = x + jnp.einsum("hts,hsk,hkd->td", scores, v, w["o"])
        return x + gated(w["mlp"], h), None

    x = lax.scan(layer, p["embed"][tokens], p["layers"])[0]
    return norm(x, p["norm"]) @ p["embed"].T


@pytest.mark.promotes("einsum and the model promote ranks")
def test_a_transformer_with_heads_and_tied_embeddings():
    params = {
        "embed": normal(24, 16),
        "norm": normal(16, seed=4),
        "layers": {
            "norm": normal(2, 16, seed=5),
            **{name: normal(2, 16, 3, 8, seed=i) for i, name in enumerate("qkv", 6)},
            "o": normal(2, 3, 8, 16, seed=9),
            "mlp": gated_params(2),
        },
    }
    tokens = jnp.arange(7)
    plan = js.plan(params, {"layers/*": js.anywhere("2:4")}, transformer, tokens)
    result = check(transformer, params, plan, tokens)
    stream = {("embed", 1), ("norm", 0), ("layers/norm", 1), ("layers/o", 3)}
    stream |= {(f"layers/{name}", 1) for name in ("q", "k", "v", "mlp/gate", "mlp/up")}
    readers = ("layers/k", "layers/mlp/gate", "layers/mlp/up", "layers/q", "layers/v")
    assert table(result) == {
        ("layers/mlp/down",): (
            {("layers/mlp/down", 1), ("layers/mlp/gate", 2), ("layers/mlp/up", 2)},
            (2,),
        ),
        readers: (stream | {("layers/mlp/down", 2)}, ()),
        ("layers/o",): ({("layers/o", 2), ("layers/v", 3)}, (2, 3)),
    }


def test_a_resnet_with_batch_norm():
    module, images = ResNet(), normal(2, 8, 8, 3)
    params = like(jax.eval_shape(module.init, jax.random.key(0), images))
    plan = js.plan(params, {"params/*/kernel": js.anywhere("2:4")}, module.apply, images)
    result = check(module.apply, params, plan, images)
    found = table(result)
    stream = {
        *[("conv_init/kernel", 3), ("Bottleneck_0/conv_proj/kernel", 3)],
    }
    inner, batch = "Bottleneck_1/Conv_1/kernel", "batch_stats/Bottleneck_1/BatchNorm_0"
    assert found[(inner,)] == (
        {
            ("Bottleneck_1/Conv_0/kernel", 3),
            (inner, 2),
            ("Bottleneck_1/BatchNorm_0/scale", 0),
            ("Bottleneck_1/BatchNorm_0/bias", 0),
            (f"{batch}/mean", 0),
            (f"{batch}/var", 0),
        },
        (),
    )
    residual, stack = found[("Bottleneck_1/Conv_0/kernel", "head/kernel")]
    assert stack == () and len(residual) == 17
    stream = {("Bottleneck_0/conv_proj/kernel", 3), ("Bottleneck_0/Conv_2/kernel", 3)}
    assert residual > stream | {("Bottleneck_1/Conv_2/kernel", 3), ("head/kernel", 0)}
    assert not any(group.reason for group in result.groups)


def test_a_depthwise_convolution_between_two_others():
    def fn(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, params["a"], (1, 1), "SAME", dimension_numbers=dims)
        x = lax.conv_general_dilated(
            x, params["b"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=16
        )
        x = nn.max_pool(x, (2, 2), (2, 2))
        return lax.conv_general_dilated(x, params["c"], (1, 1), "SAME", dimension_numbers=dims)

    params = {"a": normal(3, 3, 4, 16), "b": normal(3, 3, 1, 16), "c": normal(1, 1, 16, 8)}
    x = normal(2, 6, 6, 4)
    result = check(fn, params, js.plan(params, {"c": "2:4"}, fn, x), x)
    assert table(result) == {("c",): ({("a", 3), ("b", 3), ("c", 2)}, ())}
    grouped = {"a": normal(3, 3, 4, 16), "b": normal(3, 3, 2, 16), "c": normal(1, 1, 16, 8)}

    def in_groups(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, params["a"], (1, 1), "SAME", dimension_numbers=dims)
        return lax.conv_general_dilated(
            x, params["b"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=8
        ).sum((1, 2)) @ params["c"].reshape(16, 8)

    plan = js.plan(grouped, {"c": js.NM(2, 4, axis=2)})
    (group,) = js.permute(in_groups, grouped, plan, x).groups
    assert group.reason == "conv_general_dilated, which is not followed, uses or makes them"


def test_a_model_of_nnx():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(16, 32, rngs=rngs)
            self.norm = nnx.RMSNorm(32, rngs=rngs)
            self.down = nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(self.norm(jax.nn.relu(self.up(x))))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    x = normal(4, 16)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    plan = js.plan(state, {"down/kernel": "2:4"}, fn, x)
    result = js.permute(fn, state, plan, x)
    (group,) = result.groups
    assert {(place.path, place.axis) for place in group.axes} == {
        *[("down/kernel", 0), ("norm/scale", 0), ("up/bias", 0), ("up/kernel", 1)]
    }
    assert group.kept > group.before
    np.testing.assert_allclose(fn(result.params, x), fn(state, x), rtol=1e-4, atol=1e-5)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))


# what happens to the channels between two weights
FOLLOWED = {
    "a function with a custom gradient": doubled,
    "softmax": jax.nn.softmax,
    "a sum of two": lambda h: h + jnp.flip(h, 0),
    "a branch": lambda h: lax.cond(h.sum() > 0, jnp.tanh, lambda h: jnp.zeros_like(h), h),
    "a while loop": lambda h: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), h),
    "a loop that starts from zeros": lambda h: lax.fori_loop(
        0, 3, lambda _, total: total + h, jnp.zeros_like(h)
    ),
    "a scan over rows": lambda h: lax.scan(lambda c, x: (c + x, c * x), jnp.zeros(32), h)[1],
    "rows looked up": lambda h: h[jnp.array([1, 0, 2, 2])],
    "rows sorted": lambda h: jnp.sort(h, 0),
    "rows written by index": lambda h: h.at[jnp.array([1, 0])].set(h[2:]),
    "rows added by index": lambda h: jnp.zeros((3, 32)).at[jnp.array([1, 0, 1, 2])].add(h),
    "rows of a cache": lambda h: lax.dynamic_update_slice(jnp.ones((8, 32)), h, (2, 0)),
    "the largest rows": lambda h: lax.top_k(h.T, 2)[0].T,
    "rows joined": lambda h: jnp.concatenate([h, h]),
    "a new axis": lambda h: h[:, None].reshape(4, 32),
    "heads of width one": lambda h: h.reshape(4, 32, 1)[..., 0],
    "rows split": lambda h: h.reshape(2, 2, 32).sum(0),
    "transposed": lambda h: (h.T * 2.0).T,
    "a norm of all": lambda h: h / jnp.linalg.norm(h),
    "rounded": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
    "vmap": jax.vmap(jnp.tanh),
    "the largest": lambda h: h - h.max(-1, keepdims=True),
}
LEFT = {
    "cumsum": (lambda h: jnp.cumsum(h, -1), "cumsum depends on their order"),
    "sort": (lambda h: jnp.sort(h, -1), "sort depends on their order"),
    "flip": (lambda h: jnp.flip(h, -1), "rev depends on their order"),
    "rotary halves": (
        lambda h: jnp.concatenate([-h[:, 16:], h[:, :16]], -1),
        "concatenate joins them to others",
    ),
    "a gate that is split off": (
        lambda h: jnp.tile(h[:, 16:] * h[:, :16], (1, 2)),
        "tile takes a part of them or adds some",
    ),
    "concatenation": (
        lambda h: jnp.concatenate([h[:, :8], jnp.tanh(h[:, 8:])], -1),
        "concatenate joins them to others",
    ),
    "padding": (
        lambda h: jnp.pad(h[:, 1:], ((0, 0), (1, 0))),
        "pad takes a part of them or adds some",
    ),
    "a part": (lambda h: h + h[:, 1:2], "slice takes a part of them or adds some"),
    "a part at a position": (
        lambda h: h + lax.dynamic_slice(h, (0, (h.sum() > 0).astype(int)), (4, 1)),
        "dynamic_slice takes a part of them or adds some",
    ),
    "unstacked": (lambda h: h + jnp.unstack(h, axis=1)[3][:, None], "unstack takes them apart"),
    "parts that are too short": (
        lambda h: (h.reshape(4, 16, 2) / h.reshape(4, 16, 2).max(-1, keepdims=True)).reshape(4, 32),
        "groups of 4 span parts of 2 that a reshape splits off",
    ),
    "rows that are merged with them": (
        lambda h: jnp.flip(h.reshape(128)).reshape(4, 32),
        "rev depends on their order",
    ),
    "looked up": (
        lambda h: h + h[:, jnp.array([3])],
        "gather looks them up by index",
    ),
    "written by index": (
        lambda h: h.at[:, jnp.array([3, 1])].set(0.0),
        "scatter writes to them by index",
    ),
    "added by index": (
        lambda h: h.at[:, jnp.array([3, 1])].add(1.0),
        "scatter writes to them by index",
    ),
    "a cache": (
        lambda h: lax.dynamic_update_slice(h, jnp.zeros((4, 8)), (0, 8)),
        "dynamic_update_slice overwrites a part of them",
    ),
    "the largest few": (
        lambda h: jnp.tile(lax.top_k(h, 8)[0], (1, 4)) + h,
        "top_k depends on their order",
    ),
    "the largest": (
        lambda h: h + jax.nn.one_hot(h.argmax(-1), 32),
        "argmax returns their places",
    ),
    "positions": (lambda h: h * jnp.arange(32.0), "iota counts them"),
    "a constant": (
        lambda h: h * np.linspace(0, 1, 32, dtype=np.float32),
        "a constant array of the program has them",
    ),
    "noise": (
        lambda h: h * jax.random.uniform(jax.random.key(0), (4, 32)),
        "which is not followed, uses or makes them",
    ),
    "fft": (lambda h: jnp.fft.fft(h).real + h, "fft, which is not followed, uses or makes them"),
    "pooling": (
        lambda h: nn.max_pool(h[..., None], (3,), (1,), "SAME")[..., 0],
        "reduce_window_max slides along them",
    ),
    "a scan over them": (
        lambda h: lax.scan(lambda c, x: (c + x, c), jnp.zeros(4), h.T)[1].T,
        "a scan loops over them",
    ),
    "one row of all their products": (
        lambda h: h + (h.T @ h)[0],
        "slice takes a part of them or adds some",
    ),
}


@pytest.mark.promotes("the programs promote ranks and dtypes")
@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_that_are_followed(name):
    def fn(params, x):
        return FOLLOWED[name](x @ params["a"] + params["b"]) @ params["c"]

    params = {"a": normal(16, 32), "b": normal(32, seed=1), "c": normal(32, 8, seed=2)}
    plan = js.plan(params, {"c": js.NM(2, 4, axis=0)})
    rtol = 0.05 if name == "rounded" else 1e-4
    result = check(fn, params, plan, normal(4, 16, seed=3), rtol=rtol)
    assert table(result) == {("c",): ({("a", 1), ("b", 0), ("c", 0)}, ())}


@pytest.mark.promotes("the programs promote ranks and dtypes")
@pytest.mark.parametrize("name", LEFT)
def test_channels_that_are_left_alone(name):
    between, reason = LEFT[name]

    def fn(params, x):
        return between(x @ params["a"] + params["b"]) @ params["c"]

    params = {"a": normal(16, 32), "b": normal(32, seed=1), "c": normal(32, 8, seed=2)}
    plan = js.plan(params, {"c": js.NM(2, 4, axis=0)})
    result = js.permute(fn, params, plan, normal(4, 16, seed=3))
    (group,) = result.groups
    assert reason in group.reason and group.order is None
    assert all(map(np.array_equal, jax.tree.leaves(result.params), jax.tree.leaves(params)))
    assert group.reason in " ".join(str(result).split())


def test_channels_that_are_split_into_heads_and_groups():
    def norm(h, groups):
        split = h.reshape(4, groups, -1)
        return (split / jnp.linalg.norm(split, axis=-1, keepdims=True)).reshape(4, -1)

    def fn(groups, params, x):
        h = x @ params["a"] + params["b"][None]
        for one in groups:
            h = norm(h, one)
        return h @ params["c"]

    params = {"a": normal(16, 48), "b": normal(48, seed=1), "c": normal(48, 8, seed=2)}
    plan, x = js.plan(params, {"c": js.NM(2, 4, axis=0)}), normal(4, 16, seed=3)
    for groups, parts in (([6], (6, 8)), ([2, 6], (2, 3, 8)), ([6, 2], (2, 3, 8))):
        (group,) = check(functools.partial(fn, groups), params, plan, x).groups
        n = len(parts) - 1
        assert group.axes == (
            ("a", (16, *parts), n + 1, tuple(range(1, n + 1))),
            ("b", parts, n, tuple(range(n))),
            ("c", (*parts, 8), n, tuple(range(n))),
        )

    def misfit(params, x):
        h = x @ params["a"]
        return norm(norm(h, 3), 2) @ params["c"] + h @ params["b"][:, None]

    plan = js.plan(params, {"b": js.NM(2, 4, axis=0), "c": js.NM(2, 4, axis=0)})
    reason = "reshapes split them in ways that do not fit"
    assert table(js.permute(misfit, params, plan, x)) == {("b",): reason, ("c",): reason}


def test_channels_that_are_split_before_they_meet():
    def norm(h):
        split = h.reshape(4, 8, 4)
        return (split / jnp.linalg.norm(split, axis=-1, keepdims=True)).reshape(4, 32)

    def both(params, x):
        return (norm(x @ params["a"]) + norm(x @ params["b"])) @ params["c"]

    def repeated(params, x):
        a = jnp.repeat((x @ params["a"])[:, :, None], 4, axis=2).reshape(4, 32)
        return jnp.tanh(a + x @ params["b"]) @ params["c"]

    params = {"a": normal(16, 32), "b": normal(16, 32, seed=1), "c": normal(32, 8, seed=2)}
    plan, x = js.plan(params, {"c": js.NM(1, 2, axis=0)}), normal(4, 16)
    places = {"a": ((16, 8, 4), 2, (1,)), "b": ((16, 8, 4), 2, (1,)), "c": ((8, 4, 8), 1, (0,))}
    (group,) = check(both, params, plan, x).groups
    assert {path: place for path, *place in map(tuple, group.axes)} == {
        path: list(place) for path, place in places.items()
    }
    (group,) = check(repeated, {**params, "a": normal(16, 8)}, plan, x).groups
    assert {path: place for path, *place in map(tuple, group.axes)} == {
        path: list(places[path]) for path in "bc"
    }


def test_channels_inside_of_heads_that_are_reordered_have_one_order():
    def fn(params, x):
        h = jnp.tanh(jnp.einsum("td,dhk->thk", x, params["v"]))
        return jnp.einsum("thk,hkd->td", h, params["o"]), h.sum(-1) @ params["g"]

    params = {"g": normal(8, 12), "o": normal(8, 16, 12, seed=1), "v": normal(12, 8, 16, seed=2)}
    plan = js.plan(params, {"g": js.NM(2, 4, axis=0), "o": js.NM(2, 4, axis=1)})
    assert table(check(fn, params, plan, normal(4, 12))) == {
        ("g",): ({("g", 0), ("o", 0), ("v", 1)}, ()),
        ("o",): ({("o", 1), ("v", 2)}, ()),
    }


def test_heads_that_are_swapped_with_their_channels_are_left_alone():
    def fn(params, x):
        h = x @ params["a"]
        swapped = jnp.tanh(h.reshape(4, 4, 8).transpose(0, 2, 1)).reshape(4, 32)
        return h @ params["b"] + swapped @ params["c"], swapped @ params["d"]

    params = {"a": normal(16, 32), **{name: normal(32, 8, seed=i) for i, name in enumerate("bcd")}}
    plan = js.plan(params, {name: js.NM(2, 4, axis=0) for name in "bcd"})
    assert table(js.permute(fn, params, plan, normal(4, 16))) == {
        ("b",): "they are parts of the axis of c, around its groups",
        ("c", "d"): "they are parts of the axis of b, around its groups",
    }


def test_heads_of_flat_kernels_with_grouped_queries_and_rotary_positions():
    def rotated(x):
        turned = jnp.concatenate([-x[..., 4:], x[..., :4]], -1)
        angle = jnp.arange(5.0)[:, None, None]
        return x * jnp.cos(angle) + turned * jnp.sin(angle)

    def fn(params, x):
        def layer(x, w):
            q = rotated((x @ w["q"]).reshape(5, 6, 8)).reshape(5, 3, 2, 8)
            k = rotated((x @ w["k"]).reshape(5, 3, 8))
            v = (x @ w["v"]).reshape(5, 3, 8)
            scores = jax.nn.softmax(jnp.einsum("thgd,shd->hgts", q, k))
            mixed = jnp.einsum("hgts,shd->thgd", scores, v).reshape(5, 48)
            return x + mixed @ w["o"], None

        return lax.scan(layer, x, params)[0]

    shapes = {"q": (2, 16, 48), "k": (2, 16, 24), "v": (2, 16, 24), "o": (2, 48, 16)}
    params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    x = normal(5, 16, seed=9)
    result = check(fn, params, js.plan(params, {"*": js.anywhere("2:4")}, fn, x), x)
    (group,) = (group for group in result.groups if not group.reason)
    assert group.weights == ("o",)
    assert group.axes == (
        ("o", (2, 3, 2, 8, 16), 3, (0, 1)),
        ("v", (2, 16, 3, 8), 3, (0, 2)),
    )
    assert group.order.shape == (2, 3, 8)


def test_products_of_rows_that_are_compared_pair_by_pair_have_one_order():
    def products(params, x):
        rows = [params[name] * x[:, None] for name in "ab"]
        return rows[0] @ rows[1].T

    def sums(params, x):
        rows = [params[name] * x[:, None] for name in "ab"]
        return jnp.einsum("stk,sk->st", jnp.tanh(rows[0][:, None] + rows[1][None]), rows[0])

    params, x = {"a": normal(5, 32), "b": normal(5, 32, seed=1)}, normal(5)
    plan = js.plan(params, {"*": js.NM(2, 4, axis=1)})
    for fn in (products, sums):
        assert table(check(fn, params, plan, x)) == {("a", "b"): ({("a", 1), ("b", 1)}, ())}


def test_channels_of_outputs_constants_and_unused_weights_are_left_alone():
    params = {"a": normal(8, 16), "b": normal(16, 8), "c": normal(8, 8)}
    plan = js.plan(params, {"*": js.NM(2, 4, axis=0)})

    def fn(params, x):
        h = x @ params["a"]
        return h, h @ params["b"]

    assert table(js.permute(fn, params, plan, normal(4, 8))) == {
        ("a",): ARGUMENT,
        ("b",): OUTPUT,
        ("c",): "the function does not use them",
    }


def test_columns_that_meet_equal_values_need_no_producer():
    params, x = {"w": normal(32, 8)}, normal(4)
    plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
    result = check(lambda p, x: jnp.repeat(x[:, None], 32, 1) @ p["w"], params, plan, x)
    assert table(result) == {("w",): ({("w", 0)}, (8,))}  # one order for each output


def test_both_axes_of_a_square_weight_may_run_over_the_same_channels():
    def fn(params, x):
        x = x @ params["in"]
        return (x + jax.nn.relu(x @ params["w"])) @ params["out"]

    params = {"in": normal(8, 32), "w": normal(32, 32, seed=1), "out": normal(32, 8, seed=2)}
    x = normal(4, 8)
    result = check(fn, params, js.plan(params, {"w": "2:4", "out": "2:4"}, fn, x), x)
    places = {("in", 1), ("out", 0), ("w", 0), ("w", 1)}
    assert table(result) == {("out", "w"): (places, ())}


PARAMS = gated_params()
X = normal(4, 16)
PLAN = js.plan(PARAMS, {"down": "2:4"}, gated, X)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"down": "2:4", "also": js.NM(1, 4, axis=0)}, "their weights are planned as 1:4 and 2:4"),
        ({"down": "2:4", "also": js.Block((4, 4), 0.5, axes=(0, 1))}, "also is planned as block"),
        ({"down": "2:4", "also": js.TransposableNM(2, 4, axes=(0, 1))}, "also is planned as"),
        ({"down": "2:4", "also": js.Unstructured(0.5)}, ""),
    ],
)
def test_patterns_that_share_channels(rules, reason):
    def fn(params, x):
        h = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
        return h @ params["down"] + h @ params["also"]

    params = {**PARAMS, "also": normal(32, 16, seed=9)}
    result = js.permute(fn, params, js.plan(params, rules, fn, X), X)
    assert result.groups[-1].reason.startswith(reason)
    assert (result.groups[-1].order is None) == bool(reason)


def test_scores_decide_in_place_of_magnitudes():
    scores = jax.tree.map(lambda leaf: jnp.exp(normal(*leaf.shape, seed=7)), PARAMS)
    result = js.permute(gated, PARAMS, PLAN, X, scores=scores)
    (group,) = result.groups
    best = js.column_order(scores["down"].T, 2, 4)
    np.testing.assert_array_equal(group.order, best.order)
    assert (group.kept, group.before, group.unstructured) == pytest.approx(best[1:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_dtypes_and_kinds_of_arrays_stay(dtype):
    x, params = X, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    if dtype is not np.float64:
        x, params = jax.tree.map(lambda leaf: leaf.astype(dtype), (X, PARAMS))
    result = check(gated, params, PLAN, x, rtol=0.1)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(result.params), strict=True):
        assert old.dtype == new.dtype and type(old) is type(new)


def test_rounds_seconds_and_progress():
    params = gated_params(2)

    def fn(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(gated(w, x)), None), x, params)[0]

    plan = js.plan(params, {"*": js.anywhere("2:4")}, fn, X)
    seen = []
    result = js.permute(fn, params, plan, X, rounds=5, seed=3, progress=seen.append)
    assert seen == ["down", "gate", "up"]
    again = js.permute(fn, params, plan, X, rounds=5, seed=3)
    np.testing.assert_array_equal(again.groups[0].order, result.groups[0].order)
    late = js.permute(fn, params, plan, X, seconds=-1)
    np.testing.assert_array_equal(late.groups[0].order, np.tile(np.arange(32), (2, 1)))
    assert late.groups[0].kept == late.groups[0].before


def test_masks_of_the_result_keep_more():
    before = js.magnitude_masks(PARAMS, PLAN)
    result = js.permute(gated, PARAMS, PLAN, X)
    after = js.magnitude_masks(result.params, PLAN)
    sums = [
        float(jnp.abs(jnp.where(masks["down"], params["down"], 0)).sum())
        for params, masks in ((PARAMS, before), (result.params, after))
    ]
    assert sums == pytest.approx([result.groups[0].before, result.groups[0].kept], rel=1e-5)


@pytest.mark.promotes("the program promotes ranks")
@pytest.mark.parametrize("skipped", ["bias", "gate"])
def test_a_wrong_result_is_never_returned(monkeypatch, skipped):
    def fn(params, x):
        h = jax.nn.silu(x @ params["gate"]) * (x @ params["up"]) + params["bias"]
        return {"h": h.sum(), "y": h @ params["down"]}

    params = {**PARAMS, "bias": 0.1 * normal(32)}
    right = permuting._reordered
    wrong = params[skipped].shape
    monkeypatch.setattr(
        permuting,
        "_reordered",
        lambda leaf, *place: leaf if leaf.shape == wrong else right(leaf, *place),
    )
    plan = js.plan(params, {"down": "2:4"}, fn, X)
    with pytest.raises(RuntimeError, match=r"permute: output [01] of `fn` differs by 0\.\d+ of"):
        js.permute(fn, params, plan, X)


def test_outputs_are_compared_where_they_are_infinite_integers_or_keys():
    old = np.array([1.0, -np.inf, np.inf])
    assert permuting._difference(old, old) == 0
    assert permuting._difference(old, np.array([1.5, -np.inf, np.inf])) == 0.5
    assert permuting._difference(old, np.array([1.0, np.inf, np.inf])) == np.inf
    assert permuting._difference(old, np.array([1.0, 3.0, np.inf])) == np.inf
    assert np.isnan(permuting._difference(old, np.array([np.nan, -np.inf, np.inf])))
    assert permuting._difference(np.zeros(2), np.ones(2)) == np.inf
    assert permuting._difference(np.zeros(2), np.zeros(2)) == 0
    assert permuting._difference(np.array([1, 2]), np.array([1, 2])) == 0
    assert permuting._difference(np.array([1, 2]), np.array([1, 3])) == np.inf

    def fn(params, x):
        y = gated(params, x)
        return y, y > 0, x.argmax(-1), jax.random.key(0), jnp.where(x > 0, y, -jnp.inf)

    assert js.permute(fn, PARAMS, PLAN, X).groups[0].kept


@pytest.mark.slow
@pytest.mark.promotes("models are written as their originals are")
@pytest.mark.parametrize("name", MODELS)
def test_all_channels_that_are_found_take_any_order(name):
    fn, params, args, *_ = MODELS[name].build()
    leaves, structure = jax.tree.flatten(params)
    axes = [(i, axis) for i, leaf in enumerate(leaves) for axis in range(np.ndim(leaf))]
    program = jax.make_jaxpr(fn)(params, *args)
    found, _ = channels(program, [np.shape(leaf) for leaf in leaves], axes)
    random = np.random.default_rng(0)
    changed = list(leaves)
    for one in found:
        if one.reason:
            continue
        first = one.places[0]
        order = np.empty([first.shape[axis] for axis in (*first.stack, first.axis)], int)
        for index in np.ndindex(order.shape[:-1]):
            order[index] = random.permutation(order.shape[-1])
        for place in one.places:
            changed[place.leaf] = reordered(np.asarray(changed[place.leaf]), place, order)
    free = sum(not one.reason for one in found)
    assert free or name == "ResNet"  # the statistics of its norms are arguments
    run = jax.jit(fn)
    before, after = run(params, *args), run(jax.tree.unflatten(structure, changed), *args)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(old, new, rtol=0, atol=2e-5 * float(jnp.abs(old).max()))


BAD = {
    "no function": (TypeError, "permute: `fn` is a dict, not a fu", lambda: call(fn={})),
    "no plan": (TypeError, "permute: `plan` is a str", lambda: call(plan="2:4")),
    "other parameters": (
        ValueError,
        "permute: the plan makes down sparse, but the parameters have no such leaf",
        lambda: call(params={"up": PARAMS["up"]}),
    ),
    "other shapes": (
        ValueError,
        r"permute: down has shape \(32, 8\) in the parameters",
        lambda: call(params={**PARAMS, "down": normal(32, 8)}),
    ),
    "a plan without n:m": (
        ValueError,
        "permute: the plan has no leaf under N:M along one axis",
        lambda: call(plan=js.plan(PARAMS, {"down": js.Unstructured(0.5)})),
    ),
    "a dense plan": (
        ValueError,
        "permute: the plan has no leaf under N:M along one axis",
        lambda: call(plan=js.plan(PARAMS, {"*": None})),
    ),
    "under jit": (
        ValueError,
        "permute: the parameters or the arguments are traced or abstract",
        lambda: jax.jit(lambda params: call(params=params).params)(PARAMS),
    ),
    "shapes alone": (
        ValueError,
        "permute: the parameters or the arguments are traced or abstract",
        lambda: call(params=jax.eval_shape(lambda: PARAMS)),
    ),
    "an abstract argument": (
        ValueError,
        "permute: the parameters or the arguments are traced or abstract",
        lambda: call(jax.ShapeDtypeStruct((4, 16), jnp.float32)),
    ),
    "text as data": (
        TypeError,
        r"permute: argument \[0\] of `fn` is a str, not an array",
        lambda: call("text"),
    ),
    "rounds": (TypeError, "permute: `rounds` must be an integer", lambda: call(rounds=1.5)),
    "seed": (TypeError, "permute: `seed` must be an integer", lambda: call(seed="a")),
    "weights that are not finite": (
        ValueError,
        "permute: down: the weight must be finite",
        lambda: call(params={**PARAMS, "down": PARAMS["down"].at[0, 0].set(jnp.nan)}),
    ),
    "negative scores": (
        ValueError,
        "permute: down: its scores must be finite and not negative",
        lambda: call(scores=PARAMS),
    ),
    "scores of another structure": (
        ValueError,
        "permute: `scores` have the structure",
        lambda: call(scores={"down": jnp.ones((32, 16))}),
    ),
    "scores of another shape": (
        ValueError,
        r"permute: the scores of down have shape \(16, 32\), but the leaf has \(32, 16\)",
        lambda: call(scores={**PARAMS, "down": jnp.ones((16, 32))}),
    ),
    "outputs that are not a number": (
        ValueError,
        "permute: `fn` returns NaN for these arguments",
        lambda: call(X.at[0, 0].set(jnp.nan)),
    ),
}


def call(x=X, fn=gated, params=PARAMS, plan=PLAN, **options):
    return js.permute(fn, params, plan, x, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, run = BAD[name]
    with pytest.raises(error, match=message):
        run()


def test_an_error_of_the_function_names_its_source():
    with pytest.raises(TypeError) as caught:
        call(X[:, :8])
    assert any("permute: this is the error of `fn`" in note for note in caught.value.__notes__)
