"""Lowers `sparse_matmul` for absent GPUs and prints, as JSON, the chosen kernels or the reasons.

With the name of a case as argument, compiles that case. Run by `aot.in_process`.
"""

import functools
import json
import re
import sys

import aot
import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxsparse as js
from jaxsparse import _kernels as kernels

# invented rows; the library's own table has only rows that `benchmarks/gpu.py` printed
PREFERENCES = (
    (((8, 0), (9, 0)), "decode", 1, 16, 14336 * 4096, 4096),
    (((9, 0),), "hopper", 4096, 1 << 31, 4096 * 4096, 4096),
)
# name: gpu, N, M, K, keyword arguments, layout, dtype
CASES = {
    "decode, many weights": ("h200", 16, 14336, 4096, {}, "mma16", "bfloat16"),
    "decode on Ampere": ("a100", 1, 14336, 4096, {}, "mma16", "float16"),
    "decode, few weights": ("h200", 16, 4096, 4096, {}, "mma16", "bfloat16"),
    "prefill": ("h200", 8192, 4096, 4096, {}, "mma16", "bfloat16"),
    "prefill with bias": (
        "h200",
        4096,
        4096,
        4096,
        {"bias": True, "activation": "gelu"},
        "mma16",
        "bfloat16",
    ),
    "prefill on Ampere": ("a100", 8192, 4096, 4096, {}, "mma16", "bfloat16"),
    "between": ("h200", 512, 4096, 4096, {}, "mma16", "bfloat16"),
    "float32": ("h200", 8192, 4096, 4096, {}, "canonical", "float32"),
    "canonical metadata": ("h200", 8192, 4096, 4096, {}, "canonical", "bfloat16"),
    "a weight that would be copied": ("h200", 8192, 4104, 4100, {}, "mma16", "bfloat16"),
    "a result that would be copied": ("h200", 8192, 4101, 4096, {}, "mma16", "bfloat16"),
    "sizes that fill no tile": ("h200", 4099, 4104, 4112, {}, "mma16", "bfloat16"),
    "forced on a weight that is copied": (
        "h200",
        13,
        77,
        84,
        {"implementation": "hopper"},
        "canonical",
        "bfloat16",
    ),
    "forced dense": ("h200", 8192, 4096, 4096, {"implementation": "dense"}, "mma16", "bfloat16"),
    "forced hopper": ("h200", 5, 128, 64, {"implementation": "hopper"}, "canonical", "bfloat16"),
    "forced decode": ("h200", 5, 128, 64, {"implementation": "decode"}, "mma16", "bfloat16"),
    "forced ampere": ("a100", 5, 128, 64, {"implementation": "ampere"}, "mma16", "bfloat16"),
    "hopper on Ampere": ("a100", 5, 128, 64, {"implementation": "hopper"}, "mma16", "bfloat16"),
    "ampere on Hopper": ("h200", 5, 128, 64, {"implementation": "ampere"}, "mma16", "bfloat16"),
    "decode forced on Ampere": (
        "a100",
        5,
        128,
        64,
        {"implementation": "decode"},
        "mma16",
        "bfloat16",
    ),
    "gradient": (
        "h200",
        4096,
        4096,
        8192,
        {"gradient": True, "transposable": True},
        "mma16",
        "bfloat16",
    ),
    "gradient, sparse along one axis": (
        "h200",
        4096,
        4096,
        8192,
        {"gradient": True},
        "mma16",
        "bfloat16",
    ),
    "gradient by decode": (
        "h200",
        8,
        4096,
        14336,
        {"gradient": True, "transposable": True},
        "mma16",
        "float16",
    ),
    "gradient of forced hopper": (
        "h200",
        5,
        128,
        64,
        {"gradient": True, "transposable": True, "implementation": "hopper"},
        "canonical",
        "bfloat16",
    ),
    "gradient of sizes that are padded": (
        *("h200", 5, 132, 68, {"gradient": True, "transposable": True, "implementation": "hopper"}),
        *("mma16", "bfloat16"),
    ),
    "gradient with activation": (
        *(
            "h200",
            4096,
            4096,
            4096,
            {"gradient": True, "transposable": True, "bias": True, "activation": "gelu"},
        ),
        *("mma16", "bfloat16"),
    ),
    "stack": (
        "h200",
        4096,
        4096,
        8192,
        {"stack": (3, 2), "implementation": "hopper"},
        "mma16",
        "bfloat16",
    ),
    "stack, none named": ("h200", 4096, 4096, 8192, {"stack": (3,)}, "mma16", "bfloat16"),
    "gradient of a stack": (
        *(
            "h200",
            4096,
            4096,
            8192,
            {"stack": (3,), "gradient": True, "transposable": True, "implementation": "hopper"},
        ),
        *("mma16", "bfloat16"),
    ),
}


def arguments(n, m, k, layout, dtype, stack):
    words = (-(-m // 128) * 2, -(-k // 128) * 2, 128) if layout == "mma16" else (m, -(-k // 16))
    words = (*stack, *words), jnp.uint32 if layout == "mma16" else jnp.uint16
    return [((*stack, n, k), dtype), ((*stack, m, k // 2), dtype), words]


def product(x, values, metadata, *bias, m, k, layout, transposable, **options):
    w = js.Sparse24(values, metadata, (k,), (m,), layout=layout, transposable=transposable)
    return js.sparse_matmul(x, w, bias=bias[0] if bias else None, **options)


def loss(function, *arguments):
    """A loss whose gradient also needs the output of the function."""
    return jnp.sin(function(*arguments).astype(jnp.float32)).sum()


def lower(gpu, n, m, k, options, layout, dtype):
    options = {"stack": (), "transposable": False, "bias": False, "gradient": False, **options}
    stack = options.pop("stack")
    shapes = arguments(n, m, k, layout, dtype, stack) + [((*stack, m), jnp.float32)] * options.pop(
        "bias"
    )
    gradient = options.pop("gradient")
    function = functools.partial(product, m=m, k=k, layout=layout, **options)
    return lower_for(
        gpu,
        jax.grad(functools.partial(loss, function)) if gradient else function,
        *(jax.ShapeDtypeStruct(*a) for a in shapes),
    )


def lower_for(gpu, function, *arguments):
    sharding = jax.sharding.SingleDeviceSharding(aot.device(gpu))
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], dtype=x.dtype, param_dtype=x.dtype)(x), None


def lower_scanned_layers(**options):
    """Lowers the gradient of the input of three layers under `nn.scan`."""
    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    plan = js.flax.plan(model, {"*kernel": js.TransposableNM(2, 4)}, x, None)

    def packed(key, x):
        params = model.init(key, x, None)
        return js.compress(params, js.magnitude_masks(params, plan), plan, layout="mma16")

    def function(x, params):
        with js.flax.intercept(**options):
            return model.apply(params, x, None)[0]

    return lower_for(
        "h200",
        jax.grad(functools.partial(loss, function)),
        x,
        jax.eval_shape(packed, jax.random.key(0), x),
    )


def products(lowered, *case):
    """The kernels of the program, in order, and whether there is a dense product."""
    try:
        text = lowered(*case).as_text()
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return " and ".join(
        [re.search(r"sparse_matmul_(\w+?)_mosaic_gpu", line)[1] for line in calls]
        + ["dense"] * ("dot_general" in text)
    )


if __name__ == "__main__":
    kernels._PREFERENCES = PREFERENCES
    if sys.argv[1:]:
        lower(*CASES[sys.argv[1]]).compile()
    else:
        results = {name: products(lower, *case) for name, case in CASES.items()}
        results["gradient of scanned layers"] = products(lower_scanned_layers)
        kernels._PREFERENCES = ()
        results |= {
            f"{name}, nothing measured": products(lower, *CASES[name])
            for name in ("prefill", "decode, many weights", "forced hopper")
        }
        for implementation in ("hopper", "decode", "dense"):
            named = functools.partial(lower_scanned_layers, implementation=implementation)
            results[f"gradient of scanned layers, {implementation} named"] = products(named)
        print("\n" + json.dumps(results))
