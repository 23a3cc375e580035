"""A trained language model, SmolLM2-135M, pruned 2:4 in one shot by three methods.

    python -m jaxsparse.examples.smollm                  # downloads the model, 93 MB, once
    python -m jaxsparse.examples.smollm --gguf FILE      # any Llama without biases in GGUF
    python -m jaxsparse.examples.smollm --tiny           # a random model of two blocks, at once
    python -m jaxsparse.examples.smollm --save FILE      # the pruned weights, for transformers

All kernels of all blocks are pruned along their input axis. The text is Python's own manual pages;
each block is pruned on what the pruned blocks before it make of the calibration text. The model
that SparseGPT gives after its channels are put into a better order then runs from compressed
weights, in float and rounded to int8, and writes.
"""

import argparse
import functools
import pathlib
import platform
import time
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
import tqdm
from matplotlib.figure import Figure

import jaxsparse as js
from jaxsparse.examples import smollm_model

METHODS = ("magnitude", "wanda", "sparsegpt")
REORDERED = "sparsegpt, channels reordered"
INT8: dict[str, Literal["float", "token"]] = {  # the activations that `quantize` takes after that
    "... and int8 weights": "float",
    "... and int8 weights and activations": "token",
}
REFERENCE = 15.27  # the perplexity of the dense model on Python 3.12's manual pages
PROMPT = "The for statement is used to"


def manual_pages() -> str:
    """Python's own manual pages."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def windows(tokens: Any, first: int, count: int, length: int) -> jax.Array:
    """`count` neighbouring windows of `length` tokens and the one after them."""
    starts = first + length * np.arange(count)[:, None] + np.arange(length + 1)[None]
    return jnp.asarray(np.asarray(tokens)[starts], jnp.int32)


def perplexity(model: Any, params: Any, test: jax.Array) -> float:
    """The perplexity of windows of tokens, int32 `[count, length + 1]`."""
    bar = tqdm.tqdm(test, "test", leave=False)
    return float(np.exp(np.mean([float(_loss(model, params, window[None])) for window in bar])))


@functools.partial(jax.jit, static_argnums=0)
def _loss(model, params, tokens):
    logits = js.sparsify(model.apply)(params, tokens[:, :-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()


def pruned(model: Any, params: Any, plan: js.Plan, calibration: jax.Array, method: Any) -> Any:
    """The pruned model and its masks."""
    kernels = sum(leaf.shape[0] for leaf in plan.sparse.values())
    with tqdm.tqdm(total=kernels, desc=method, unit="kernel", leave=False) as bar:
        result = js.prune(
            model.apply,
            params,
            plan,
            batches=[(window[None, :-1],) for window in calibration],
            method=method,
            progress=lambda path: bar.update(),
        )
    return jax.block_until_ready(result)


def reordered(model: Any, params: Any, plan: js.Plan, tokens: jax.Array) -> Any:
    """The same model with its channels in an order under which 2:4 keeps more."""
    with tqdm.tqdm(total=len(plan.sparse), desc="channels", unit="kernel", leave=False) as bar:
        result = js.permute(
            model.apply, params, plan, tokens, rounds=40, progress=lambda path: bar.update()
        )
    print(result, end="\n\n")
    return result.params


@functools.partial(jax.jit, static_argnums=(0, 3))
def written(model: Any, params: Any, window: jax.Array, length: int) -> jax.Array:
    """Continues tokens, int32 `[n]`, by the likeliest one; those of the last n are less likely."""

    def one(window, _):
        logits = js.sparsify(model.apply)(params, window[None])[0, -1]
        repeated = jnp.zeros(logits.shape).at[window].set(1)
        token = (logits - repeated).argmax().astype(jnp.int32)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(one, window, length=length)[1]


def megabytes(tree: Any) -> float:
    """The megabytes of a tree whose floats take 16 bits, except for the scales of int8."""

    def is_int8(leaf):
        return isinstance(leaf, js.Sparse24) and leaf.scale is not None

    def size(leaf):
        if is_int8(leaf):
            return leaf.nbytes
        wide = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.size * (2 if wide else leaf.dtype.itemsize)

    return sum(map(size, jax.tree.leaves(tree, is_leaf=is_int8))) / 1e6


def plot(rows: list, path: pathlib.Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="perplexity (log)", xscale="log")
    names, values = [row[0] for row in rows], [row[1] for row in rows]
    axes.barh(names, values)
    for i, value in enumerate(values):
        axes.annotate(f" {value:.2f}", (value, i), va="center")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the example; returns the header and the rows of its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=pathlib.Path, help="the file of the model")
    parser.add_argument("--tiny", action="store_true", help="a random model of two blocks")
    parser.add_argument(
        "--plot", type=pathlib.Path, default="smollm.png", help="where the plot goes"
    )
    parser.add_argument(
        "--save",
        type=pathlib.Path,
        help="a safetensors file for the pruned weights, in bfloat16 and under the names of "
        "transformers",
    )
    args = parser.parse_args(argv)

    if args.tiny:
        model, params, tokenizer = smollm_model.tiny()
        count, batches, length, written_length = 2, 2, 32, 8
    else:
        model, params, tokenizer = smollm_model.load(args.gguf or smollm_model.fetch())
        count, batches, length, written_length = 12, 16, 512, 64
    tokens = tokenizer.encode(manual_pages()).ids
    test = windows(tokens, 0, count, length)
    calibration = windows(tokens, 60_000, batches, length)

    plan = js.flax.plan(model, {"blocks/*/kernel": "2:4"}, test[:1, :-1])
    print(plan, end="\n\n")
    dense = perplexity(model, params, test)
    file = (args.gguf or pathlib.Path(smollm_model.GGUF)).name
    known = not args.tiny and file == pathlib.Path(smollm_model.GGUF).name
    known = known and platform.python_version().startswith("3.12.")
    if known and abs(dense - REFERENCE) > 0.1:
        raise SystemExit(f"The dense model has a perplexity of {dense:.2f}, not {REFERENCE}.")
    rows: list[tuple] = [("dense", dense, 1.0, megabytes(params), None)]
    for name in (*METHODS, REORDERED):
        begun, method = time.perf_counter(), name.partition(",")[0]
        if name == REORDERED:
            params = reordered(model, params, plan, test[:1, :-1])
        weights, masks = pruned(model, params, plan, calibration, method)
        seconds = time.perf_counter() - begun
        packed = js.compress(weights, masks, plan, layout="canonical")
        kept = js.analysis.retained_magnitude(params, masks)
        mean = float(np.mean([*kept.values()]))
        rows.append((name, perplexity(model, weights, test), mean, megabytes(packed), seconds))
    for name, activations in INT8.items():
        small = js.quantize(packed, activations=activations)
        rows.append((name, perplexity(model, small, test), mean, megabytes(small), None))
    header = ("2:4 by", "perplexity", "magnitude kept", "weights MB", "seconds")
    print(tabulate.tabulate(rows, header, floatfmt=("", ".2f", ".3f", ".1f", ".0f")))
    plot(rows, args.plot)

    if args.save:
        arrays = smollm_model.hugging_face(weights, model.sizes)
        js.save_safetensors({k: w.astype(jnp.bfloat16) for k, w in arrays.items()}, args.save)
        print(f"\nThe weights that SparseGPT gives, as dense arrays: {args.save}")
    prompt = tokenizer.encode(PROMPT).ids
    start = jnp.asarray([*tokens, *prompt][-max(length // 4, len(prompt)) :], jnp.int32)
    more = written(model, packed, start, written_length)
    print(
        f"\nFrom compressed weights it writes:\n\n{PROMPT}{tokenizer.decode(more.tolist())}\n\n"
        f"Plot: {args.plot}"
    )
    return header, rows


if __name__ == "__main__":
    main()
