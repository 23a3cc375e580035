"""Checks 2:4 products on a GPU and times them against the dense product, in under 10 minutes.

    python benchmarks/gpu.py              writes benchmarks/results/<device>.json and a plot
    python benchmarks/gpu.py --smoke      the same steps with small shapes on any device, writing
                                          nothing

First, every kernel that the device supports reads out one operand at a time, and multiplies
integers and random numbers, for the product and for the gradient of x; a kernel with wrong results
is not timed. Then configurations of the kernels are compared. Then kernels, the dense product of
jax and, if torch can be imported, its semi-structured product take turns on random data, shape
after shape, until the time is up, with masks, packing and gradients of x between them. Timed
results are also compared with the product in float32. Finally it prints the rows for the table of
automatic choices that the timings imply.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

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
# at the most rows
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
# device busy
EACH_CALL = 256e6, 1e-3
# Each product of a call costs about 0.1 s of compilation, so a call has at most this many, and
# several calls are launched before the first is waited for, so that the time to launch them does
# not matter.
PRODUCTS, LAUNCHES = 16, 16


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


def examined(name, shapes, rows, tell=lambda part: None):
    """Whether a kernel runs on this device, and the results of its `checks`."""
    reason = runs_here(name) if name in KERNELS else None
    return {"right": False, "why": reason} if reason else checks(name, shapes, rows, tell)


def examined_apart(name, seconds):
    """Examines a kernel in its own process, since it may hang or fault."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--check", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines, errors = process.communicate(timeout=seconds)
        why = errors[-3000:] if process.returncode else None
    except subprocess.TimeoutExpired:
        process.kill()
        lines, _ = process.communicate()
        why = f"its checks did not end in {seconds:.0f} seconds"
    parts = [json.loads(line) for line in lines.splitlines()]
    return {"right": False, "why": why, "before that": parts} if why else parts[-1]


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


def checks(name, shapes, rows, tell=lambda part: None):
    """The results of `gpu_checks` for one kernel, and whether all of them are right.

    They compile for longer than they compute, so they run in threads. `tell` gets each part when it
    is done.
    """
    multiply, gradient = product(name), x_gradient(name)
    backward = {"gradient": True}
    parts = {
        "wrong integers": (gpu_checks.wrong_integers, multiply, rows, {}),
        "error": (gpu_checks.error, multiply, rows, {}),
        "error with bias and gelu": (gpu_checks.fused_error, fused(name), rows[::2], {}),
        "wrong integers of gradients": (gpu_checks.wrong_integers, gradient, rows[::2], backward),
        "error of gradients": (gpu_checks.error, gradient, rows[::2], backward),
    }

    def result(part_and_shape):
        part, (m, k) = part_and_shape
        check, function, counts, options = parts[part]
        if options and m % 4:  # no transposable weight has this shape
            return part, {}
        wrong = {
            f"{n} x {m} x {k}": check(function, n, m, k, **options) for n in counts if fits(name, n)
        }
        tell({part: wrong})
        return part, wrong

    wrong = {"wrong in probes": gpu_checks.probes(multiply), **{part: {} for part in parts}}
    tell(wrong)
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for part, some in pool.map(result, itertools.product(parts, shapes.values())):
            wrong[part] |= some
    right = {
        part: all(one == 0 if part.startswith("wrong") else one < 1 for one in results.values())
        for part, results in wrong.items()
    }
    return {**wrong, "right": all(right.values())}


def compiled(programs):
    """Calls of `{name: (jitted function, *arguments)}`, compiled at the same time.

    The second result says why those that are missing cannot be compiled.
    """
    failed = {}

    def call(name):
        function, *arguments = programs[name]
        try:
            return functools.partial(function.lower(*arguments).compile(), *arguments)
        except Exception as error:  # such as too much shared memory; the others continue
            failed[name] = f"{type(error).__name__}: {error}"[:500]

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        calls = dict(zip(programs, pool.map(call, programs), strict=True))
    return {name: one for name, one in calls.items() if one is not None}, failed


def turns(m, k, competitors, rounds, prepare_torch=None, each_call=EACH_CALL):
    """Times products with one weight for each number of rows of x.

    Competitors are `{rows: {name: function of x and a compressed weight}}`; the dense product and
    that of torch join them at each number of rows. The products of one call have different rows
    each, and rotate through more weights than fit into the L2 cache.

    Yields:
      `(rows, seconds, errors, failed)`, where seconds are medians over rounds, errors are the
      largest ones, in units, and `failed` says why a competitor cannot be compiled. A competitor
      with errors is not timed.
    """
    weights = int(np.clip(np.ceil(each_call[0] / (2 * m * k)), 2, 16))
    packed = [
        gpu_checks.random_weight(key, m, k) for key in jax.random.split(jax.random.key(0), weights)
    ]
    kernels = [jax.block_until_ready(js.decompress(w)) for w in packed]
    torch_call = None
    if prepare_torch:
        with reported(f"torch, {m} x {k}"):
            torch_call = prepare_torch(kernels)

    # the barrier keeps XLA from merging products that share a weight
    def all_products(one):
        return jax.jit(
            lambda x, w: [
                one(*jax.lax.optimization_barrier((a, w[i % weights]))) for i, a in enumerate(x)
            ]
        )

    for n, named in competitors.items():
        least = max(2 * n * m * k / 800e12, 2 * m * k / 4e12)  # seconds of one product
        count = int(np.clip(each_call[1] / least, weights, PRODUCTS))
        launches = int(np.clip(8 * each_call[1] / (count * least), 1, LAUNCHES))
        keys = jax.random.split(jax.random.key(n), count)
        x = [gpu_checks.random_rows(key, n, k) for key in keys]
        programs = {name: (all_products(one), x, packed) for name, one in named.items()}
        programs["jax dense"] = (all_products(jnp.dot), x, kernels)
        calls, failed = compiled(programs)
        errors = {
            name: gpu_checks.units(call()[0], x[0], packed[0]) for name, call in calls.items()
        }
        calls = {
            name: call for name, call in calls.items() if name == "jax dense" or errors[name] < 1
        }
        if torch_call:
            with reported(f"torch, {n} x {m} x {k}"):
                one = torch_call(x)
                one()
                calls["torch semi-structured"] = one
        calls = {name: functools.partial(launched, call, launches) for name, call in calls.items()}
        seconds = timing.in_turns(calls, rounds, f"{n} x {m} x {k}")
        medians = {
            name: float(np.median(times)) / (launches * count) for name, times in seconds.items()
        }
        yield n, medians, errors, failed


def launched(call, times):
    for _ in range(times - 1):
        call()
    return call()


@contextlib.contextmanager
def reported(label):
    """Prints an error of torch, such as an unsupported shape; it is only a reference."""
    try:
        yield
    except Exception as error:
        print(f"{label}: {type(error).__name__}: {error}"[:300], flush=True)


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
        every = jax.jit(lambda ct, w: [one(*pair) for pair in zip(ct, w, strict=True)])
        return every, ct, weights

    programs = {name: all_products(x_gradient(name), packed) for name in names}
    programs |= {f"{name}, turned before": all_products(product(name), backwards) for name in names}
    programs["turning"] = all_products(lambda _, w: turned(w), packed)
    programs["decompressing"] = all_products(x_gradient("dense"), packed)
    programs["jax dense"] = all_products(lambda ct, w: ct @ w.T, kernels)
    calls, failed = compiled(programs)
    if failed:
        raise RuntimeError(str(failed))
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
    """A function that maps a list of weights to one of a list of x, to a call of all products.

    If there is none, the second result is the reason.
    """
    try:
        torch = importlib.import_module("torch")
        semi = torch.sparse.to_sparse_semi_structured
        if not torch.cuda.is_available():
            return None, "torch sees no GPU"
    except Exception as error:  # torch may be installed without the libraries that it needs
        return None, f"{type(error).__name__}: {error}"

    def prepare(kernels):
        weights = [semi(torch.from_dlpack(w).T.contiguous()) for w in kernels]

        def products(x):
            x = [torch.from_dlpack(a) for a in x]

            def call():
                for i, a in enumerate(x):
                    torch.nn.functional.linear(a, weights[i % len(weights)])
                return SimpleNamespace(block_until_ready=torch.cuda.synchronize)

            return call

        return products

    return prepare, None


def variants(name, n, m, k, configs, rounds):
    """Times a kernel under each configuration, given as keyword arguments, as `turns` does."""
    kernel = KERNELS[name].module
    cores = getattr(jax.devices()[0], "core_count", 1)

    def under(config):
        one = functools.partial(kernel.matmul, config=kernel.Config(**config), cores=cores)
        return lambda x, w: one(x, w.values, w.metadata)

    competitors = {n: {str(config): under(config) for config in configs}}
    ((_, seconds, errors, failed),) = turns(m, k, competitors, rounds)
    timed = [
        {"config": config, "microseconds": 1e6 * seconds.get(config, np.nan), "error": error}
        for config, error in errors.items()
    ]
    return timed + [{"config": config, "why": why} for config, why in failed.items()]


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
        "--seconds", type=float, default=510, help="after which no further shape is timed"
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

        def tell(part):
            print(json.dumps(part) + "\n", end="", flush=True)  # in one piece, from any thread

        tell(examined(args.check, *some, tell))
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
    write = functools.partial(timing.write, file, folder)

    folder.mkdir(parents=True, exist_ok=True)
    one_check = (
        functools.partial(examined, shapes=some[0], rows=some[1])
        if args.smoke
        else functools.partial(examined_apart, seconds=args.seconds / 3)
    )
    with ThreadPoolExecutor() as pool:
        seen = dict(zip(KERNELS, pool.map(one_check, KERNELS), strict=True))
    if args.smoke and not any(one["right"] for one in seen.values()):
        seen["dense"] = examined("dense", *some)
    report = {"checks": seen}
    write(**report)
    for name, one in seen.items():
        print(
            name, "is right" if one["right"] else f"IS NOT RIGHT: {one.get('why', one)}", flush=True
        )
    names = [name for name in seen if seen[name]["right"]]

    prepare_torch, why_no_torch = torch_products()
    peaks = next((peak for kind, peak in PEAKS.items() if kind in device.device_kind), None)
    report |= {
        "torch": why_no_torch or "timed",
        "weights once": [],
        "variants": {},
        "gradients": [],
        "timings": [],
        "wrong": [],
        "left_out": [],
        "failed": {},
        "choices": [],
    }

    def time_weights():
        report["weights once"] = weights_once(256 if args.smoke else 16384, rounds)

    def time_variants(name, product):
        report["variants"][f"{name}, {' x '.join(map(str, product))}"] = variants(
            name, *product, KERNELS[name].configs[product], rounds
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
        report["gradients"].append(
            {"shape": shape, "rows": n, **{name: 1e6 * t for name, t in seconds.items()}}
        )

    def time_products(shape):
        results = turns(
            *shapes[shape],
            {n: {name: product(name) for name in able(n)} for n in rows},
            rounds,
            prepare_torch,
            (0, 0) if args.smoke else EACH_CALL,
        )
        for n, seconds, errors, failed in results:
            report["timings"].append(gpu_report.row(shape, n, *shapes[shape], seconds, peaks))
            report["failed"] |= {f"{name}, {shape}, {n} rows": why for name, why in failed.items()}
            report["wrong"] += [
                {"shape": shape, "rows": n, "kernel": name, "error": error}
                for name, error in errors.items()
                if not error < 1
            ]
            write(**report)  # in case of a crash

    # in case time runs out, the most informative come first
    first, others = list(shapes)[:6], list(shapes)[6:]
    jobs = {
        f"variants of {name} at {n} x {m} x {k}": functools.partial(time_variants, name, (n, m, k))
        for name in names
        if name in KERNELS and not args.smoke
        for n, m, k in KERNELS[name].configs
    }
    jobs |= {shape: functools.partial(time_products, shape) for shape in first}
    jobs["masks and packing"] = time_weights
    jobs |= {
        f"gradient of {shape}": functools.partial(time_gradients, shape, max(rows))
        for shape in (["small"] if args.smoke else GRADIENTS)
    }
    jobs |= {shape: functools.partial(time_products, shape) for shape in others}
    for name, job in jobs.items():
        if time.monotonic() - start > args.seconds:
            report["left_out"].append(name)
            continue
        try:
            job()
        except Exception as error:  # the others continue
            report["failed"][name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{name} failed: {report['failed'][name]}", flush=True)
        write(**report)

    capability = tuple(
        int(part) for part in str(getattr(device, "compute_capability", "0.0")).split(".")
    )
    report["choices"] = gpu_report.choices(report["timings"], report["wrong"], capability)
    tables = [
        tabulate.tabulate(report[part], "keys", floatfmt=".2f")
        for part in ("weights once", "gradients")
    ]
    print(gpu_report.table(report["timings"]), *tables, sep="\n\n", end="\n\n")
    print("_PREFERENCES that these timings imply:", *report["choices"], sep="\n")
    if report["wrong"]:
        print("WRONG:", *report["wrong"], sep="\n")
    timing.save(file, folder, **report)
    gpu_report.plot(report["timings"], device.device_kind, folder / f"{file}.png")


if __name__ == "__main__":
    main()
