"""Compiles masks for an absent GPU and prints, as JSON, the operations of the programs.

Run by `aot.in_process`.
"""

import json
import re

import aot
import jax
import jax.numpy as jnp

import jaxsparse as js

PATTERNS = {
    "2:4": js.NM(2, 4, axis=0),
    "4:8": js.NM(4, 8, axis=1),
    "1:16": js.NM(1, 16, axis=1),
    "2:16": js.NM(2, 16, axis=0),
    "2:4 both axes": js.TransposableNM(2, 4, axes=(0, 1)),
}
SHAPE = (4096, 4096)


def readers(pattern):
    """The operations of the compiled program, and which of them read the weights."""
    plan = js.plan({"w": jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)}, {"w": pattern})
    program = (
        aot.lower(
            lambda w: js.magnitude_masks({"w": w}, plan)["w"], [(SHAPE, jnp.bfloat16)], "h200"
        )
        .compile()
        .as_text()
    )
    operations = re.findall(
        r"^  .*?%?(\S+) = .*? ([a-z-]+)\((.*?)\)", program[program.index("\nENTRY") :], re.M
    )
    weights = {name for name, kind, _ in operations if kind == "parameter"}
    for name, kind, operands in operations:  # a bitcast only changes the shape of the weights
        if kind == "bitcast" and weights & set(re.findall(r"[\w.-]+", operands)):
            weights.add(name)
    readers = [
        kind
        for _, kind, operands in operations
        if weights & set(re.findall(r"[\w.-]+", operands)) and kind != "bitcast"
    ]
    return {"kinds": sorted({kind for _, kind, _ in operations}), "readers": readers}


if __name__ == "__main__":
    print(json.dumps({name: readers(pattern) for name, pattern in PATTERNS.items()}))
