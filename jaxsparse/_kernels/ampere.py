"""2:4 product for Ampere and Ada: `mma.sp` fed by asynchronous copies through shared memory.

One warpgroup computes one output tile of `tile_m` output features by 64 rows of x. The first
operand must be the sparse one, the weight, so the accumulators hold the transposed tile, which is
transposed back through shared memory. Each of the four warps owns 16 rows of every 64, which
matches the layout of the metadata, and all 64 columns.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, PyTree, UInt32

from jaxsparse._checks import AnArray
from jaxsparse._kernels import ACTIVATIONS
from jaxsparse._kernels.mosaic import (
    add,
    arith,
    asm,
    constant,
    ir,
    kernel,
    llvm,
    load,
    memref,
    mma_sp,
    padded,
    utils,
    wait_copies,
)

__all__ = ["Config", "matmul"]

TILE_N, TILE_K = 64, 64
VALUES_TILING = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
TILING = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Config:
    """The parameters to tune.

    Attributes:
      tile_m: output features in a tile, 128 or 256; 256 halves the traffic of x and takes twice the
        registers.
      stages: the number of steps of 64 of the contraction in shared memory.
    """

    tile_m: int = 128
    stages: int = 3


class Ops(NamedTuple):
    """The operations that need a GPU; interpret mode replaces them by arithmetic on arrays.

    Attributes:
      fetch: starts the copy of a slice from global memory to shared memory.
      wait: waits until at most a given number of copies are pending.
      step: maps the accumulator `[tile_m, 64]`, and values `[tile_m, 32]`, x `[64, 64]` and
        metadata `[tile_m / 64, 128]` in shared memory, to the new accumulator.
      sync: waits for all threads of the warpgroup.
      store: writes a tile of y, `[64, 64]` in shared memory, to a slice of y.
    """

    fetch: object
    wait: object
    step: object
    sync: object
    store: object


def _load_matrices(address):
    """`ldmatrix`: four 8 by 8 matrices of 16-bit elements; lanes hold the addresses of rows."""
    i32 = ir.IntegerType.get_signless(32)
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
    return asm([i32] * 4, text, "=r,=r,=r,=r,r,~{memory}", [address], side_effects=True)


def _swizzled(row, chunk, row_bytes):
    """The address of a 16-byte chunk in a tile whose rows of 64 or 128 bytes are swizzled."""
    key = (
        arith.andi(row, constant(7))
        if row_bytes == 128
        else arith.andi(arith.shrui(row, constant(1)), constant(3))
    )
    return add(
        arith.muli(row, constant(row_bytes)), arith.shli(arith.xori(chunk, key), constant(4))
    )


def _multiply(total, values, x, metadata):
    """One step of 64 of the contraction: two instructions deep, each with half of the metadata."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    dtype = str(ir.MemRefType(values.type).element_type)
    subtiles = total.shape[0] // 64
    thread = arith.remui(utils.thread_idx(), constant(128))
    warp, within = arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))
    values, x = (llvm.ptrtoint(i32, utils.memref_ptr(ref)) for ref in (values, x))
    words = [
        memref.load(metadata, [utils.c(s, index), arith.index_cast(index, thread)])
        for s in range(subtiles)
    ]
    # the four matrices of values are 8 rows, then 8 columns apart; those of x 8 columns
    values_row = add(arith.muli(warp, constant(16)), arith.andi(within, constant(15)))
    x_row, x_chunk = arith.andi(within, constant(7)), arith.shrui(within, constant(3))
    total = total.copy()
    for half in range(2):
        values_at = add(
            values, _swizzled(values_row, add(arith.shrui(within, constant(4)), 2 * half), 64)
        )
        x_at = add(x, _swizzled(x_row, add(x_chunk, 4 * half), 128))
        a = [_load_matrices(add(values_at, s * 64 * 64)) for s in range(subtiles)]
        for column in range(0, TILE_N, 8):
            b = _load_matrices(add(x_at, column * 128))
            for s in range(subtiles):
                at = slice(64 * s, 64 * s + 64), slice(column, column + 8)
                total[at] = mma_sp(total[at], a[s], b, words[s], half, dtype)
    return total


def _store(tile, y):
    """Copies a tile to y; each thread moves four 16-byte chunks, 8 neighbouring threads a row."""
    i8, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 64))
    chunk_type = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    row_bytes = 2 * ir.MemRefType(y.type).get_strides_and_offset()[0][0]
    tile, y = utils.memref_ptr(tile), utils.memref_ptr(y)
    thread = arith.remui(utils.thread_idx(), constant(128))
    chunk = arith.andi(thread, constant(7))
    for first in range(0, TILE_N, 16):
        row = add(arith.shrui(thread, constant(3)), first)
        value = llvm.load(
            chunk_type, utils.getelementptr(tile, [_swizzled(row, chunk, 128)], i8), alignment=16
        )
        to = arith.extui(i64, row)
        to = arith.addi(
            arith.muli(to, constant(row_bytes, 64)),
            arith.extui(i64, arith.shli(chunk, constant(4))),
        )
        llvm.store(value, utils.getelementptr(y, [to], i8), alignment=16)


def registers(config: Config) -> Ops:
    """The operations as they run on a GPU."""
    shape = (config.tile_m, TILE_N)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            plgpu.RefType(VALUES_TILING),
            plgpu.RefType(TILING),
            plgpu.RefType(),
        ),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def step(_, total, values, x, metadata):
        return _multiply(total, values, x, metadata)

    @plgpu.inline_mgpu()
    def sync(_):
        utils.warpgroup_barrier()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILING), plgpu.RefType()))
    def store(_, tile, y):
        _store(tile, y)

    fetch = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
    return Ops(fetch, wait_copies, step, sync, store)


def _body(
    x_ref: Any,
    values_ref: Any,
    metadata_ref: Any,
    *rest: PyTree,
    config: Config,
    activation: Any,
    ops: Any,
) -> None:
    *bias_ref, y_ref = rest
    dtype, stages, subtiles = x_ref.dtype, config.stages, config.tile_m // 64
    steps = x_ref.shape[1] // TILE_K
    fetch, wait, step, sync, store = ops(config)
    m0, n0 = lax.axis_index("m") * config.tile_m, lax.axis_index("n") * TILE_N

    @functools.partial(
        pl.run_scoped,
        values=plgpu.SMEM((stages, config.tile_m, TILE_K // 2), dtype, transforms=VALUES_TILING),
        x=plgpu.SMEM((stages, TILE_N, TILE_K), dtype, transforms=TILING),
        metadata=plgpu.SMEM((stages, subtiles, 128), jnp.uint32),
        out=plgpu.SMEM((TILE_N, 64), dtype, transforms=TILING),
    )
    def _(values, x, metadata, out):
        def produce(i):
            """Starts the copies of step i; a step beyond the last loads the last one again.

            The number of pending copies then always determines which steps have arrived.
            """
            slot, i = lax.rem(i, stages), jnp.minimum(i, steps - 1)
            fetch(
                values_ref.at[pl.ds(m0, config.tile_m), pl.ds(i * (TILE_K // 2), TILE_K // 2)],
                values.at[slot],
            )
            fetch(x_ref.at[pl.ds(n0, TILE_N), pl.ds(i * TILE_K, TILE_K)], x.at[slot])
            for s in range(subtiles):
                fetch(metadata_ref.at[lax.div(m0, 64) + s, i], metadata.at[slot, s])

        for i in range(stages - 1):
            produce(jnp.int32(i))

        def advance(i, total):
            wait((2 + subtiles) * (stages - 2))
            # now all copies of this step have arrived, and the slot filled next has been read
            sync()
            produce(i + stages - 1)
            slot = lax.rem(i, stages)
            return step(total, values.at[slot], x.at[slot], metadata.at[slot])

        zeros = plgpu.layout_cast(
            jnp.zeros((config.tile_m, TILE_N), jnp.float32), plgpu.Layout.WGMMA
        )
        total = lax.fori_loop(0, steps, advance, zeros)
        wait(0)
        for s in range(subtiles):
            result = total[64 * s : 64 * s + 64]
            if bias_ref:
                bias = load(bias_ref[0].at[pl.ds(m0 + 64 * s, 64)], plgpu.Layout.WGMMA.reduce(1))
                result = result + lax.broadcast_in_dim(bias, result.shape, [0])
            result = ACTIVATIONS[activation](result).astype(dtype)
            sync()
            out.transpose((1, 0))[...] = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
            sync()
            store(out, y_ref.at[pl.ds(n0, TILE_N), pl.ds(m0 + 64 * s, 64)])


def matmul(
    x: Float[AnArray, "N K"],
    values: Float[AnArray, "M K//2"],
    metadata: UInt32[AnArray, "2*((M+127)//128) 2*((K+127)//128) 128"],
    bias: Float[AnArray, " M"] | None = None,
    *,
    activation: str | None = None,
    config: Config | None = None,
    cores: int = 108,
    ops: Any = registers,
    **params: Any,
) -> Float[Array, "N M"]:
    """`activation(x @ W.T + bias)`, where W is given by its compressed values and metadata.

    Args:
      x: `[N, K]`, bfloat16 or float16. N and K are padded to multiples of 64, which copies x, and
        also values if K is not a multiple.
      values: `[M, K/2]` of the same dtype. M is padded to a multiple of 128, which copies values
        and the result.
      metadata: uint32 in the layout `"mma16"`.
      bias: float32 `[M]` or None.
      activation: a name in `ACTIVATIONS`.
      config: None chooses by N and M.
      cores: the number of multiprocessors of the device.
      ops: a function from a `Config` to the operations that need a GPU.
      **params: further arguments of `plgpu.kernel`, such as `interpret`.

    Returns:
      `[N, M]` in the dtype of x.
    """
    rows, features = x.shape[0], values.shape[0]
    n, m = rows + -rows % TILE_N, features + -features % 128
    x, values = padded(x, values, TILE_K)
    x, values = (jnp.pad(a, ((0, size - a.shape[0]), (0, 0))) for a, size in ((x, n), (values, m)))
    if bias is not None:
        bias = jnp.pad(bias, (0, m - features))
    config = config or default_config(n, m, cores)
    call = kernel(
        functools.partial(_body, config=config, activation=activation, ops=ops),
        "sparse_matmul_ampere",
        jax.ShapeDtypeStruct((n, m), x.dtype),
        grid=(n // TILE_N, m // config.tile_m),
        grid_names=("n", "m"),
        **params,
    )
    return call(x, values, metadata, *(() if bias is None else (bias,)))[:rows, :features]


def default_config(n: int, m: int, cores: int) -> Config:
    """The large tile if there are enough of them to give every multiprocessor two."""
    return Config(256 if m % 256 == 0 and (n // TILE_N) * (m // 256) >= 2 * cores else 128)
