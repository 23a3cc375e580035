"""FLOPs and bytes counted from the program, against the paper's table and counts by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax
from jax.experimental import pallas as pl
from planning import spec

import jaxsparse as js

# Progressive Gradient Flow, table 18: GFLOPs of ViT-Base with sparse feed-forward layers
VIT_BASE = {
    None: 34.71,
    "2:4": 23.61,
    "1:4": 18.06,
    "1:8": 15.29,
    "1:16": 13.90,
    "1:32": 13.20,
    "1:128": 12.69,
}
TOKENS = spec(1, 196, 768)


class Layer(nn.Module):
    """One of the twelve layers of ViT-Base."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(12, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(3072, name="ff1")(nn.LayerNorm()(x)))
        return x + nn.Dense(768, name="ff2")(y), None


class Encoder(nn.Module):
    layer: type = Layer

    @nn.compact
    def __call__(self, x):
        return nn.scan(
            self.layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=12
        )(name="blocks")(x, None)[0]


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(12):
            x, _ = Layer()(x)
        return x


def model_costs(model, rules, *args, wrap=lambda fn: fn):
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    return js.analysis.costs(wrap(model.apply), js.flax.plan(model, rules, *args), params, *args)


def function_costs(fn, params, rules, *args):
    return js.analysis.costs(fn, js.plan(params, rules), params, *args)


def flops(cost):
    """Dense FLOPs of each leaf, forward and training, and of the rest."""
    return {leaf.path: (leaf.forward, leaf.both) for leaf in cost.leaves}


@pytest.mark.slow
@pytest.mark.parametrize("pattern, expected", VIT_BASE.items())
def test_vit_base_is_the_table_of_the_paper(pattern, expected):
    cost = model_costs(Encoder(), {"*/ff?/kernel": pattern}, TOKENS)
    assert cost.inference_flops == pytest.approx(expected * 1e9, rel=0.001)
    assert cost.dense.inference_flops == pytest.approx(34.71e9, rel=0.001)
    # table 1; the last two are the scores and the values
    products = {"ff": 22.19e9, "attention": 11.09e9, "": 1.42e9}
    for name, number in products.items():
        assert sum(
            leaf.forward for leaf in cost.leaves if (name in leaf.path if name else not leaf.path)
        ) == pytest.approx(number, rel=0.005)


@pytest.mark.slow
def test_a_stack_costs_what_its_layers_cost_and_remat_computes_again():
    rules = {"*/ff?/kernel": js.anywhere("2:4")}
    scanned, unrolled = (model_costs(model, rules, TOKENS) for model in (Encoder(), Unrolled()))
    for name in ("inference_flops", "training_flops", "inference_bytes", "training_bytes"):
        assert getattr(scanned, name) == getattr(unrolled, name)
    feedforward, attention = 12 * 4 * 196 * 768 * 3072, 12 * 196 * (8 * 768 * 768 + 4 * 196 * 768)
    # at density 1/2 forward and backward, and the dense gradient
    assert scanned.training_flops == 2 * feedforward + 3 * attention
    again = model_costs(Encoder(nn.remat(Layer)), rules, TOKENS)
    assert again.inference_flops == scanned.inference_flops
    assert (
        scanned.training_flops
        < again.training_flops
        <= scanned.training_flops + scanned.inference_flops
    )
    last = 12 * 2 * 196 * 768 * 3072  # the last product of a layer is not needed by its gradient
    assert again.training_flops == scanned.training_flops + scanned.inference_flops - last / 2


def test_an_mlp_by_hand():
    params = {"a": spec(16, 32), "b": spec(32, 8), "bias": spec(8)}
    plan = js.plan(params, {"a": js.NM(1, 4, axis=0), "b": js.NM(2, 4, axis=0)})
    cost = js.analysis.costs(
        lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"] + p["bias"][None],
        plan,
        params,
        spec(5, 16),
    )
    a, b = 2 * 5 * 16 * 32, 2 * 5 * 32 * 8
    assert flops(cost) == {"a": (a, a), "b": (b, 2 * b), "": (0, a + b)}  # x needs no gradient
    assert cost.inference_flops == a / 4 + b / 2
    assert cost.training_flops == a / 4 + 2 * b / 2 + a + b
    assert (cost.dense.inference_flops, cost.dense.training_flops) == (a + b, 2 * a + 3 * b)


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Conv(8, (3, 5), use_bias=False), (2, 10, 12, 4), 2 * (2 * 10 * 12) * (3 * 5 * 4) * 8),
        (
            nn.Conv(8, (3, 3), 2, padding="VALID", use_bias=False),
            (2, 10, 12, 4),
            2 * (2 * 4 * 5) * (3 * 3 * 4) * 8,
        ),
        (
            nn.Conv(8, (4, 4), (4, 2), use_bias=False),
            (2, 9, 12, 4),
            2 * (2 * 3 * 6) * (4 * 4 * 4) * 8,
        ),
        (
            nn.Conv(8, (2, 2), 2, padding="VALID", use_bias=False),
            (2, 10, 12, 4),
            2 * (2 * 5 * 6) * (2 * 2 * 4) * 8,
        ),
        (
            nn.Conv(8, (3,), kernel_dilation=2, padding="VALID", use_bias=False),
            (2, 10, 4),
            2 * (2 * 6) * (3 * 4) * 8,
        ),
        (
            nn.Conv(8, (3,), feature_group_count=2, use_bias=False),
            (2, 10, 4),
            2 * (2 * 10) * (3 * 2) * 8,
        ),
        (nn.Conv(4, (3,), feature_group_count=4, use_bias=False), (2, 10, 4), 2 * (2 * 10) * 3 * 4),
        (
            nn.ConvTranspose(8, (4, 4), (2, 2), use_bias=False),
            (2, 5, 6, 4),
            2 * (2 * 5 * 6) * (4 * 4 * 4) * 8,
        ),
    ],
)
def test_a_convolution_by_hand(layer, shape, expected):
    model = nn.Sequential([nn.Dense(4, use_bias=False), layer])
    cost = flops(model_costs(model, {"*": None}, spec(*shape)))
    dense = cost["layers_0/kernel"][0]
    assert cost["layers_1/kernel"] == (expected, 2 * expected)
    assert cost[""] == (0, dense + expected)


def test_einsum_and_batched_attention_by_hand():
    def fn(p, x):
        q, k, v = jnp.einsum("btd,sdhe->sbthe", x, p["qkv"])
        return jnp.einsum("bthe,hed->btd", jax.nn.dot_product_attention(q, k, v), p["out"])

    cost = function_costs(
        fn,
        {"qkv": spec(3, 8, 2, 4), "out": spec(2, 4, 8)},
        {"qkv": js.NM(2, 4, axis=1)},
        spec(5, 7, 8),
    )
    qkv, out, scores = 2 * (5 * 7) * 8 * 24, 2 * (5 * 7) * 8 * 8, 2 * 5 * 2 * 7 * 7 * 4
    assert flops(cost) == {
        "out": (out, 2 * out),
        "qkv": (qkv, qkv),
        "": (2 * scores, 3 * 2 * scores + qkv + out),
    }


def test_under_vmap_jit_and_custom_derivatives():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    fn = lambda p, x: jax.vmap(lambda x: jax.jit(product)(jnp.sin(x @ p["a"]), p["b"]))(x)  # noqa: E731
    one = 2 * 3 * 5 * 4 * 4
    counts = flops(
        function_costs(fn, {"a": spec(4, 4), "b": spec(4, 4)}, {"*": None}, spec(3, 5, 4))
    )
    assert counts == {"a": (one, one), "b": (one, 2 * one), "": (0, 2 * one)}


def test_a_scan_that_casts_its_weights():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None), x, p["w"])[0]

    one = 6 * 2 * 5 * 4 * 4  # the backward pass reuses the casts
    assert flops(function_costs(fn, {"w": spec(6, 4, 4)}, {}, spec(5, 4, dtype="bfloat16"))) == {
        "w": (one, 2 * one),
        "": (0, one),
    }


def test_a_carry_is_no_weight_though_it_begins_as_one():
    fn = lambda p, x: lax.scan(lambda c, _: (jnp.sin(x @ c), None), p["w"], length=3)[0]  # noqa: E731
    assert flops(function_costs(fn, {"w": spec(4, 4)}, {"w": js.NM(2, 4, axis=0)}, spec(4, 4))) == {
        "w": (0, 0),
        "": (3 * 128, 6 * 128),
    }


def test_the_costlier_branch_counts():
    def fn(p, x):
        return lax.cond(x.sum() > 0, lambda: jnp.sin(x @ p["w"]) @ p["w"], lambda: x @ p["w"])

    one = 2 * 5 * 4 * 4
    assert flops(function_costs(fn, {"w": spec(4, 4)}, {}, spec(5, 4))) == {
        "w": (2 * one, 3 * one),
        "": (0, 2 * one),
    }


def test_a_loop_of_known_length_counts_and_one_of_unknown_length_is_refused():
    def fn(length, p, x):
        return lax.fori_loop(0, length, lambda _, x: x @ p["w"], x)

    cost = function_costs(functools.partial(fn, 3), {"w": spec(4, 4)}, {}, spec(5, 4))
    assert cost.inference_flops == 3 * 2 * 5 * 4 * 4
    with pytest.raises(ValueError, match="costs: the program has matrix products in `while`"):
        js.analysis.costs(
            lambda p, x: fn(x.astype(int)[0, 0], p, x),
            js.plan({"w": spec(4, 4)}, {}),
            {"w": spec(4, 4)},
            spec(5, 4),
        )


def test_a_loop_without_products_costs_nothing():
    def fn(p, x):
        scale = lax.while_loop(lambda s: s < 2, lambda s: s * 1.5, lax.stop_gradient(x.max()))
        return jnp.sort(x * scale) @ p["w"]

    assert flops(function_costs(fn, {"w": spec(4, 4)}, {}, spec(5, 4))) == {
        "w": (160, 160),
        "": (0, 160),
    }


def test_products_that_cannot_be_counted_are_refused():
    def fn(p, x):
        return pl.pallas_call(lambda x, w, o: o.__setitem__(..., x[...] @ w[...]), x)(x, p["w"])

    with pytest.raises(ValueError, match="costs: the program has matrix products in `pallas_call`"):
        function_costs(fn, {"w": spec(4, 4)}, {}, spec(5, 4))


def test_experts_of_ragged_groups_by_hand():
    def fn(p, x):
        return lax.ragged_dot(jnp.sin(x @ p["a"]), p["w"], jnp.array([1, 4]))

    one, each = 2 * 5 * 4 * 4, 2 * 5 * 4 * 6  # every row meets one expert, forward and backward
    counts = flops(function_costs(fn, {"a": spec(4, 4), "w": spec(2, 4, 6)}, {}, spec(5, 4)))
    assert counts == {"a": (one, one), "w": (each, 2 * each), "": (0, one + each)}


def test_kernels_concatenated_before_one_product_share_it():
    def fn(p, x):
        return x @ jnp.concatenate([p["q"], p["k"]], 1)

    cost = function_costs(
        fn, {"q": spec(4, 6), "k": spec(4, 2)}, {"q": js.NM(2, 4, axis=0)}, spec(5, 4)
    )
    assert {leaf.path: leaf.forward for leaf in cost.leaves} == {
        "k": 2 * 5 * 4 * 2,
        "q": 2 * 5 * 4 * 6,
        "": 0,
    }


def test_masked_weights_cost_what_their_plan_says():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
    rules, x = {"*/kernel": js.anywhere("2:4")}, jnp.ones((3, 4))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)

    def intercepted(params, x):
        with js.flax.intercept(masks):
            return model.apply(params, x)

    masked = js.analysis.costs(intercepted, js.flax.plan(model, rules, x), params, x)
    assert masked == model_costs(model, rules, x)

    def decayed(p, x):
        mask = jnp.ones((4, 4), bool)
        return x @ js.effective_weight(p["w"], mask, 0.5 * x[0, 0], gradient="masked")

    assert (
        function_costs(
            decayed, {"w": spec(4, 4)}, {"w": js.NM(1, 4, axis=0)}, spec(5, 4)
        ).inference_flops
        == 160 / 4
    )


def test_a_weight_that_is_used_twice_or_multiplied_by_another():
    params = {"a": spec(4, 4), "b": spec(4, 4), "bias": spec(4)}
    rules = {"a": js.NM(2, 4, axis=0), "b": js.NM(1, 4, axis=0)}
    cost = function_costs(
        lambda p, x: (x @ p["a"] @ p["a"].T) @ (p["a"] @ p["b"]), params, rules, spec(5, 4)
    )
    assert {leaf.path: leaf.inference_flops for leaf in cost.leaves} == {
        "a": 2 * 160 / 2,
        "b": 128 / 4,
        "": 160,
    }


def test_outputs_may_be_integers_and_weights_unused():
    params = {"table": spec(9, 4), "w": spec(4, 4)}
    cost = function_costs(
        lambda p, i: ((y := p["table"][i] @ p["w"]).argmax(), {"y": y}),
        params,
        {"table": js.Unstructured(0.5)},
        spec(5, dtype="int32"),
    )
    assert flops(cost) == {"table": (0, 0), "w": (160, 320), "": (0, 160)}


@pytest.mark.parametrize(
    "dtype, saved", [("float32", 1 - 68 / 128), ("bfloat16", 1 - 36 / 64), ("int8", 1 - 20 / 32)]
)
@pytest.mark.parametrize("pattern", [js.NM(2, 4, axis=-2), js.TransposableNM(2, 4, axes=(-2, -1))])
def test_bytes_of_2_4_are_those_of_sparse24(pattern, dtype, saved):
    params = {"w": jnp.ones((3, 32, 8), dtype), "b": jnp.ones(8, dtype)}
    plan = js.plan(params, {"w": pattern})
    cost = js.analysis.costs(lambda p: p["b"], plan, params)
    packed = js.compress(params, js.magnitude_masks(params, plan), plan)
    assert cost.inference_bytes == packed["w"].nbytes + params["b"].nbytes
    assert cost.leaves[0].inference_bytes == (1 - saved) * params["w"].nbytes
    assert cost.training_bytes == params["w"].nbytes + 3 * 32 * 8 / 8 + params["b"].nbytes
    assert (
        cost.dense.inference_bytes
        == cost.dense.training_bytes
        == params["w"].nbytes + params["b"].nbytes
    )


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (js.NM(1, 16, axis=0), 20 / 8 * 32 * 48 / 16),  # bfloat16: 20 bits for every 16 weights
        (js.NM(1, 4, axis=0), 18 / 8 * 32 * 48 / 4),
        (js.NM(4, 8, axis=0), 4 * 19 / 8 * 32 * 48 / 8),
        (js.NM(3, 6, axis=1), 3 * 19 / 8 * 32 * 48 / 6),
        (js.Unstructured(0.25), 32 * 48 * (0.25 * 2 + 1 / 8)),
        (js.Block((16, 5), 0.5, axes=(0, 1)), 32 * 48 * 2 / 2 + 2 * 10 / 8),
    ],
)
def test_bytes_of_other_patterns(pattern, expected):
    params = {"w": spec(32, 48, dtype="bfloat16")}
    assert function_costs(lambda p: 0.0, params, {"w": pattern}).inference_bytes == expected


def test_parameters_of_another_plan_are_an_error():
    plan = js.plan({"w": spec(4, 4)}, {"w": js.NM(2, 4, axis=0)})
    with pytest.raises(ValueError, match="costs: w has shape"):
        js.analysis.costs(lambda p: p["w"], plan, {"w": spec(8, 4)})
    with pytest.raises(TypeError, match="costs: `plan` is a dict"):
        js.analysis.costs(lambda p: p["w"], {}, {"w": spec(8, 4)})


def test_the_table_shows_every_weight_and_the_sum():
    cost = model_costs(
        nn.Sequential([nn.Dense(64), nn.Dense(8)]), {"layers_0/kernel": "2:4"}, spec(1000, 32)
    )
    expected = """
leaf|pattern|inference GFLOPs|dense|training GFLOPs|dense|weights MB|dense
layers_0/kernel|2:4|0.002048|0.004096|0.002048|0.004096|0.004352|0.008192
layers_1/kernel|dense|0.001024|0.001024|0.002048|0.002048|0.002048|0.002048
the rest|dense|0|0|0.00512|0.00512|0.000288|0.000288
all||0.003072|0.00512|0.009216|0.01126|0.006688|0.01053
"""
    header, rule, *rows = str(cost).splitlines()
    columns = [slice(dashes.start(), dashes.end()) for dashes in re.finditer("-+", rule)]
    lines = ["|".join(line[column].strip() for column in columns) for line in (header, *rows)]
    assert lines == expected.split("\n")[1:-1]
