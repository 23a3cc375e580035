"""The parts of Pallas for Mosaic GPU that kernels need, for every supported version of jax.

Importing this module imports Pallas, so it is only imported when lowering for CUDA.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import core, mma_utils, utils
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, nvvm, vector

__all__ = [
    "add",
    "architecture",
    "arith",
    "asm",
    "constant",
    "fragments",
    "gpu",
    "ir",
    "kernel",
    "llvm",
    "load",
    "memref",
    "mma_sp",
    "mma_utils",
    "nvvm",
    "padded",
    "utils",
    "vector",
    "wait_copies",
]

VERSION = jax.__version_info__[:2]
# waits for the asynchronous copies of GPUs before Hopper; available from jax 0.11
wait_copies = getattr(plgpu, "wait_gmem_to_smem", None)


def kernel(body: Any, name: str, out: Any, **params: Any) -> Any:
    """`plgpu.kernel` with one output and lane semantics, as inline assembly requires.

    The name appears in the lowered program. `tanh` is the approximate instruction, exact to 11
    bits, which is sufficient for a 16-bit result.
    """
    output = "out_type" if VERSION >= (0, 11) else "out_shape"
    compiler = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
    )
    return plgpu.kernel(body, **{output: out}, kernel_name=name, compiler_params=compiler, **params)


def padded(x: Any, values: Any, multiple: int) -> Any:
    """Pads x `[N, K]` and values `[M, K/2]` with zeros to a multiple of the contraction.

    This copies them unless K already is a multiple.
    """
    spare = -x.shape[1] % multiple
    return (
        (jnp.pad(x, ((0, 0), (0, spare))), jnp.pad(values, ((0, 0), (0, spare // 2))))
        if spare
        else (x, values)
    )


@contextlib.contextmanager
def architecture(capability: tuple[int, int]) -> Any:
    """Lowers for a compute capability; by default Mosaic uses that of the default device."""
    modules: list[Any] = [module for module in (core, utils) if hasattr(module, "_infer_arch")]
    before = [module._infer_arch for module in modules]
    for module in modules:
        module._infer_arch = lambda: capability
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module._infer_arch = old


def load(ref, layout):
    """`plgpu.load` of a whole reference, in any layout."""
    where = ((),) if VERSION < (0, 11) else ()
    return plgpu.load(ref, *where, layout=layout, optimized=False)


def constant(value: int, bits: int = 32) -> Any:
    """An integer constant of MLIR."""
    return utils.c(value, ir.IntegerType.get_signless(bits))


def asm(results: Any, text: str, constraints: str, operands: Any, *, side_effects: bool) -> Any:
    """Emits inline PTX and returns a list with one value for each MLIR type in `results`."""
    kind = llvm.StructType.get_literal(results) if len(results) > 1 else results[0]
    out: Any = llvm.inline_asm(
        kind, operands, text, constraints, asm_dialect=0, has_side_effects=side_effects
    )
    return (
        [llvm.extractvalue(result, out, [i]) for i, result in enumerate(results)]
        if len(results) > 1
        else [out]
    )


def add(*terms):
    """The sum of MLIR integers of 32 bits."""
    total, *rest = terms
    for term in rest:
        total = arith.addi(total, constant(term) if isinstance(term, int) else term)
    return total


def mma_sp(total: Any, a: Any, b: Any, word: Any, selector: int, dtype: str) -> Any:
    """Emits one `mma.sp` m16n8k32 for each warp of a warpgroup.

    Args:
      total: float32 `[64, 8]` in the layout of wgmma: 16 rows for each of four warps.
      a: 4 registers, the lane's part of 16 by 16 compressed values.
      b: 4 registers, its part of 32 by 8.
      word: its metadata.
      selector: which lanes of each quad supply their metadata, 0 for the first two and 1 for the
        last two.
      dtype: `"bf16"` or `"f16"`.

    Returns:
      The new total.
    """
    sums = [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for register in total.registers.flat
        for i in range(2)
    ]
    names = [f"${i}" for i in range(17)]
    d, a_names, b_names, c = (f"{{{','.join(names[i : i + 4])}}}" for i in range(0, 16, 4))
    instruction = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32"
    text = f"{instruction} {d}, {a_names}, {b_names}, {c}, $16, {selector};"
    constraints = ",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4 + ["r"])
    sums = asm([ir.F32Type.get()] * 4, text, constraints, [*a, *b, *sums, word], side_effects=False)
    registers = np.empty(total.registers.shape, object)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers.flat[:] = [vector.from_elements(pair, sums[i : i + 2]) for i in (0, 2)]
    return fragments.FragmentedArray(
        _registers=registers, _layout=total.layout, _is_signed=total.is_signed
    )
