"""Lowers `sparse_matmul` for GPUs that are not there and prints, as JSON, which kernel was chosen or why none could be.

With the name of a case, compiles that one. Run by `aot.in_process`.
"""

import functools
import json
import sys

import aot
import jax
import jax.numpy as jnp

import jaxsparse as js

# name: gpu, N, M, K, keyword arguments, layout, dtype
CASES = {
    "decode, many weights": ("h200", 16, 14336, 4096, {}, "mma16", "bfloat16"),
    "decode on Ampere": ("a100", 1, 14336, 4096, {}, "mma16", "float16"),
    "decode, few weights": ("h200", 16, 4096, 4096, {}, "mma16", "bfloat16"),
    "prefill": ("h200", 8192, 4096, 4096, {}, "mma16", "bfloat16"),
    "prefill with bias": ("h200", 4096, 4096, 4096, {"bias": True, "activation": "gelu"}, "mma16", "bfloat16"),
    "prefill on Ampere": ("a100", 8192, 4096, 4096, {}, "mma16", "bfloat16"),
    "between": ("h200", 512, 4096, 4096, {}, "mma16", "bfloat16"),
    "float32": ("h200", 8192, 4096, 4096, {}, "canonical", "float32"),
    "canonical metadata": ("h200", 8192, 4096, 4096, {}, "canonical", "bfloat16"),
    "a weight that would be copied": ("h200", 8192, 4104, 4100, {}, "mma16", "bfloat16"),
    "a result that would be copied": ("h200", 8192, 4101, 4096, {}, "mma16", "bfloat16"),
    "sizes that fill no tile": ("h200", 4099, 4104, 4112, {}, "mma16", "bfloat16"),
    "forced on a weight that is copied": ("h200", 13, 77, 84, {"implementation": "hopper"}, "canonical", "bfloat16"),
    "forced dense": ("h200", 8192, 4096, 4096, {"implementation": "dense"}, "mma16", "bfloat16"),
    "forced hopper": ("h200", 5, 128, 64, {"implementation": "hopper"}, "canonical", "bfloat16"),
    "forced decode": ("h200", 5, 128, 64, {"implementation": "decode"}, "mma16", "bfloat16"),
    "forced ampere": ("a100", 5, 128, 64, {"implementation": "ampere"}, "mma16", "bfloat16"),
    "hopper on Ampere": ("a100", 5, 128, 64, {"implementation": "hopper"}, "mma16", "bfloat16"),
    "ampere on Hopper": ("h200", 5, 128, 64, {"implementation": "ampere"}, "mma16", "bfloat16"),
    "decode forced on Ampere": ("a100", 5, 128, 64, {"implementation": "decode"}, "mma16", "bfloat16"),
}


def arguments(n, m, k, layout, dtype):
    words = (-(-m // 128) * 2, -(-k // 128) * 2, 128) if layout == "mma16" else (m, -(-k // 16))
    words = words, jnp.uint32 if layout == "mma16" else jnp.uint16
    return [((n, k), dtype), ((m, k // 2), dtype), words]


def product(x, values, metadata, *bias, m, k, layout, **options):
    w = js.Sparse24(values, metadata, (k,), (m,), layout=layout)
    return js.sparse_matmul(x, w, bias=bias[0] if bias else None, **options)


def lower(gpu, n, m, k, options, layout, dtype):
    options = dict(options)
    shapes = arguments(n, m, k, layout, dtype) + [((m,), jnp.float32)] * options.pop("bias", False)
    sharding = jax.sharding.SingleDeviceSharding(aot.device(gpu))
    structs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    function = functools.partial(product, m=m, k=k, layout=layout, **options)
    return jax.jit(function).trace(*structs).lower(lowering_platforms=("cuda",))


def found(*case):
    try:
        text = lower(*case).as_text()
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    shown = [name for name in js.kernels.KERNELS if f"sparse_matmul_{name}" in text]
    return " and ".join(shown + ["dense"] * ("dot_general" in text))


if __name__ == "__main__":
    if sys.argv[1:]:
        lower(*CASES[sys.argv[1]]).compile()
    else:
        print("\n" + json.dumps({name: found(*case) for name, case in CASES.items()}))
