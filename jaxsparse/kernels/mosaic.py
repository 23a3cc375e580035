"""What the kernels need of Pallas for Mosaic GPU, in one spelling for every supported version of jax.

Importing this module imports Pallas, so only a lowering for CUDA does it.
"""

from typing import Any

import jax
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, nvvm

__all__ = ["arith", "asm", "constant", "fragments", "gpu", "ir", "kernel", "llvm", "load", "memref", "mma_utils", "nvvm", "utils"]

VERSION = jax.__version_info__[:2]


def kernel(body, out, **params):
    """`plgpu.kernel` with one output, in the semantics in which inline assembly sees the registers of each lane.

    `tanh` is the instruction, exact to 11 bits, which is what a 16-bit result keeps.
    """
    name = "out_type" if VERSION >= (0, 11) else "out_shape"
    compiler = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True)
    return plgpu.kernel(body, **{name: out}, compiler_params=compiler, **params)


def load(ref, layout):
    """`plgpu.load` of a whole reference, in any layout."""
    where = ((),) if VERSION < (0, 11) else ()
    return plgpu.load(ref, *where, layout=layout, optimized=False)


def constant(value: int, bits: int = 32):
    """An integer constant of MLIR."""
    return utils.c(value, ir.IntegerType.get_signless(bits))


def asm(results, text: str, constraints: str, operands, *, side_effects: bool):
    """Inline PTX; `results` are MLIR types, and a list of as many values comes back."""
    kind = llvm.StructType.get_literal(results) if len(results) > 1 else results[0]
    out: Any = llvm.inline_asm(kind, operands, text, constraints, asm_dialect=0, has_side_effects=side_effects)
    return [llvm.extractvalue(result, out, [i]) for i, result in enumerate(results)] if len(results) > 1 else [out]
