"""Times a sparse training step with a new mask at every step against a dense one, and its memory.

python benchmarks/train_step.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import timing

timing.with_warm_heap()

import jaxsparse as js  # noqa: E402
from jaxsparse.examples.char_lm import BATCH, CONTEXT, Transformer, trainer  # noqa: E402

PATTERNS = ("2:4", "1:16")


def runner(model, params, tokens, tx, sparse):
    """A function that takes one training step at each call, and its memory.

    The memory is that of the optimizer state and the temporary memory of a step, in MB.
    """
    params = jax.tree.map(jnp.copy, params)  # each run donates its parameters
    state = [params, tx.init(params)]
    step = trainer(model, tx, sparse).lower(*state, tokens).compile()

    def run():
        state[0], state[1], loss = step(*state, tokens)
        return loss

    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state[1]))
    return run, kept / 1e6, step.memory_analysis().temp_size_in_bytes / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()

    tokens = jax.random.randint(jax.random.key(0), (BATCH, CONTEXT + 1), 0, 100)
    model = Transformer(100, width=256, depth=4)
    params = model.init(jax.random.key(1), tokens[:, :-1])
    adamw = optax.adamw(1e-3)
    runs = {"dense": runner(model, params, tokens, adamw, sparse=False)}
    for pattern in PATTERNS:
        plan = js.flax.plan(model, {"*/kernel": pattern}, tokens[:, :-1])
        runs[pattern] = runner(
            model, params, tokens, js.recipes.explore_exploit(adamw, plan), sparse=True
        )

    seconds = timing.in_turns(
        {name: run for name, (run, *_) in runs.items()}, args.rounds, "training steps"
    )
    dense = np.array(seconds["dense"])
    rows = [
        (name, 1e3 * np.median(times), np.median(np.array(times) / dense), *runs[name][1:])
        for name, times in seconds.items()
    ]
    header = ("run", "step ms", "of dense", "optimizer state MB", "temporaries MB")
    print(tabulate.tabulate(rows, header, floatfmt=("", ".1f", ".3f", ".2f", ".1f")))
    timing.save(
        "train_step",
        rounds=args.rounds,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        header=header,
        rows=rows,
    )


if __name__ == "__main__":
    main()
