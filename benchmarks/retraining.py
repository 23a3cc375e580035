"""SmolLM2-135M retrained at 2:4 by the papers' recipes, beside the dense model retrained as long.

    python benchmarks/retraining.py [--gguf FILE]     # continues where it stopped
    python benchmarks/retraining.py --tiny            # a random model of two blocks, at once

Every recipe starts from the masks of largest magnitude (the trained weights) and from those of
SparseGPT (its weights). The text is the docstrings of Python's standard library; the perplexity is
that of the example `smollm`, on the manual pages. All runs see the same windows in the same order.
The learning rate of each run is the best of at least three, by short runs and other docstrings; as
long as the best is the lowest or the highest, a further one is tried, up to six.
"""

import argparse
import ast
import functools
import json
import operator
import pathlib
import random
import resource
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
import tqdm
from matplotlib.figure import Figure

import jaxsparse as js
from jaxsparse.examples import smollm, smollm_model

STEPS, TUNING_STEPS, RANK = 100, 20, 16
# the middle of the three rates that are tried first, in halves of a decimal digit
MIDDLE = {"dense": -8, "magnitude": -6, "sparsegpt": -8, "adapters": -6}
RECIPES = {
    "static": lambda tx, plan, masks, steps: js.recipes.static(tx, plan, masks=masks),
    "explore_exploit": lambda tx, plan, masks, steps: js.recipes.explore_exploit(
        tx, plan, reset_every=None, fix_after=0.5, total_steps=steps
    ),
    "sr_ste": lambda tx, plan, masks, steps: js.recipes.sr_ste(tx, plan),
    "mdgf": lambda tx, plan, masks, steps: js.recipes.mdgf(
        tx, plan, total_steps=steps, dense_until=0
    ),
}
RUNS = (
    ("dense", "dense"),
    *((start, recipe) for start in ("magnitude", "sparsegpt") for recipe in RECIPES),
    ("sparsegpt", "adapters"),
)


def docstrings():
    """The long docstrings of Python's standard library, in an order that is always the same."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(library.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    texts = [text for text in texts if len(text) >= 400]
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)


def optimizer(steps, rate):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.linear_schedule(rate, 0.0, steps), b2=0.95),
    )


def loss(model, params, tokens):
    logits = model.apply(params, tokens[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def sparse_loss(model, params, state, tokens):
    with js.flax.intercept(state):
        return loss(model, params, tokens)


def adapters_of(plan):
    """Random `[layers, K, RANK]` and zeros `[layers, RANK, M]` for kernels `[layers, K, M]`."""
    keys = jax.random.split(jax.random.key(0), len(plan.sparse))
    return {
        path: (
            jax.random.normal(key, (layers, rows, RANK)) / np.sqrt(rows),
            jnp.zeros((layers, RANK, columns)),
        )
        for key, (path, leaf) in zip(keys, plan.sparse.items(), strict=True)
        for layers, rows, columns in [leaf.shape]
    }


def with_adapters(params, adapters):
    """The weights plus the low-rank products; `adapters` maps paths to (down, up)."""

    def added(path, w):
        name = "/".join(str(key.key) for key in path)
        return w + jnp.matmul(*adapters[name]) if name in adapters else w

    return jax.tree_util.tree_map_with_path(added, params)


class Trainer:
    """Trains by an optimizer, `make(rate)`, and a loss, `value(fixed, params, state, tokens)`."""

    def __init__(self, make, value):
        @functools.partial(jax.jit, donate_argnums=(2, 3))
        def step(rate, fixed, params, state, tokens):
            now, gradients = jax.value_and_grad(value, 1)(fixed, params, state, tokens)
            updates, state = make(rate).update(gradients, state, params)
            return optax.apply_updates(params, updates), state, now

        self.make, self.step = make, step

    def __call__(self, rate, fixed, params, windows, label):
        """The parameters and the state after a step on each window, and the loss of each step."""
        state, curve = self.make(rate).init(params), []
        params = jax.tree.map(jnp.copy, params)
        with tqdm.tqdm(windows, label, unit="step", leave=False) as bar:
            for tokens in bar:
                params, state, now = self.step(rate, fixed, params, state, tokens[None])
                curve.append(float(now))
                bar.set_postfix(loss=f"{curve[-1]:.3f}", refresh=False)
        return params, state, curve


class Bench:
    """The model, its starting points and its text; `run` trains one recipe."""

    def __init__(self, args):
        if args.tiny:
            self.model, params, tokenizer = smollm_model.tiny()
            count, batches, length = 2, 2, 32
        else:
            file = args.gguf or smollm_model.fetch()
            self.model, params, tokenizer = smollm_model.load(file)
            count, batches, length = 12, 16, 512
        manual = tokenizer.encode(smollm.manual_pages()).ids
        self.test = smollm.windows(manual, 0, count, length)
        tokens = tokenizer.encode(docstrings()).ids
        self.train = smollm.windows(tokens, 0, args.steps, length)
        self.validation = smollm.windows(tokens, args.steps * length + length, count // 2, length)
        self.plan = js.flax.plan(self.model, {"blocks/*/kernel": "2:4"}, self.test[:1, :-1])
        calibration = smollm.windows(manual, 60_000, batches, length)
        self.starts = {
            "dense": (params, None),
            "magnitude": (params, js.magnitude_masks(params, self.plan)),
            "sparsegpt": smollm.pruned(self.model, params, self.plan, calibration, "sparsegpt"),
        }

    def trainer(self, start, recipe, steps):
        make = functools.partial(optimizer, steps)
        if recipe == "dense":
            return Trainer(make, lambda _, params, state, tokens: loss(self.model, params, tokens))
        if recipe == "adapters":
            return Trainer(
                make,
                lambda base, adapters, state, tokens: loss(
                    self.model, with_adapters(base, adapters), tokens
                ),
            )
        of_recipe, masks = RECIPES[recipe], self.starts[start][1]
        return Trainer(
            lambda rate: of_recipe(make(rate), self.plan, masks, steps),
            lambda _, params, state, tokens: sparse_loss(self.model, params, state, tokens),
        )

    def run(self, train, start, recipe, rate, steps):
        """The weights that the forward pass uses after training, and the losses."""
        params = self.starts[start][0]
        windows, label = self.train[:steps], f"{recipe} from {start}, {rate:g}"
        if recipe == "adapters":
            adapters, _, curve = train(rate, params, adapters_of(self.plan), windows, label)
            return with_adapters(params, adapters), curve
        params, state, curve = train(rate, None, params, windows, label)
        if recipe != "dense":
            params = js.effective_params(params, state)
            js.assert_sparse(params, self.plan)
        return params, curve

    def perplexity(self, params, windows):
        return smollm.perplexity(self.model, params, windows)


def plot(rows, path):
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="perplexity on the manual pages")
    names = [f"{recipe} from {start}" for start, recipe, *_ in rows]
    axes.barh(names, [row[-1] for row in rows])
    for i, row in enumerate(rows):
        axes.annotate(f" {row[-1]:.2f}", (row[-1], i), va="center")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=pathlib.Path, help="the file of the model")
    parser.add_argument("--tiny", action="store_true", help="a random model of two blocks")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=pathlib.Path, default=timing.RESULTS)
    args = parser.parse_args(argv)
    file = args.out / "retraining.jsonl"
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    done = {(line["start"], line["recipe"], line["rate"], line["steps"]): line for line in lines}
    bench = Bench(args)

    def records(train, start, recipe, rates, steps, windows):
        """The record of a run for each rate, trained unless it is already there."""
        for rate in rates:
            key = start, recipe, rate, steps
            if key not in done:
                begun = time.perf_counter()
                params, curve = bench.run(train, *key)
                done[key] = {
                    **dict(zip(("start", "recipe", "rate", "steps"), key, strict=True)),
                    "perplexity": bench.perplexity(params, windows),
                    "losses": [round(value, 4) for value in curve],
                    "seconds": time.perf_counter() - begun,
                    "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                    **timing.environment(),
                }
                with file.open("a") as lines:
                    lines.write(json.dumps(done[key]) + "\n")
            yield done[key]

    short = min(TUNING_STEPS, args.steps - 1)
    rows = []
    for start, recipe in tqdm.tqdm(RUNS, "runs"):
        middle = MIDDLE["adapters" if recipe == "adapters" else start]
        tried = {middle - 1, middle, middle + 1}
        train = bench.trainer(start, recipe, short)
        while len(tried) <= 6:
            rates = [float(f"{10 ** (half / 2):.0e}") for half in sorted(tried)]
            short_runs = [*records(train, start, recipe, rates, short, bench.validation)]
            rate = min(short_runs, key=operator.itemgetter("perplexity"))["rate"]
            if rate == rates[0]:
                tried.add(min(tried) - 1)
            elif rate == rates[-1]:
                tried.add(max(tried) + 1)
            else:
                break
        train = bench.trainer(start, recipe, args.steps)
        (record,) = records(train, start, recipe, [rate], args.steps, bench.test)
        rows.append((start, recipe, rate, record["perplexity"]))
    before = {
        start: bench.perplexity(
            params if masks is None else js.effective_params(params, masks), bench.test
        )
        for start, (params, masks) in bench.starts.items()
    }
    rows = [(start, recipe, rate, before[start], after) for start, recipe, rate, after in rows]
    plot(rows, args.out / "retraining.png")
    records = done.values()
    timing.save(
        "retraining",
        args.out,
        steps=args.steps,
        seconds=sum(record["seconds"] for record in records),
        gigabytes=max(record["gigabytes"] for record in records),
        header=("from", "recipe", "learning rate", "before", "perplexity"),
        rows=rows,
    )


if __name__ == "__main__":
    main()
