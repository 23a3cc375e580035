"""What a mask every step costs: the time of a sparse training step against the dense one, taken in turns.

python benchmarks/train_step.py
"""

import argparse

import jax
import numpy as np
import optax
import tabulate
import timing

timing.with_warm_heap()

import jaxsparse as js  # noqa: E402
from jaxsparse.examples.char_lm import BATCH, CONTEXT, Transformer, trainer  # noqa: E402

PATTERNS = ("2:4", "1:16")


def runner(model, params, tokens, tx, sparse):
    """A function that takes one more training step each time it is called."""
    step = trainer(model, tx, sparse)
    state = [jax.tree.map(np.asarray, params), None]
    state[0] = jax.device_put(state[0])
    state[1] = tx.init(state[0])

    def run():
        state[0], state[1], loss = step(*state, tokens)
        return loss

    return run


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
        runs[pattern] = runner(model, params, tokens, js.recipes.rewired(adamw, plan), sparse=True)

    seconds = timing.in_turns(runs, args.rounds, "training steps")
    dense = np.array(seconds["dense"])
    rows = [(name, 1e3 * np.median(times), np.median(np.array(times) / dense)) for name, times in seconds.items()]
    header = ("run", "step ms", "of dense")
    print(tabulate.tabulate(rows, header, floatfmt=("", ".1f", ".3f")))
    timing.save("train_step", rounds=args.rounds, parameters=sum(x.size for x in jax.tree.leaves(params)), header=header, rows=rows)


if __name__ == "__main__":
    main()
