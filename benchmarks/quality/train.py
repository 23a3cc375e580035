"""Trains one cell; for a seed, data order and initial weights are the same for all recipes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js
from benchmarks.quality import tasks
from benchmarks.quality.models import SPARSE
from benchmarks.quality.runs import RECIPES, WITHOUT_PLAN, as_pattern, density

CHUNK = 250  # steps between two reports of progress
# of a watched run: samples in time, weights of each kernel, bins of final magnitude, samples of
# the variances that are stored
SAMPLES, WEIGHTS, BINS, SHOWN = (300, 256, 10, 60)


def train(cell, seeds, scale, progress=lambda steps: None):
    """Trains a cell once for each seed; yields (seed, record).

    On a GPU the seeds run together under `jax.vmap`; on a CPU, which gains nothing from that, they
    run one after the other.

    Args:
      cell: the cell to train.
      seeds: the seeds.
      scale: the sizes of the task.
      progress: called with the number of new steps, over all seeds.
    """
    if scale.together:
        trained = trainer(cell, scale, jax.vmap)(
            jnp.asarray(seeds), lambda steps: progress(steps * len(seeds))
        )
        yield from (
            (seed, record(*jax.tree.map(lambda x, i=i: x[i], trained)))
            for i, seed in enumerate(seeds)
        )
    else:
        run = trainer(cell, scale, one_seed)
        yield from ((seed, record(*run(jnp.asarray(seed), progress))) for seed in seeds)


def one_seed(f, in_axes=0):
    """Replaces `jax.vmap` where seeds run one after the other."""
    return f


def trainer(cell, scale, over_seeds):
    """A function from a seed and `progress` to validation bits and error and the optimizer state.

    `over_seeds` turns a function of one seed into one of many. Compiled functions are shared by all
    seeds, and by cells as far as possible.
    """
    task = tasks.load(cell.task, scale)
    model = task.model(cell.width, density(cell.pattern) if cell.recipe == "SMALL" else 1.0)
    initial, validate = of_model(model, over_seeds)
    plan = js.flax.plan(
        model,
        {SPARSE: "1:1" if cell.recipe in WITHOUT_PLAN else as_pattern(cell.pattern)},
        task.validation[0][0],
    )
    draw = drawn(task.draw, over_seeds)
    parts = []
    for tx, steps, sparse in phases(cell, plan):
        init, effective = (
            jax.jit(over_seeds(f))
            for f in (tx.init, js.effective_params if sparse else lambda params, opt_state: params)
        )
        parts.append((steps, init, chunk(model, tx, sparse, over_seeds), effective))

    def run(seed, progress):
        params, done = initial(seed, task.validation[0][0]), 0
        for steps, init, advance, _ in parts:
            opt_state = init(params)
            for first in range(done, done + steps, CHUNK):
                count = min(CHUNK, done + steps - first)
                params, opt_state = jax.block_until_ready(
                    advance(params, opt_state, draw(seed, task.train, first, count))
                )
                progress(count)
            done += steps
        effective = parts[-1][-1](params, opt_state)  # with the masks of the last training step
        return *validate(effective, task.validation), opt_state if cell.watched else None

    return run


@functools.cache
def of_model(model, over_seeds):
    """The functions of a model: initialisation, and evaluation.

    The first maps a seed and an example to initial parameters, the second maps effective parameters
    and batches to bits and error.
    """

    def initial(seed, example):
        return model.init(jax.random.key(seed), example)

    def validate(params, batches):
        return jax.tree.map(
            jnp.mean, jax.lax.map(functools.partial(losses, model, params), batches)
        )

    return tuple(jax.jit(over_seeds(f, (0, None))) for f in (initial, validate))


@functools.cache
def drawn(draw, over_seeds):
    """A function that draws `count` batches from step `first` on; they depend on the seed only."""

    @functools.partial(jax.jit, static_argnums=3)
    def batches(seed, train, first, count):
        def one(seed, train, first):
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
                first + jnp.arange(count)
            )
            return jax.vmap(functools.partial(draw, train))(keys)

        return over_seeds(one, (0, None, None))(seed, train, first)

    return batches


def chunk(model, tx, sparse, over_seeds):
    """A function that trains on batches `[steps, ...]`."""

    def step(carry, batch):
        params, opt_state = carry

        def loss(params):
            return losses(
                model, js.effective_params(params, opt_state) if sparse else params, batch
            )[0]

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def many(params, opt_state, batches):
        return jax.lax.scan(step, (params, opt_state), batches)[0]

    return jax.jit(over_seeds(many), donate_argnums=(0, 1))


def losses(model, params, batch):
    """Bits, and the fraction of wrong labels."""
    inputs, labels = batch
    logits = model.apply(params, inputs)
    bits = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels) / jnp.log(2)
    return bits.mean(), (logits.argmax(-1) != labels).mean()


def phases(cell, plan):
    """The phases of a run, as (optimizer, steps, whether it holds masks).

    The static recipe has two: dense training, and fresh training from its weights.
    """
    options = dict(cell.options)
    dense = round(cell.steps * options.pop("dense_for", 0))
    if dense:
        yield adamw(cell.rate, dense), dense, False
    steps = cell.steps - dense
    tx = adamw(cell.rate, steps)
    if cell.recipe not in WITHOUT_PLAN:
        if {"dense_until", "fine_tune_from"} & options.keys():
            options["total_steps"] = steps
        tx = getattr(js.recipes, RECIPES[cell.recipe].function)(tx, plan, **options)
    if cell.watched:
        tx = js.analysis.record(tx, plan, total_steps=steps, samples=SAMPLES, weights=WEIGHTS)
    yield tx, steps, cell.recipe not in WITHOUT_PLAN


def adamw(rate, steps):
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.01)
    )


def record(bits, error, opt_state):
    """The record that is kept of a run."""
    kept = {"bits": float(bits), "error": float(error)}
    if opt_state is not None:
        seen = js.analysis.recordings(opt_state)
        some = np.unique(np.linspace(0, len(seen.steps) - 1, SHOWN).astype(int))
        kept |= {
            "sampled at": seen.steps[some].tolist(),
            "gradient variance": {
                path: rounded(series[some]) for path, series in seen.gradient_variance.items()
            },
            "second moment variance": {
                path: rounded(series[some]) for path, series in seen.second_moment_variance.items()
            },
            "decorrelation": {
                path: [
                    rounded(half) for half in js.analysis.decorrelation_by_magnitude(series, BINS)
                ]
                for path, series in seen.weights.items()
            },
        }
    return kept


def rounded(series):
    return [float(f"{value:.4g}") for value in np.asarray(series)]
