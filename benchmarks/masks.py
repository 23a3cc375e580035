"""Times masks of every pattern, relative to reading the weights once, on shapes of real models.

python benchmarks/masks.py
"""

import argparse

import timing

if __name__ == "__main__":
    timing.with_warm_heap()

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from matplotlib.figure import Figure

import jaxsparse as js

SHAPES = {  # HWIO for the convolution, [in, out] for the others
    "square": (4096, 4096),
    "GPT-2 attention": (768, 2304),
    "GPT-2 MLP": (768, 3072),
    "ViT-L MLP": (1024, 4096),
    "Llama-3-8B attention": (4096, 4096),
    "Llama-3-8B MLP": (4096, 14336),
    "ResNet-50 3x3": (3, 3, 512, 512),
}
NM = ("2:4", "4:8", "1:4", "1:8", "1:16", "1:32", "1:64", "1:128", "2:16")
DTYPES = ("float32", "bfloat16")


def nm(pattern, axis):
    n, m = map(int, pattern.split(":"))
    return js.NM(n, m, axis=axis)


def patterns():
    """The patterns that are timed on the square weight, by name."""
    return {
        **{f"{name} axis {axis}": nm(name, axis) for name in NM for axis in (0, 1)},
        **{f"{n}:4 both axes": js.TransposableNM(n, 4, axes=(0, 1)) for n in (1, 2, 3)},
        **{f"top {density:.0%}": js.Unstructured(density) for density in (0.5, 0.1, 0.01)},
        **{
            f"blocks of {size}x{size}, 50%": js.Block((size, size), 0.5, axes=(0, 1))
            for size in (4, 32)
        },
    }


@jax.jit
def stream(w):
    """Reads the weights and writes a mask once: a lower bound for any mask."""
    return jnp.abs(w) > 0.5


def mask(pattern, w):
    plan = js.plan({"w": w}, {"w": pattern})
    return jax.jit(lambda w: js.magnitude_masks({"w": w}, plan)["w"])


def ratios(calls, w, rounds, label):
    """The median ratio of each call's time to that of `stream` in the same round."""
    seconds = timing.in_turns(
        {name: lambda f=f: f(w) for name, f in {"stream": stream, **calls}.items()}, rounds, label
    )
    base = np.array(seconds["stream"])
    return {name: float(np.median(np.array(seconds[name]) / base)) for name in calls}


def weights(shape, dtype):
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


def by_pattern(rounds):
    by_dtype = {}
    for dtype in DTYPES:
        w = weights(SHAPES["square"], dtype)
        calls = {name: mask(pattern, w) for name, pattern in patterns().items()}
        by_dtype[dtype] = ratios(calls, w, rounds, f"masks {dtype}")
    return [(name, *(by_dtype[dtype][name] for dtype in DTYPES)) for name in by_dtype[DTYPES[0]]]


def by_shape(rounds):
    rows = []
    for name, shape in SHAPES.items():
        w = {dtype: weights(shape, dtype) for dtype in DTYPES}
        axis = len(shape) - 2
        by_dtype = [
            ratios({"mask": mask(nm("2:4", axis), w[dtype])}, w[dtype], rounds, name)["mask"]
            for dtype in DTYPES
        ]
        rows.append((name, "x".join(map(str, shape)), *by_dtype))
    return rows


def plot(rows, path):
    names = [row[0] for row in rows]
    figure = Figure(figsize=(7, 0.28 * len(rows) + 1), layout="constrained")
    axes = figure.add_subplot(xlabel="time over reading the weights once (log)", xscale="log")
    for i, dtype in enumerate(DTYPES):
        axes.barh(np.arange(len(rows)) + 0.4 * i, [row[1 + i] for row in rows], 0.4, label=dtype)
    axes.set_yticks(np.arange(len(rows)) + 0.2, names, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows, shapes = by_pattern(rounds), by_shape(rounds)
    header, shape_header = ("mask", *DTYPES), ("2:4 of", "shape", *DTYPES)
    print(tabulate.tabulate(rows, header, floatfmt=".2f"), end="\n\n")
    print(tabulate.tabulate(shapes, shape_header, floatfmt=".2f"))
    timing.save(
        "masks", rounds=rounds, header=header, rows=rows, shape_header=shape_header, shapes=shapes
    )
    plot(rows, timing.RESULTS / "masks.png")


if __name__ == "__main__":
    main()
