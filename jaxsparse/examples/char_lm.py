"""A character language model, trained dense and sparse side by side, then run compressed.

    python -m jaxsparse.examples.char_lm                 # 2:4, on Python's own manual pages
    python -m jaxsparse.examples.char_lm --pattern 1:4 --data my_book.txt

Both models start from the same weights and see the same batches. The sparse one trains by Algorithm
1 of Advances in Sparse Neural Model Training: the largest weights of every group participate in the
forward pass, all weights learn, and non-participating weights are reset to zero from time to time.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import tqdm
from flax import linen as nn
from matplotlib.figure import Figure

import jaxsparse as js

CONTEXT, BATCH, STEPS = 128, 8, 400


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        causal = nn.make_causal_mask(x[..., 0])
        x += nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention")(
            nn.LayerNorm()(x), mask=causal
        )
        h = nn.gelu(nn.Dense(4 * width, name="mlp_in")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="mlp_out")(h), None


class Transformer(nn.Module):
    """Tokens int32 `[batch, time]` to logits `[batch, time, vocabulary]`."""

    vocabulary: int
    width: int
    depth: int
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):
        # tied: the embedding also computes the logits
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        places = self.param("places", nn.initializers.normal(0.3), (CONTEXT, self.width))
        x = jnp.sqrt(self.width) * embed(tokens) + places[: tokens.shape[1]]
        # mixes in the preceding characters from the first step on
        x += nn.Conv(self.width, kernel_size=(4,), padding="CAUSAL", name="recent")(x)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        x, _ = blocks(self.heads, name="blocks")(x, None)
        return embed.attend(nn.LayerNorm()(x))


def bits(model, params, tokens):
    """Bits per character of tokens `[batch, CONTEXT + 1]`."""
    logits = model.apply(params, tokens[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:]
    ).mean() / jnp.log(2)


def trainer(model, tx, sparse):
    """A compiled training step; only the optimizer and one line make it sparse."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens):
        def loss(params):
            with js.flax.intercept(opt_state if sparse else None):
                return bits(model, params, tokens)

        value, grads = jax.value_and_grad(loss)(params)
        updates, new_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_state, value

    return step


def train(steps, runs, batches):
    """Trains the runs in turns; returns the bits per character and the seconds of every step."""
    curves: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    with tqdm.tqdm(batches, total=steps, unit="step", mininterval=1) as bar:
        for tokens in bar:
            for name, (step, state) in runs.items():
                start = time.perf_counter()
                *state, value = step(*state, tokens)
                runs[name] = (step, state)
                curves[name][0].append(float(value))
                curves[name][1].append(time.perf_counter() - start)
            bar.set_postfix(
                {name: f"{values[-1]:.2f} bits" for name, (values, _) in curves.items()},
                refresh=False,
            )
    return curves


@functools.partial(jax.jit, static_argnums=(0, 4))
def sample(model, params, prompt, key, length):
    """Continues a prompt, int32 `[n]`, by `length` tokens from the compressed model."""

    def one(window, key):
        logits = js.sparsify(model.apply)(params, window[None])[0, -1]
        token = jax.random.categorical(key, logits / 0.7)
        return jnp.append(window[1:], token), token

    window = jnp.tile(prompt, -(-CONTEXT // prompt.size))[-CONTEXT:]
    return jax.lax.scan(one, window, jax.random.split(key, length))[1]


def evaluate(model, models, validation):
    """Bits per character on all of `validation`, and the median seconds of a forward pass."""

    score = jax.jit(js.sparsify(functools.partial(bits, model)))
    parts = jnp.split(validation, list(range(32, len(validation), 32)))
    scores = {
        name: np.average(
            [score(params, part) for part in parts], weights=[len(part) for part in parts]
        )
        for name, params in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(15):
        for name, params in models.items():
            start = time.perf_counter()
            score(params, parts[0]).block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    return scores, {name: np.median(values) for name, values in seconds.items()}


def agreement(model, masked, packed, tokens):
    """The largest difference between masked and compressed logits, over the largest logit."""

    logits = jax.jit(js.sparsify(model.apply))
    expected, actual = (logits(params, tokens[:, :-1]) for params in (masked, packed))
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def plot(curves, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="training bits per character (mean of 20 steps)"
    )
    for name, (values, _) in curves.items():
        width = min(20, len(values))
        axes.plot(
            np.arange(width, len(values) + 1),
            np.convolve(values, np.ones(width) / width, "valid"),
            label=name,
        )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the example; returns its plan, and the header and the rows of its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pattern", default="2:4", help="n:m, n kept of every m (default 2:4)")
    parser.add_argument(
        "--data", type=pathlib.Path, help="a text file; default: the manual pages of Python"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps of each model (default {STEPS})"
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        default="char_lm.png",
        help="where the loss curves go (default char_lm.png)",
    )
    args = parser.parse_args(argv)

    text = (
        args.data.read_text()
        if args.data
        else "\n".join(text for _, text in sorted(topics.topics.items()))
    )
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int32), CONTEXT + 1)
    held_out = len(windows) * 9 // 10
    random = np.random.default_rng(args.seed)
    batches = (windows[random.integers(0, held_out - CONTEXT, BATCH)] for _ in range(args.steps))
    validation = jnp.asarray(windows[held_out::CONTEXT])

    model = Transformer(len(alphabet), args.width, args.depth)
    params = model.init(jax.random.key(args.seed), validation[:1, :-1])
    plan = js.flax.plan(model, {"*/kernel": args.pattern}, validation[:1, :-1])
    print(plan, end="\n\n")

    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, args.steps // 10, args.steps)
    dense_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99))
    sparse_tx = js.recipes.explore_exploit(dense_tx, plan, reset_every=max(300, args.steps // 10))
    copy = jax.tree.map(jnp.copy, params)  # each run donates its parameters
    runs = {
        "dense": (trainer(model, dense_tx, sparse=False), (params, dense_tx.init(params))),
        args.pattern: (trainer(model, sparse_tx, sparse=True), (copy, sparse_tx.init(copy))),
    }
    curves = train(args.steps, runs, batches)
    plot(curves, args.plot)

    (_, (dense, _)), (_, (trained, opt_state)) = runs.values()
    models = {"dense": dense, args.pattern: js.effective_params(trained, opt_state)}
    if args.pattern == "2:4":
        models["2:4 compressed"] = js.compress(trained, opt_state)
    scores, seconds = evaluate(model, models, validation)
    rows = [
        (
            name,
            scores[name],
            1.0 if name == "dense" else plan.density,
            sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 1e6,
            1e3 * np.median(curves[name][1]) if name in curves else None,
            1e3 * seconds[name],
        )
        for name, weights in models.items()
    ]
    header = (
        "model",
        "validation bits per character",
        "density",
        "weights MB",
        "training step ms",
        "forward ms",
    )
    print("\n" + tabulate.tabulate(rows, header, floatfmt=("", ".3f", ".3f", ".2f", ".1f", ".1f")))

    final = list(models.values())[-1]
    if args.pattern == "2:4":
        difference = agreement(model, models["2:4"], final, validation[:8])
        if not difference < 1e-4:
            raise SystemExit(
                f"The compressed forward pass differs from the masked one by {difference:.1e} of "
                "the largest logit."
            )
        print(
            "\nThe compressed forward agrees with the masked one: logits differ by "
            f"{difference:.1e} of the largest."
        )
    else:
        print(f"\nThe compressed format is 2:4, so {args.pattern} runs masked.")
    prompt = np.array([np.searchsorted(alphabet, character) for character in "The "])
    continued = sample(model, final, prompt, jax.random.key(args.seed), 300)
    print(
        f"\nThe {list(models)[-1]} model writes:\n\nThe {''.join(alphabet[continued])}\n\nLoss "
        f"curves: {args.plot}"
    )
    return plan, header, rows


if __name__ == "__main__":
    main()
