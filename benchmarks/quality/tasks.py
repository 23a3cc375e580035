"""Data and models of the tasks: training data, validation data and model."""

import functools
import hashlib
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.models import ConvNet, LanguageModel, VisionTransformer

# skipped: not the library's own text, or different on every machine
LEFT_OUT = (
    "test",
    "tests",
    "idle_test",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
)
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"  # all other characters share one more token
HELD_OUT = 40  # files
VALIDATED = 2048  # windows of the held-out files
COPIES = 8  # augmented copies of every held-out image


class Task(NamedTuple):
    """One task.

    Attributes:
      model: a function from a width and a density of the hidden layers to a module.
      train: the arrays that batches are drawn from.
      draw: a function from these arrays and a key to a batch, (inputs, labels).
      validation: (inputs, labels), each `[batches, batch, ...]`, always the same.
      metric: the metric of the tables, "bits" or "error".
    """

    model: Callable
    train: Any
    draw: Callable
    validation: Any
    metric: str


def load(name, scale):
    """The task of this name, in the sizes of `scale`."""
    return {"characters": characters, "transformer": transformer, "convolutions": convolutions}[
        name
    ](scale)


@functools.cache
def library():
    """The texts of Python's standard library, (held out, the rest), in the order of paths.

    The hash of a path decides whether it is held out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    kept = [
        p
        for p in paths
        if not {*p.parts} & {*LEFT_OUT}
        and not p.name.startswith(("_sysconfigdata", "sitecustomize"))
    ]
    ranked = sorted(kept, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    held_out = set(ranked[:HELD_OUT])
    texts = {path: (root / path).read_text(encoding="utf-8", errors="replace") for path in kept}
    return tuple(
        "".join(text for path, text in texts.items() if (path in held_out) == which)
        for which in (True, False)
    )


@functools.cache
def fingerprint():
    """A fingerprint that identifies a version of the standard library."""
    return hashlib.sha256("\0".join(library()).encode()).hexdigest()[:16]


def as_tokens(text):
    table = np.full(0x110000, len(CHARACTERS), np.uint8)
    table[[ord(character) for character in CHARACTERS]] = range(len(CHARACTERS))
    return table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]


@functools.cache
def characters(scale):
    held_out, rest = map(as_tokens, library())
    length = scale.context + 1
    windows = np.lib.stride_tricks.sliding_window_view(held_out, length)[::length]
    windows = windows[
        np.linspace(0, len(windows) - 1, min(scale.validated, len(windows))).astype(int)
    ]
    batches = windows[: len(windows) // 64 * 64].reshape(-1, 64, length).astype(np.int32)

    def draw(text, key):
        starts = jax.random.randint(key, (scale.batch,), 0, text.size - length)
        windows = jax.vmap(lambda start: jax.lax.dynamic_slice(text, (start,), (length,)))(
            starts
        ).astype(jnp.int32)
        return windows[:, :-1], windows[:, 1:]

    def model(width, density):
        return LanguageModel(len(CHARACTERS) + 1, width, scale.depth, scale.heads, density)

    return Task(
        model,
        jnp.asarray(rest),
        draw,
        (jnp.asarray(batches[..., :-1]), jnp.asarray(batches[..., 1:])),
        "bits",
    )


@functools.cache
def transformer(scale):
    return digits(scale, lambda width, density: VisionTransformer(width, 2, 2, density))


@functools.cache
def convolutions(scale):
    return digits(scale, ConvNet)


def digits(scale, model):
    """The 8x8 images of scikit-learn, augmented; a quarter of them is held out."""
    from sklearn import datasets  # here, since only the digits need it

    images, labels = (np.asarray(array) for array in datasets.load_digits(return_X_y=True))
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    order = np.random.default_rng(0).permutation(len(images))
    held_out, rest = jnp.asarray(order[: len(images) // 4]), jnp.asarray(order[len(images) // 4 :])
    images, labels = jnp.asarray(images), jnp.asarray(labels.astype(np.int32))

    def draw(train, key):
        images, labels = train
        which, change = jax.random.split(key)
        chosen = jax.random.randint(which, (scale.images,), 0, len(labels))
        return augmented(images[chosen], change), labels[chosen]

    some = held_out[: min(len(held_out) // 64 * 64, scale.validated)]
    changed = jax.jit(jax.vmap(lambda key: augmented(images[some], key)))(
        jax.random.split(jax.random.key(0), COPIES)
    )
    validation = changed.reshape(-1, 64, 8, 8), jnp.tile(labels[some], COPIES).reshape(-1, 64)
    return Task(model, (images[rest], labels[rest]), draw, validation, "error")


def augmented(images, key):
    """Each image `[8, 8]` rotated, stretched and shifted, with noise.

    Rotations are up to 15 degrees, stretching up to 15 %, shifts up to a pixel.
    """

    def one(image, key):
        keys = jax.random.split(key, 4)
        turn = jax.random.uniform(keys[0], (), minval=-0.26, maxval=0.26)
        stretch = jax.random.uniform(keys[1], (2, 1), minval=0.85, maxval=1.15)
        move = jax.random.uniform(keys[2], (2, 1), minval=-1, maxval=1)
        rotation = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
        places = (
            jnp.stack(jnp.meshgrid(jnp.arange(8), jnp.arange(8), indexing="ij")).reshape(2, 64)
            - 3.5
        )
        source = stretch * (rotation @ places) + move + 3.5
        moved = jax.scipy.ndimage.map_coordinates(image, list(source), order=1).reshape(8, 8)
        return moved + 0.1 * jax.random.normal(keys[3], (8, 8))

    return jax.vmap(one)(images, jax.random.split(key, len(images)))
