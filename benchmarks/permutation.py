"""What orders of channels keep: a random matrix, and the MLPs of SmolLM2-135M.

python benchmarks/permutation.py [--gguf FILE] [--rounds N]
"""

import argparse
import pathlib
import time

import numpy as np
import tabulate
import timing
import tqdm

import jaxsparse as js
from jaxsparse.examples import smollm, smollm_model

HEADER = ("weights", "kept before", "after", "share of the gap", "seconds")


def row(name, before, kept, unstructured, seconds):
    """A row of the table; what is kept is in parts of what unstructured sparsity keeps."""
    share = (kept - before) / (unstructured - before)
    return name, before / unstructured, kept / unstructured, share, seconds


def random_matrix(size, rounds):
    scores = np.abs(np.random.default_rng(0).normal(size=(size, size))).astype(np.float32)
    with tqdm.tqdm(total=rounds, desc=f"random {size} x {size}", unit="round") as bar:
        start = time.perf_counter()
        order = js.column_order(scores, 2, 4, rounds=rounds, progress=lambda _: bar.update())
        seconds = time.perf_counter() - start
    name = f"random normal, {size} x {size}"
    return row(name, order.before, order.kept, order.unstructured, seconds)


def language_model(gguf, rounds):
    model, params, tokenizer = smollm_model.load(gguf or smollm_model.fetch())
    tokens = tokenizer.encode(smollm.manual_pages()).ids
    test = smollm.windows(tokens, 0, 12, 512)
    plan = js.flax.plan(model, {"blocks/ffn_down/kernel": "2:4"}, test[:1, :-1])
    start = time.perf_counter()
    result = js.permute(model.apply, params, plan, test[:1, :64], rounds=rounds)
    seconds = time.perf_counter() - start
    print(result)
    (group,) = result.groups
    perplexities = [
        smollm.perplexity(model, js.effective_params(one, js.magnitude_masks(one, plan)), test)
        for one in (params, result.params)
    ]
    name = f"SmolLM2-135M, ffn_down of {group.order.shape[0]} layers"
    return row(name, group.before, group.kept, group.unstructured, seconds), perplexities


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=pathlib.Path, help="the file of the model")
    parser.add_argument("--rounds", type=int, default=100, help="the rounds of each search")
    args = parser.parse_args()
    matrix = random_matrix(4096, args.rounds)
    layers, perplexities = language_model(args.gguf, args.rounds)
    rows = [matrix, layers]
    print(tabulate.tabulate(rows, HEADER, floatfmt=("", ".4f", ".4f", ".3f", ".0f")))
    print(
        "Perplexity with ffn_down pruned by magnitude: {:.2f}, reordered {:.2f}.".format(
            *perplexities
        )
    )
    timing.save(
        "permutation", rounds=args.rounds, header=HEADER, rows=rows, perplexities=perplexities
    )


if __name__ == "__main__":
    main()
