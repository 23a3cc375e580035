"""Compiles products on four absent GPUs; prints, as JSON, what each runs and what it receives.

Run by `aot.in_process`.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

N, M, K = 8192, 1024, 512
# how x and the weight are divided, and what is passed to `sparse_matmul`
CASES = {
    "weights divided along the output": (P("x"), P("x"), {"implementation": "hopper"}),
    "output features on each device": (P(), P("x"), {"implementation": "hopper"}),
    "a divided contraction": (P(None, "x"), P(None, "x"), {"implementation": "hopper"}),
    "dense": (P("x"), P("x"), {"implementation": "dense"}),
}


def compiled(mesh, x_spec, w_spec, **options):
    def product(x, values, metadata, bias):
        w = js.Sparse24(values, metadata, (K,), (M,), layout="mma16")
        return js.sparse_matmul(x, w, bias=bias, activation="gelu", **options)

    arguments = [
        ((N, K), jnp.bfloat16, x_spec),
        ((M, K // 2), jnp.bfloat16, w_spec),
        ((M // 64, K // 64, 128), jnp.uint32, w_spec),
        ((M,), jnp.float32, P(*w_spec[:1])),
    ]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    lowered = jax.jit(product).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile().as_text()


if __name__ == "__main__":
    description = (pathlib.Path(__file__).parent / "devices" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x4", target_config=description
    )
    mesh = Mesh(np.array(topology.devices), ("x",))
    by_case = {}
    for name, (x_spec, w_spec, options) in CASES.items():
        text = compiled(mesh, x_spec, w_spec, **options)
        gathers = re.findall(r"= (.+) all-gather(?:-done)?\(", text)
        by_case[name] = {
            "kernels": text.count('custom_call_target="mosaic_gpu'),
            "received": re.findall(r"\w+\[[\d,]+\]", " ".join(gathers)),
            "summed": len(re.findall(r" all-reduce(?:-done)?\(", text)),
        }
    print("\n" + json.dumps(by_case))
