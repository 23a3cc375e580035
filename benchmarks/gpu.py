"""Checks 2:4 products on a GPU and times them against the dense product, in under 10 minutes.

    python benchmarks/gpu.py              writes benchmarks/results/<device>.json and a plot
    python benchmarks/gpu.py --smoke      the same steps with small shapes on any device, writing
                                          nothing

First, every kernel that the device supports reads out one operand at a time, and multiplies
integers and random numbers, for the product and for the gradient of x; a kernel with wrong results
is not timed. Then masks, packing and gradients of x are timed. Then kernels, the dense product of
jax and, if torch can be imported, its semi-structured product take turns on random data, shape
after shape, until the time is up. Timed results are also compared with the product in float32.
Finally it prints the rows for the table of automatic choices that the timings imply.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import gpu_checks
import gpu_report
import jax
import jax.numpy as jnp
import masks
import numpy as np
import tabulate
import timing

import jaxsparse as js
from jaxsparse._kernels import KERNELS
from jaxsparse._packed.sparse24 import transposed

SHAPES = {  # output features M, contraction K
    "8192 x 8192": (8192, 8192),
    "Llama-3-8B gate and up": (28672, 4096),
    "Llama-3-8B gate": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B attention out": (4096, 4096),
    "Qwen2.5-7B gate": (18944, 3584),
    "ViT-L qkv": (3072, 1024),
    "ViT-L attention out": (1024, 1024),
    "ViT-L mlp in": (4096, 1024),
    "ViT-L mlp out": (1024, 4096),
    "ViT-So400m mlp out": (1152, 4304),
    "GPT-2 qkv": (2304, 768),
    "GPT-2 attention out": (768, 768),
    "GPT-2 mlp in": (3072, 768),
    "GPT-2 mlp out": (768, 3072),
    "GPT-2 XL vocabulary": (50257, 1600),
    "multiples of 8 and 16": (4104, 4112),
    "padded": (4101, 4100),
}
CHECKED = ("Llama-3-8B gate and up", "GPT-2 mlp out", "ViT-So400m mlp out", "padded")
CHECKED_ROWS = (1, 8, 13, 64, 1024)
# at the first of the rows
GRADIENTS = ("8192 x 8192", "Llama-3-8B gate", "Llama-3-8B down", "Llama-3-8B attention out")
ROWS = (8192, 16, 4096, 1, 1024, 64, 256, 8)  # the most informative first, in case time runs out
MASKS = (
    "2:4 axis 0",
    "2:4 axis 1",
    "4:8 axis 1",
    "1:16 axis 1",
    "2:4 both axes",
    "top 50%",
    "blocks of 32x32, 50%",
)
SMOKE_SHAPES, SMOKE_ROWS = {"small": (128, 128), "padded": (133, 132)}, (8, 3)

# device: sparse 16-bit FLOP/s of the tensor cores without a power limit, bytes/s of memory
PEAKS = {
    "H200": (1979e12, 4.8e12),
    "H100 80GB HBM3": (1979e12, 3.35e12),
    "A100-SXM4-80GB": (624e12, 2.04e12),
    "A100-SXM4-40GB": (624e12, 1.56e12),
}
# bytes of weights in rotation, several times an L2 cache; seconds that one call should keep the
# device busy, so that the time to start it does not matter
EACH_CALL = 256e6, 1e-3


def runs_here(name):
    """Why a kernel does not run on this device, or None; its failure does not stop the others."""
    x, w = (
        gpu_checks.random_rows(jax.random.key(0), 8, 128),
        gpu_checks.random_weight(jax.random.key(1), 128, 128),
    )
    try:
        product(name)(x, w).block_until_ready()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def examined(name, shapes, rows):
    """Whether a kernel runs on this device, and the results of its `checks`."""
    reason = runs_here(name) if name in KERNELS else None
    return {"right": False, "why": reason} if reason else checks(name, shapes, rows)


def examined_apart(name, seconds):
    """Examines a kernel in its own process, since it may hang or fault."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--check", name],
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"right": False, "why": f"its checks did not end in {seconds:.0f} seconds"}
    if done.returncode:
        return {"right": False, "why": done.stderr[-3000:]}
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def product(implementation):
    return jax.jit(functools.partial(js.sparse_matmul, implementation=implementation))


@functools.cache
def fused(implementation):
    """The function of x, a weight and a bias that computes the activation of product plus bias."""
    return jax.jit(
        lambda x, w, bias: js.sparse_matmul(
            x, w, bias=bias, activation="gelu", implementation=implementation
        )
    )


@functools.cache
def x_gradient(implementation):
    """The function that computes the gradient of x from that of a product, and the weight."""

    def gradient(ct, w):
        x = jax.ShapeDtypeStruct((len(ct), *w.contracting), ct.dtype)
        return jax.linear_transpose(
            lambda x: js.sparse_matmul(x, w, implementation=implementation), x
        )(ct)[0]

    return jax.jit(gradient)


@jax.jit
def turned(w):
    """The transpose of a transposable weight, packed."""
    values, metadata = transposed(w.values, w.with_layout("canonical").metadata)
    return js.Sparse24(values, metadata, w.output, w.contracting).with_layout("mma16")


def fits(name, n):
    return name == "dense" or KERNELS[name].misfit(n, jnp.bfloat16) is None


def checks(name, shapes, rows):
    """The results of `gpu_checks` for one kernel, and whether all of them are right."""
    multiply, gradient = product(name), x_gradient(name)
    cases = [(n, *shape) for shape in shapes.values() for n in rows if fits(name, n)]
    transposable = [(n, m, k) for n, m, k in cases if m % 4 == 0 and n in rows[::2]]
    found = {
        "wrong in probes": gpu_checks.probes(multiply),
        "wrong integers": {
            f"{n} x {m} x {k}": gpu_checks.wrong_integers(multiply, n, m, k) for n, m, k in cases
        },
        "error": {f"{n} x {m} x {k}": gpu_checks.error(multiply, n, m, k) for n, m, k in cases},
        "error with bias and gelu": {
            f"{n} x {m} x {k}": gpu_checks.fused_error(fused(name), n, m, k)
            for n, m, k in cases
            if n in rows[::2]
        },
        "wrong integers of gradients": {
            f"{n} x {m} x {k}": gpu_checks.wrong_integers(gradient, n, m, k, gradient=True)
            for n, m, k in transposable
        },
        "error of gradients": {
            f"{n} x {m} x {k}": gpu_checks.error(gradient, n, m, k, gradient=True)
            for n, m, k in transposable
        },
    }
    wrong = [
        count
        for check, counts in found.items()
        if check.startswith("wrong")
        for count in counts.values()
    ]
    errors = [
        error
        for check, cases in found.items()
        if check.startswith("error")
        for error in cases.values()
    ]
    return {**found, "right": not any(wrong) and all(error < 1 for error in errors)}


def turns(n, m, k, names, rounds, torch_call, each_call=EACH_CALL):
    """Times one product for each competitor, in turns, and computes their largest errors.

    Seconds are medians over rounds. The products of one call have different rows each, and rotate
    through more weights than fit into the L2 cache.
    """
    weights = int(np.clip(np.ceil(each_call[0] / (2 * m * k)), 2, 16))
    count = int(np.clip(each_call[1] / max(2 * n * m * k / 800e12, 2 * m * k / 4e12), weights, 64))
    keys = jax.random.split(jax.random.key(0), count + weights)
    x = [gpu_checks.random_rows(key, n, k) for key in keys[:count]]
    packed = [gpu_checks.random_weight(key, m, k) for key in keys[count:]]
    kernels = [jax.block_until_ready(js.decompress(w)) for w in packed]

    # the barrier keeps XLA from merging products that share a weight
    def all_products(one):
        return jax.jit(
            lambda x, w: [
                one(*jax.lax.optimization_barrier((a, w[i % weights]))) for i, a in enumerate(x)
            ]
        )

    calls = {name: functools.partial(all_products(product(name)), x, packed) for name in names}
    calls["jax dense"] = functools.partial(all_products(jnp.dot), x, kernels)
    errors = {name: gpu_checks.units(call()[0], x[0], packed[0]) for name, call in calls.items()}
    calls = {name: call for name, call in calls.items() if name == "jax dense" or errors[name] < 1}
    if torch_call:
        try:
            calls["torch semi-structured"] = torch_call(x, kernels)
            calls["torch semi-structured"]()
        except Exception as error:  # such as an unsupported shape; torch is only a reference
            print(f"torch, {n} x {m} x {k}: {type(error).__name__}: {error}"[:300], flush=True)
            calls.pop("torch semi-structured", None)
    seconds = timing.in_turns(calls, rounds, f"{n} x {m} x {k}")
    return {name: float(np.median(times)) / count for name, times in seconds.items()}, errors


def gradient_turns(n, m, k, names, rounds, each_call=EACH_CALL):
    """Times the gradient of x, in turns, and its parts.

    These are the transposition of the weight, and the product with a transposed weight.
    """
    count = int(np.clip(np.ceil(each_call[0] / (2 * m * k)), 2, 16))
    keys = jax.random.split(jax.random.key(0), 2 * count)
    ct = [gpu_checks.random_rows(key, n, m) for key in keys[:count]]
    packed = [gpu_checks.random_weight(key, m, k, transposable=True) for key in keys[count:]]
    backwards, kernels = (
        [jax.block_until_ready(change(w)) for w in packed] for change in (turned, js.decompress)
    )

    def all_products(one, weights):
        return functools.partial(
            jax.jit(lambda ct, w: [one(*pair) for pair in zip(ct, w, strict=True)]), ct, weights
        )

    calls = {name: all_products(x_gradient(name), packed) for name in names}
    calls |= {f"{name}, turned before": all_products(product(name), backwards) for name in names}
    calls["turning"] = all_products(lambda _, w: turned(w), packed)
    calls["decompressing"] = all_products(x_gradient("dense"), packed)
    calls["jax dense"] = all_products(lambda ct, w: ct @ w.T, kernels)
    seconds = timing.in_turns(calls, rounds, f"gradient {n} x {m} x {k}")
    return {name: float(np.median(times)) / count for name, times in seconds.items()}


def weights_once(size, rounds):
    """Times masks and packing of a square bfloat16 weight, and one pass over its memory."""
    w = masks.weights((size, size), "bfloat16")
    plan = js.plan({"w": w}, {"w": js.NM(2, 4, axis=0)})
    mask = jax.block_until_ready(jax.jit(lambda w: js.magnitude_masks({"w": w}, plan))(w))
    calls = {
        "read once": masks.stream,
        **{name: masks.mask(masks.patterns()[name], w) for name in MASKS},
    }
    for layout in ("canonical", "mma16"):
        pack = jax.jit(functools.partial(js.compress, plan=plan, layout=layout))
        calls[f"compress, {layout}"] = lambda w, pack=pack: pack({"w": w}, mask)
    seconds = timing.in_turns(
        {name: functools.partial(call, w) for name, call in calls.items()},
        rounds,
        "masks and packing",
    )
    read = np.array(seconds["read once"])
    return [
        {
            "what": name,
            "over reading once": float(np.median(np.array(times) / read)),
            "GB/s": (4.125 if name.startswith("compress") else 3)
            * size**2
            / float(np.median(times))
            / 1e9,
        }
        for name, times in seconds.items()
    ]


def torch_products():
    """A function that maps lists of x and weights to a call of all products in torch.

    If there is none, the second result is the reason.
    """
    try:
        torch = importlib.import_module("torch")
        semi = torch.sparse.to_sparse_semi_structured
        if not torch.cuda.is_available():
            return None, "torch sees no GPU"
    except Exception as error:  # torch may be installed without the libraries that it needs
        return None, f"{type(error).__name__}: {error}"

    def prepare(x, kernels):
        x = [torch.from_dlpack(a) for a in x]
        weights = [semi(torch.from_dlpack(w).T.contiguous()) for w in kernels]

        def call():
            for i, a in enumerate(x):
                torch.nn.functional.linear(a, weights[i % len(weights)])
            torch.cuda.synchronize()

        return call

    return prepare, None


def variants(name, n, m, k, configs, rounds):
    """Times a kernel under each configuration, and computes its distance from the dense product.

    Configurations are given as keyword arguments.
    """
    kernel = KERNELS[name].module
    x, w = (
        gpu_checks.random_rows(jax.random.key(0), n, k),
        gpu_checks.random_weight(jax.random.key(1), m, k),
    )
    cores = getattr(jax.devices()[0], "core_count", 1)
    expected = product("dense")(x, w).astype(jnp.float32)
    calls, differs, found = {}, {}, []
    for config in configs:
        one = functools.partial(kernel.matmul, config=kernel.Config(**config), cores=cores)
        call = functools.partial(jax.jit(one), x, w.values, w.metadata)
        try:
            differs[str(config)] = float(jnp.abs(call().astype(jnp.float32) - expected).max())
            calls[str(config)] = call
        except Exception as error:  # such as too much shared memory; the others continue
            found.append({"config": str(config), "why": f"{type(error).__name__}: {error}"[:500]})
    seconds = timing.in_turns(calls, rounds, f"{name} variants")
    return found + [
        {"config": one, "microseconds": 1e6 * float(np.median(t)), "differs": differs[one]}
        for one, t in seconds.items()
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="small shapes, few rounds; a CPU takes the dense fallback for a kernel",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--seconds", type=float, default=540, help="after which no further shape is timed"
    )
    parser.add_argument("--out", type=pathlib.Path, default=timing.RESULTS)
    parser.add_argument(
        "--check",
        choices=KERNELS,
        help="only whether one kernel is right, as the last line printed",
    )
    args = parser.parse_args(argv)
    some = (
        (SMOKE_SHAPES, SMOKE_ROWS)
        if args.smoke
        else ({key: SHAPES[key] for key in CHECKED}, CHECKED_ROWS)
    )
    if args.check:
        print(json.dumps(examined(args.check, *some)))
        return
    start = time.monotonic()
    shapes, rows, rounds = (
        (SMOKE_SHAPES, SMOKE_ROWS, 2) if args.smoke else (SHAPES, ROWS, args.rounds)
    )
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the checks run in separate processes
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.smoke:
        parser.error(f"{device.device_kind} is not a GPU; --smoke runs the steps without one")

    folder = (
        pathlib.Path(tempfile.mkdtemp()) if args.smoke and args.out == timing.RESULTS else args.out
    )
    file = re.sub(r"\W+", "_", device.device_kind).strip("_")
    save = functools.partial(timing.save, file, folder)

    folder.mkdir(parents=True, exist_ok=True)
    seen = {
        name: examined(name, *some) if args.smoke else examined_apart(name, args.seconds / 3)
        for name in KERNELS
    }
    if args.smoke and not any(one["right"] for one in seen.values()):
        seen["dense"] = examined("dense", *some)
    found = {"checks": seen}
    save(**found)
    for name, one in seen.items():
        print(
            name, "is right" if one["right"] else f"IS NOT RIGHT: {one.get('why', one)}", flush=True
        )
    names = [name for name in seen if seen[name]["right"]]

    torch_call, why_no_torch = torch_products()
    peaks = next((peak for kind, peak in PEAKS.items() if kind in device.device_kind), None)
    found |= {
        "torch": why_no_torch or "timed",
        "weights once": [],
        "variants": {},
        "gradients": [],
        "timings": [],
        "wrong": [],
        "left_out": [],
        "failed": {},
    }

    def time_weights():
        found["weights once"] = weights_once(256 if args.smoke else 16384, rounds)

    def time_variants(name):
        found["variants"][name] = variants(
            name, *KERNELS[name].tuned_at, KERNELS[name].configs, rounds
        )

    def able(n):
        return [
            name
            for name in names
            if fits(name, n)
            and (name == "dense" or KERNELS[name].timed_rows[0] <= n <= KERNELS[name].timed_rows[1])
        ]

    def time_gradients(shape, n):
        seconds = gradient_turns(
            n, *shapes[shape], able(n), rounds, (0, 0) if args.smoke else EACH_CALL
        )
        found["gradients"].append(
            {"shape": shape, "rows": n, **{name: 1e6 * t for name, t in seconds.items()}}
        )

    def time_products(shape, n):
        seconds, errors = turns(
            n, *shapes[shape], able(n), rounds, torch_call, (0, 0) if args.smoke else EACH_CALL
        )
        found["timings"].append(gpu_report.row(shape, n, *shapes[shape], seconds, peaks))
        found["wrong"] += [
            {"shape": shape, "rows": n, "kernel": name, "error": error}
            for name, error in errors.items()
            if not error < 1
        ]

    jobs = {"masks and packing": time_weights}
    jobs |= {
        f"variants of {name}": functools.partial(time_variants, name)
        for name in names
        if name in KERNELS and not args.smoke
    }
    turned_shapes = ["small"] if args.smoke else GRADIENTS
    jobs |= {
        f"gradient of {shape}": functools.partial(time_gradients, shape, rows[0])
        for shape in turned_shapes
    }
    jobs |= {
        f"{shape}, {n} rows": functools.partial(time_products, shape, n)
        for n in rows
        for shape in shapes
    }
    saved = time.monotonic()
    for name, job in jobs.items():
        if time.monotonic() - start > args.seconds:
            found["left_out"].append(name)
            continue
        try:
            job()
        except Exception as error:  # the others continue
            found["failed"][name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{name} failed: {found['failed'][name]}", flush=True)
        if time.monotonic() - saved > 60:  # saves the results so far, in case of a crash
            save(**found)
            saved = time.monotonic()

    capability = tuple(
        int(part) for part in str(getattr(device, "compute_capability", "0.0")).split(".")
    )
    found["choices"] = gpu_report.choices(found["timings"], found["wrong"], capability)
    tables = [
        tabulate.tabulate(found[part], "keys", floatfmt=".2f")
        for part in ("weights once", "gradients")
    ]
    print(gpu_report.table(found["timings"]), *tables, sep="\n\n", end="\n\n")
    print("_PREFERENCES that these timings imply:", *found["choices"], sep="\n")
    if found["wrong"]:
        print("WRONG:", *found["wrong"], sep="\n")
    save(**found)
    gpu_report.plot(found["timings"], device.device_kind, folder / f"{file}.png")


if __name__ == "__main__":
    main()
