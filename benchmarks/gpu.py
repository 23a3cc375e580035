"""2:4 products on a GPU, in one command of under 10 minutes: are they right, and how fast against the dense product?

python benchmarks/gpu.py              writes benchmarks/results/<device>.json
python benchmarks/gpu.py --smoke      the same steps with small shapes on any device, writing nothing

First every kernel that the device has is read out operand by operand and multiplies integers and random numbers; a kernel that is wrong
is not timed. Then kernels, the dense product of jax and, where torch can be imported, its semi-structured product take turns
on random data, shape after shape, until the time is up.
"""

import argparse
import functools
import importlib
import pathlib
import re
import tempfile
import time

import gpu_checks
import jax
import jax.numpy as jnp
import numpy as np
import tabulate
import timing

import jaxsparse as js
from jaxsparse.kernels import KERNELS, misfit

SHAPES = {  # output features M, contraction K
    "8192 x 8192": (8192, 8192),
    "Llama-3-8B gate and up": (28672, 4096),
    "Llama-3-8B gate": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B attention out": (4096, 4096),
    "ViT-L qkv": (3072, 1024),
    "ViT-L attention out": (1024, 1024),
    "ViT-L mlp in": (4096, 1024),
    "ViT-L mlp out": (1024, 4096),
    "GPT-2 qkv": (2304, 768),
    "GPT-2 attention out": (768, 768),
    "GPT-2 mlp in": (3072, 768),
    "GPT-2 mlp out": (768, 3072),
    "multiples of 64 only": (4160, 4160),
    "no multiple of 64": (4104, 4104),
}
CHECKED = ("Llama-3-8B gate", "ViT-L qkv", "GPT-2 mlp out", "multiples of 64 only")
ROWS = (8192, 16, 4096, 1, 1024, 64, 256, 8)  # the most telling first, should the time run out
SMOKE_SHAPES, SMOKE_ROWS = {"small": (128, 128), "no multiple of 64": (136, 136)}, (8, 3)

# kernel: N, M, K, and the configurations that only hardware can decide between
VARIANTS = {
    "hopper": (
        *(8192, 8192, 8192),
        [{"cluster": c, "in_flight": f, "stripe": s} for c, f, s in [(1, 0, 8), (2, 0, 8), (2, 1, 8), (2, 0, 4), (2, 0, 16)]],
    ),
    "ampere": (4096, 4096, 4096, [{"tile_m": t, "stages": s} for t, s in [(128, 3), (128, 4), (256, 3), (256, 4)]]),
    "decode": (16, 14336, 4096, [{"tile_m": t, "unroll": u} for t, u in [(16, 2), (16, 4), (32, 2), (32, 4), (64, 1), (64, 2)]]),
}

# device: sparse 16-bit FLOP/s of the tensor cores without a power limit, bytes/s of memory
PEAKS = {
    "H200": (1979e12, 4.8e12),
    "H100 80GB HBM3": (1979e12, 3.35e12),
    "A100-SXM4-80GB": (624e12, 2.04e12),
    "A100-SXM4-40GB": (624e12, 1.56e12),
}
ROTATED = 256e6  # bytes of weights in rotation: several times an L2 cache


def runs_here(name):
    """Why a kernel does not run on this device, or None; whatever it is, the other kernels go on."""
    x, w = gpu_checks.random_rows(jax.random.key(0), 8, 128), gpu_checks.random_weight(jax.random.key(1), 128, 128)
    try:
        product(name)(x, w).block_until_ready()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def product(implementation):
    return jax.jit(functools.partial(js.sparse_matmul, implementation=implementation))


def fits(name, n, m, k):
    return name == "dense" or misfit(name, n, jnp.dtype("bfloat16"), ()) is None


def checks(multiply, fits, shapes, rows):
    """What `gpu_checks` finds of one kernel, and whether all of it is right."""
    cases = [(n, *shape) for shape in shapes.values() for n in rows if fits(n, *shape)]
    found = {
        "wrong in probes": gpu_checks.probes(multiply),
        "wrong integers": {f"{n} x {m} x {k}": gpu_checks.wrong_integers(multiply, n, m, k) for n, m, k in cases},
        "error": {f"{n} x {m} x {k}": gpu_checks.error(multiply, n, m, k) for n, m, k in cases},
    }
    right = not any([*found["wrong in probes"].values(), *found["wrong integers"].values()]) and max(found["error"].values()) < 1
    return {**found, "right": right}


def turns(n, m, k, names, rounds, torch_call):
    """Seconds of one product for each competitor, medians over rounds in which they take turns, every time with other weights."""
    copies = int(np.clip(np.ceil(ROTATED / (2 * m * k)), 2, 16))
    keys = jax.random.split(jax.random.key(0), 2 * copies)
    x = [gpu_checks.random_rows(key, n, k) for key in keys[:copies]]
    packed = [gpu_checks.random_weight(key, m, k) for key in keys[copies:]]
    kernels = [jax.block_until_ready(js.decompress(w)) for w in packed]

    def all_copies(one):
        return jax.jit(lambda x, w: [one(*pair) for pair in zip(x, w, strict=True)])

    calls = {name: functools.partial(all_copies(product(name)), x, packed) for name in names}
    calls["jax dense"] = functools.partial(all_copies(jnp.dot), x, kernels)
    if torch_call:
        try:
            calls["torch semi-structured"] = torch_call(x, kernels)
            calls["torch semi-structured"]()
        except RuntimeError:  # a shape that it does not take
            calls.pop("torch semi-structured", None)
    seconds = timing.in_turns(calls, rounds, f"{n} x {m} x {k}")
    return {name: float(np.median(times)) / copies for name, times in seconds.items()}


def torch_products():
    """A function from lists of x and weights to a call that multiplies them all in torch, or the reason there is none."""
    try:
        torch = importlib.import_module("torch")
        semi = torch.sparse.to_sparse_semi_structured
        if not torch.cuda.is_available():
            return None, "torch sees no GPU"
    except (ImportError, AttributeError) as error:
        return None, str(error)

    def prepare(x, kernels):
        x = [torch.from_dlpack(a) for a in x]
        weights = [semi(torch.from_dlpack(w).T.contiguous()) for w in kernels]

        def call():
            for pair in zip(x, weights, strict=True):
                torch.nn.functional.linear(*pair)
            torch.cuda.synchronize()

        return call

    return prepare, None


def row(shape, n, m, k, seconds, peaks):
    """The timings of one product as a row of the table."""
    dense = seconds["jax dense"]
    ours = {name: t for name, t in seconds.items() if name in KERNELS}
    best = min(ours, key=ours.get) if ours else None
    flops, bytes_moved = 2 * n * m * k, 1.125 * m * k + 2 * n * (m + k)
    out = {"shape": shape, "rows": n, "M": m, "K": k, "microseconds": {name: 1e6 * t for name, t in seconds.items()}}
    if best is None:
        return out
    t = ours[best]
    bound = max(flops / peaks[0], bytes_moved / peaks[1]) if peaks else None
    return {
        **out,
        "best": best,
        "over jax dense": dense / t,
        "over torch": seconds["torch semi-structured"] / t if "torch semi-structured" in seconds else None,
        "TFLOP/s": flops / t / 1e12,
        "GB/s": bytes_moved / t / 1e9,
        "of bound": bound / t if bound else None,
    }


def variants(name, n, m, k, configs, rounds):
    """Seconds of a kernel under each configuration, given by keyword, and how far its result is from the dense product."""
    kernel = importlib.import_module(f"jaxsparse.kernels.{name}")
    x, w = gpu_checks.random_rows(jax.random.key(0), n, k), gpu_checks.random_weight(jax.random.key(1), m, k)
    cores = getattr(jax.devices()[0], "core_count", 1)
    calls = {}
    for config in configs:
        one = functools.partial(kernel.matmul, config=kernel.Config(**config), cores=cores)
        calls[str(config)] = functools.partial(jax.jit(one), x, w.values, w.metadata)
    expected = product("dense")(x, w).astype(jnp.float32)
    differs = {config: float(jnp.abs(call().astype(jnp.float32) - expected).max()) for config, call in calls.items()}
    seconds = timing.in_turns(calls, rounds, f"{name} variants")
    return [{"config": config, "microseconds": 1e6 * float(np.median(t)), "differs": differs[config]} for config, t in seconds.items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes, few rounds; a CPU takes the dense fallback for a kernel")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=540, help="after which no further shape is timed")
    parser.add_argument("--out", type=pathlib.Path, default=timing.RESULTS)
    args = parser.parse_args(argv)
    start = time.monotonic()
    shapes, rows, rounds = (SMOKE_SHAPES, SMOKE_ROWS, 2) if args.smoke else (SHAPES, ROWS, args.rounds)
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.smoke:
        parser.error(f"{device.device_kind} is no GPU; --smoke runs the steps without one")

    folder = pathlib.Path(tempfile.mkdtemp()) if args.smoke and args.out == timing.RESULTS else args.out
    save = functools.partial(timing.save, re.sub(r"\W+", "_", device.device_kind).strip("_"), folder)

    why_not = {name: runs_here(name) for name in KERNELS}
    found = {"kernels": {name: reason or "ran" for name, reason in why_not.items()}, "checks": {}}
    names = [name for name in KERNELS if why_not[name] is None] or (["dense"] if args.smoke else [])
    for name in names:
        some = shapes if args.smoke else {key: shapes[key] for key in CHECKED}
        found["checks"][name] = checks(product(name), functools.partial(fits, name), some, rows)
        print(name, "is right" if found["checks"][name]["right"] else f"IS WRONG: {found['checks'][name]}", flush=True)
        save(**found)  # a fault in the next kernel would end the process
    names = [name for name in names if found["checks"][name]["right"]]

    found["variants"] = {name: variants(name, *VARIANTS[name], rounds) for name in names if name in VARIANTS and not args.smoke}
    torch_call, why_no_torch = torch_products()
    found |= {"torch": why_no_torch or "timed", "timings": [], "left_out": []}
    peaks = next((peak for kind, peak in PEAKS.items() if kind in device.device_kind), None)
    for n in rows:
        for shape, (m, k) in shapes.items():
            if time.monotonic() - start > args.seconds:
                found["left_out"].append(f"{shape}, {n} rows")
                continue
            able = [name for name in names if fits(name, n, m, k)]
            found["timings"].append(row(shape, n, m, k, turns(n, m, k, able, rounds, torch_call), peaks))
    columns = ("shape", "rows", "best", "over jax dense", "over torch", "TFLOP/s", "GB/s", "of bound")
    print(tabulate.tabulate([[one.get(column) for column in columns] for one in found["timings"]], columns, floatfmt=".2f"))
    save(**found)


if __name__ == "__main__":
    main()
