"""The example that prunes a language model, at a small size, and the reader of its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGUFWriter

from jaxsparse.examples import smollm, smollm_model

pytestmark = [pytest.mark.slow, pytest.mark.promotes("the example is written as users write")]

WIDTH, HEADS, KV_HEADS, HIDDEN, DEPTH = 32, 4, 2, 64, 2
TOKENS = ["<pad>", *"abcd", "Ġ", "ab", "Ġa"]


def test_the_example_prunes_runs_compressed_and_writes(tmp_path, capsys):
    options = ["--plot", str(tmp_path / "smollm.png"), "--save", str(tmp_path / "model")]
    header, rows = smollm.main(["--tiny", *options])
    names, perplexities, kept, megabytes, seconds = zip(*rows, strict=True)
    assert names == ("dense", "magnitude", "wanda", "sparsegpt", smollm.REORDERED, *smollm.INT8)
    assert all(1 < value < 1000 for value in perplexities)
    np.testing.assert_allclose(perplexities[5:], perplexities[4], rtol=0.01)
    assert len(set(perplexities)) == len(perplexities)
    assert kept[0] == 1 > kept[1] > max(kept[2:4])  # nothing keeps more in the given order
    assert 1 > kept[4] > kept[3]
    assert kept[4] == kept[5] == kept[6]
    assert megabytes[0] > megabytes[1] == megabytes[2] == megabytes[3] == megabytes[4]
    sparse = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # weights of two blocks
    scales = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
    dense = megabytes[0] * 1e6 - 2 * sparse
    np.testing.assert_allclose(np.array(megabytes[5:]) * 1e6, dense + 0.625 * sparse + 4 * scales)
    assert seconds[0] is seconds[5] is seconds[6] is None and min(seconds[1:5]) > 0
    assert len(header) == len(rows[0])
    assert (tmp_path / "smollm.png").read_bytes().startswith(b"\x89PNG")
    saved = safetensors.numpy.load_file(tmp_path / "model")
    down = saved["model.layers.1.mlp.down_proj.weight"]
    assert down.shape == (32, 64) and down.dtype.name == "bfloat16"
    assert ((down.reshape(32, 16, 4) != 0).sum(-1) == 2).all()
    assert "From compressed weights it writes:\n\nThe for statement" in capsys.readouterr().out


def tensors():
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(DEPTH):
        narrow = KV_HEADS * WIDTH // HEADS
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (WIDTH,),
                "attn_q": (WIDTH, WIDTH),
                "attn_k": (narrow, WIDTH),
                "attn_v": (narrow, WIDTH),
                "attn_output": (WIDTH, WIDTH),
                "ffn_norm": (WIDTH,),
                "ffn_gate": (HIDDEN, WIDTH),
                "ffn_up": (HIDDEN, WIDTH),
                "ffn_down": (WIDTH, HIDDEN),
            }.items()
        }
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write(path, weights):
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "Ġ a"])
    for name, array in weights.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(half):
    return [(2 * i, 2 * i + 1) for i in range(half)]


def halves(half):
    return [(i, i + half) for i in range(half)]


def llama(weights, tokens, pairs):
    """A Llama in NumPy, token by token and head by head, that rotates these pairs of a head."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean() + 1e-5) * weights[name]

    def turned(x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i, (first, second) in enumerate(pairs(half)):
            angle = position * 100.0 ** (-i / half)
            a, b = x[first], x[second]
            out[first] = a * np.cos(angle) - b * np.sin(angle)
            out[second] = a * np.sin(angle) + b * np.cos(angle)
        return out

    dim, states = WIDTH // HEADS, [weights["token_embd"][token] for token in tokens]
    for layer in range(DEPTH):
        w = {name.removeprefix(f"blk.{layer}."): array for name, array in weights.items()}
        keys, values, after = [], [], []
        for position, x in enumerate(states):
            h = norm(x, f"blk.{layer}.attn_norm")
            q, k, v = (w[name] @ h for name in ("attn_q", "attn_k", "attn_v"))
            keys.append([turned(one, position) for one in k.reshape(KV_HEADS, dim)])
            values.append(v.reshape(KV_HEADS, dim))
            mixed = []
            for head, query in enumerate(q.reshape(HEADS, dim)):
                shared = head // (HEADS // KV_HEADS)
                query = turned(query, position)
                scores = np.array([key[shared] @ query for key in keys]) / np.sqrt(dim)
                parts = np.exp(scores - scores.max())
                mixed.append(parts @ np.array([v[shared] for v in values]) / parts.sum())
            x = x + w["attn_output"] @ np.concatenate(mixed)
            h = norm(x, f"blk.{layer}.ffn_norm")
            gate = w["ffn_gate"] @ h
            after.append(x + w["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (w["ffn_up"] @ h)))
        states = after
    return np.array([weights["token_embd"] @ norm(x, "output_norm") for x in states])


def test_a_file_is_read_as_what_it_says(tmp_path):
    weights = tensors()
    write(tmp_path / "model.gguf", weights)
    model, params, tokenizer = smollm_model.load(tmp_path / "model.gguf")
    tokens = tokenizer.encode("ab acd").ids
    assert [TOKENS[token] for token in tokens] == ["ab", "Ġa", "c", "d"]
    assert tokenizer.decode(tokens) == "ab acd"
    logits = jax.jit(model.apply)(params, jnp.array([tokens]))[0]
    assert np.abs(logits - llama(weights, tokens, halves)).max() > 0.1
    np.testing.assert_allclose(logits, llama(weights, tokens, neighbours), rtol=1e-3, atol=1e-3)


def test_the_names_and_rows_of_transformers(tmp_path):
    weights = tensors()
    write(tmp_path / "model.gguf", weights)
    model, params, _ = smollm_model.load(tmp_path / "model.gguf")
    arrays = smollm_model.hugging_face(params, model.sizes)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {
        f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}"
        for i in range(DEPTH)
        for theirs, ours in parts.items()
    }
    names |= {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    assert arrays.keys() == names.keys()
    renamed = {names[name]: np.asarray(array) for name, array in arrays.items()}
    assert {name: array.shape for name, array in renamed.items()} == {
        name: array.shape for name, array in weights.items()
    }
    tokens = [3, 1, 4, 1, 5]
    logits = jax.jit(model.apply)(params, jnp.array([tokens]))[0]
    np.testing.assert_allclose(logits, llama(renamed, tokens, halves), rtol=1e-3, atol=1e-3)
