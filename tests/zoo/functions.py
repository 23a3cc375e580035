"""A transformer as a plain function of nested dictionaries.

Its kernels are changed before a product in all common ways.
"""

import jax
import jax.numpy as jnp
from jax import lax

import jaxsparse as js
from zoo.entry import Along, Built, Model, in_layers, random_like, tokens

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, HIDDEN, RANK = 20, 16, 4, 8, 24, 4


def norm(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["offset"]


def linear(p, x):
    return x @ p["w"] + p["b"]


def attend(q, k, v):
    weights = jnp.einsum("bqnh,bknh->bnqk", q, k) / HEAD_WIDTH**0.5
    weights = jnp.where(jnp.tril(jnp.ones(weights.shape[-2:], bool)), weights, -1e9)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(weights), v)


def separate(p, x, project):
    """Attention with separate products for q, k and v."""
    q, k, v = (
        project(p[name], x).reshape(*x.shape[:2], HEADS, HEAD_WIDTH)
        for name in ("query", "key", "value")
    )
    return project(p["linear"], attend(q, k, v).reshape(*x.shape[:2], -1))


def fused(p, x, project):
    """Attention whose kernels of q, k and v are concatenated before one product."""
    names = ("query", "key", "value")
    joint = {
        part: jnp.concatenate([p[name][part] for name in names], axis=-1) for part in ("w", "b")
    }
    q, k, v = (
        part.reshape(*x.shape[:2], HEADS, HEAD_WIDTH)
        for part in jnp.split(project(joint, x), 3, axis=-1)
    )
    return project(p["linear"], attend(q, k, v).reshape(*x.shape[:2], -1))


def by_einsum(p, x, project):
    """Attention with kernels of three axes."""
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", x, p[name]["w"]) + p[name]["b"]
        for name in ("query", "key", "value")
    )
    return jnp.einsum("btnh,nhd->btd", attend(q, k, v), p["linear"]["w"]) + p["linear"]["b"]


def language_model(project=linear, attention=None):
    """The forward pass of two layers in which `project(p, x)` multiplies by a kernel.

    Without attention, only their MLPs.
    """

    def fn(params, ids):
        x = params["embed"]["embeddings"][ids] + params["places"][: ids.shape[1]]
        for layer in ("layer_0", "layer_1"):
            p = params[layer]
            if attention is not None:
                x = x + attention(p["attn"], norm(p["attn_norm"], x), project)
            x = x + project(p["mlp_out"], jax.nn.gelu(project(p["mlp_in"], norm(p["mlp_norm"], x))))
        return linear(params["head"], norm(params["norm"], x))

    return fn


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def with_bias(inputs, outputs):
    return {"w": shaped(inputs, outputs), "b": shaped(outputs)}


def heads(kernel):
    """The kernels of an attention whose heads are split off after the product."""
    inner = HEADS * HEAD_WIDTH
    return {
        **dict.fromkeys(("query", "key", "value"), kernel(WIDTH, inner)),
        "linear": kernel(inner, WIDTH),
    }


def heads_of_three_axes(_):
    read = {"w": shaped(WIDTH, HEADS, HEAD_WIDTH), "b": shaped(HEADS, HEAD_WIDTH)}
    write = {"w": shaped(HEADS, HEAD_WIDTH, WIDTH), "b": shaped(WIDTH)}
    return {**dict.fromkeys(("query", "key", "value"), read), "linear": write}


def build(project=linear, attention=None, kernel=with_bias, attention_kernels=heads):
    """Builds the model; `kernel(inputs, outputs)` gives the shapes that `project` reads."""
    norms = {"scale": shaped(WIDTH), "offset": shaped(WIDTH)}
    layer = {"mlp_norm": norms, "mlp_in": kernel(WIDTH, HIDDEN), "mlp_out": kernel(HIDDEN, WIDTH)}
    if attention is not None:
        layer |= {"attn_norm": norms, "attn": attention_kernels(kernel)}
    shapes = {
        "embed": {"embeddings": shaped(VOCABULARY, WIDTH)},
        "places": shaped(8, WIDTH),
        "layer_0": layer,
        "layer_1": layer,
        "norm": norms,
        "head": with_bias(WIDTH, VOCABULARY),
    }
    return Built(
        language_model(project, attention), random_like(shapes), (tokens(2, 6, below=VOCABULARY),)
    )


def transposed(p, x):
    return x @ p["w"].T + p["b"]


def output_first(inputs, outputs):
    return {"w": shaped(outputs, inputs), "b": shaped(outputs)}


def merged_lora(p, x):
    return x @ (p["w"] + p["lora_a"] @ p["lora_b"]) + p["b"]


def separate_lora(p, x):
    return x @ p["w"] + (x @ p["lora_a"]) @ p["lora_b"] + p["b"]


def with_lora(inputs, outputs):
    return {
        **with_bias(inputs, outputs),
        "lora_a": shaped(inputs, RANK),
        "lora_b": shaped(RANK, outputs),
    }


def scaled(p, x):
    """A kernel scaled by the width, as in muP."""
    return x @ (p["w"] * 0.5) + p["b"]


def weight_normed(p, x):
    length = jnp.sqrt(jnp.sum(jnp.square(p["w"]), axis=0, keepdims=True))
    return x @ (p["w"] * (p["g"] / length)) + p["b"]


def with_length(inputs, outputs):
    return {**with_bias(inputs, outputs), "g": shaped(outputs)}


def standardised(p, x):
    w = p["w"] - p["w"].mean(axis=0, keepdims=True)
    w = w / jnp.sqrt(jnp.square(w).mean(axis=0, keepdims=True) + 1e-4)
    return x @ w + p["b"]


MLP = ("mlp_in/w", "mlp_out/w")
ATTENTION = ("attn/query/w", "attn/key/w", "attn/value/w", "attn/linear/w")
HEAD = {"head/w": Along(-2)}
WEIGHTS = in_layers("layer_{}", dict.fromkeys(MLP, Along(-2)))

MODELS = {
    "dictionary, einsum": Model(
        lambda: build(attention=by_einsum, attention_kernels=heads_of_three_axes),
        {
            **in_layers(
                "layer_{}",
                {
                    "attn/query/w": Along(-3),
                    "attn/key/w": Along(-3),
                    "attn/value/w": Along(-3),
                    "attn/linear/w": Along(-2, summed=(-3, -2)),
                },
            ),
            **WEIGHTS,
            **HEAD,
        },
        products=2 * 6 + 1,
    ),
    "dictionary, x @ w.T": Model(
        lambda: build(transposed, separate, output_first),
        {**in_layers("layer_{}", dict.fromkeys(ATTENTION + MLP, Along(-1))), **HEAD},
        products=2 * 6 + 1,
    ),
    "dictionary, fused q, k and v": Model(
        lambda: build(attention=fused),
        {**in_layers("layer_{}", dict.fromkeys(ATTENTION, Along(-2))), **WEIGHTS, **HEAD},
        products=2 * 4 + 1,
    ),
    "dictionary, LoRA": Model(
        lambda: build(separate_lora, kernel=with_lora),
        {
            **WEIGHTS,
            **{path.replace("/w", f"/lora_{part}"): Along(-2) for path in WEIGHTS for part in "ab"},
            **HEAD,
        },
        products=2 * 2 * 3 + 1,
    ),
    "dictionary, merged LoRA": Model(
        lambda: build(merged_lora, kernel=with_lora),
        {**dict.fromkeys(WEIGHTS, Along(-2, summed=())), **HEAD},
        products=1,
        decompressed=frozenset(WEIGHTS),
        rules={"layer_*/w": js.NM(2, 4, axis=-2), "head/w": "2:4"},
    ),
    "dictionary, muP": Model(lambda: build(scaled), {**WEIGHTS, **HEAD}, products=2 * 2 + 1),
    # the scaled kernel runs compressed; its norm needs the dense kernel
    "dictionary, weight normalisation": Model(
        lambda: build(weight_normed, kernel=with_length),
        {**WEIGHTS, **HEAD},
        products=2 * 2 + 1,
        decompressed=frozenset(WEIGHTS),
    ),
    "dictionary, weight standardisation": Model(
        lambda: build(standardised),
        {**WEIGHTS, **HEAD},
        products=1,
        decompressed=frozenset(WEIGHTS),
    ),
}
