"""2:4 product for Hopper: `wgmma.mma_async.sp` fed by TMA through a ring in shared memory.

One block stays on each multiprocessor and walks over output tiles of 128 output features by
`tile_n` rows of x. Its third warpgroup only issues TMA loads; the first two multiply, 64 output
features each, by all rows of the tile. The first operand must be the sparse one, the weight, so the
accumulators hold the transposed tile, which is transposed back through shared memory. TMA reads
zeros beyond an array and writes nothing there, so tiles may extend beyond it; the rows of all
arrays must begin at multiples of 16 bytes.
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
    arith,
    asm,
    constant,
    fragments,
    ir,
    kernel,
    llvm,
    load,
    memref,
    mma_utils,
    nvvm,
    padded,
    utils,
)

__all__ = ["Config", "matmul"]

TILE_M, TILE_K = 128, 64
CONSUMERS = 2
# pending instructions read their metadata registers; two steps in a loop body let these alternate
UNROLL = 2
STORE_SLOTS = 2
# equal to the length of a tile's rows
VALUES_SWIZZLE, SWIZZLE = (plgpu.SwizzleTransform(64), plgpu.SwizzleTransform(128))
# one float32 accumulator a register, in the order of the instruction; other layouts cost moves in
# a loop
ACCUMULATOR = plgpu.Layout._WGMMA_ACC_32BIT


@dataclasses.dataclass(frozen=True)
class Config:
    """The parameters to tune.

    Attributes:
      tile_n: rows of x in a tile: 32, 64, 128 or 256.
      stages: depth of the ring, in steps of 64 of the contraction.
      cluster: 1, or 2 blocks that share each tile of x.
      in_flight: groups of instructions that stay pending from one step to the next, 0 or 1.
      stripe: tiles of output features to visit before the rows of x advance, for the L2 cache.
    """

    tile_n: int = 256
    stages: int = 5
    cluster: int = 1
    in_flight: int = 1
    stripe: int = 8

    @property
    def store_n(self):
        """Rows of y in one store."""
        return min(32, self.tile_n)


class Ops(NamedTuple):
    """The operations on registers; interpret mode replaces them by arithmetic on arrays.

    Attributes:
      zeros: returns an accumulator of 64 by `tile_n`.
      step: maps the accumulator, and values `[64, 32]`, x `[tile_n, 64]` and metadata `[1, 1, 128]`
        in shared memory, to the new accumulator.
      drain: maps the accumulator to the finished sums.
      turn: transposes results `[64, store_n]` into `[store_n, 64]` in shared memory.
    """

    zeros: object
    step: object
    drain: object
    turn: object


def _tiles(ref):
    """Views a matrix `[R, C]` in shared memory as tiles `[R/8, 1, 8, C]`.

    Its rows must be as long as their swizzle.
    """
    return utils.memref_unsqueeze(utils.memref_unfold(ref, 0, (None, 8)), 1)


def _advance(descriptor, nbytes):
    if nbytes == 0:
        return descriptor
    i64 = ir.IntegerType.get_signless(64)
    step = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, mma_utils.encode_addr(nbytes))).result
    return llvm.add(descriptor, step, overflow_flags=llvm.IntegerOverflowFlags.none)


def wgmma_sp(accumulators, a, b, metadata, selector, n, dtype):
    """Emits one `wgmma.mma_async.sp` of 64 by n by 32.

    Both operands are given by descriptors; the accumulators are both input and output.
    """
    count = n // 2
    registers = ",".join(f"${i}" for i in range(count))
    operands = f"${2 * count}, ${2 * count + 1}, ${2 * count + 2}, {selector}"
    instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{n}k32.f32.{dtype}.{dtype}"
    text = f"{instruction} {{{registers}}}, {operands}, 1, 1, 1, 0, 0;"
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r"]
    return asm(
        [accumulators[0].type] * count,
        text,
        ",".join(constraints),
        [*accumulators, a, b, metadata],
        side_effects=True,
    )


def _multiply(accumulator, values, x, metadata, in_flight):
    """One step of the ring for one warpgroup: two instructions, each with half of the metadata."""
    n = accumulator.shape[1]
    dtype = str(ir.MemRefType(values.type).element_type)
    index = ir.IndexType.get()
    lane = arith.index_cast(index, arith.remui(utils.thread_idx(), constant(128)))
    word = memref.load(metadata, [utils.c(0, index), utils.c(0, index), lane])
    (a, a_steps), _, a_order = mma_utils.create_descriptor(
        _tiles(values), swizzle=64, large_tile=(64, 32), group_size=(64, 32), logical_k_major=False
    )
    (b, b_steps), _, b_order = mma_utils.create_descriptor(
        utils.memref_transpose(_tiles(x), (1, 0, 3, 2)),
        swizzle=128,
        large_tile=(64, 64),
        group_size=(64, n),
        logical_k_major=True,
    )
    if not a_order == b_order == mma_utils.Dim.K:
        raise ValueError("hopper: both operands must be contiguous along the contraction")
    registers = accumulator.registers.copy()
    flat = list(registers.flat)
    nvvm.wgmma_fence_aligned()
    # each half covers 32 of the contraction: one dense step of 16 compressed values, two of x
    for half in range(2):
        descriptors = _advance(a, half * a_steps[1][0]), _advance(b, 2 * half * b_steps[1][0])
        flat = wgmma_sp(flat, *descriptors, word, half, n, dtype)
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(in_flight)
    registers.flat[:] = flat
    return fragments.FragmentedArray(
        _registers=registers, _layout=accumulator.layout, _is_signed=accumulator.is_signed
    )


def registers(config: Config) -> Ops:
    """The operations as they run on a GPU."""
    shape = (64, config.tile_n)
    accumulator = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ACCUMULATOR)

    # without the barrier, some zeros are written between two instructions, and ptxas serialises all
    # of them (C7517)
    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=accumulator)
    def settle(_, zeros):
        return fragments.optimization_barrier(zeros)

    @plgpu.inline_mgpu(
        arg_types=(
            ACCUMULATOR,
            plgpu.RefType((VALUES_SWIZZLE,)),
            plgpu.RefType((SWIZZLE,)),
            plgpu.RefType(),
        ),
        return_type=accumulator,
    )
    def step(_, total, values, x, metadata):
        return _multiply(total, values, x, metadata, config.in_flight)

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def drain(_, total):
        nvvm.wgmma_wait_group_sync_aligned(0)
        return fragments.optimization_barrier(total).to_layout(fragments.WGMMA_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_TRANSPOSED, plgpu.RefType((SWIZZLE,))))
    def turn(_, result, out):
        result.store_tiled(utils.memref_transpose(_tiles(out), (1, 0, 3, 2)), swizzle=128)

    return Ops(
        lambda: settle(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ACCUMULATOR)),
        step,
        drain,
        turn,
    )


def _body(
    x_ref: Any,
    values_ref: Any,
    metadata_ref: Any,
    *rest: PyTree,
    config: Config,
    activation: Any,
    blocks: Any,
    ops: Any,
) -> None:
    *bias_ref, y_ref = rest
    n, k = x_ref.shape
    m = values_ref.shape[0]
    dtype, stages, cluster = x_ref.dtype, config.stages, config.cluster
    m_tiles, n_tiles = pl.cdiv(m, TILE_M * cluster), pl.cdiv(n, config.tile_n)
    steps = pl.cdiv(k, TILE_K * UNROLL) * UNROLL
    shared = ("cluster",) if cluster > 1 else None
    zeros, step, drain, turn = ops(config)
    free_barrier = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=shared) if shared else plgpu.Barrier
    )

    @functools.partial(
        pl.run_scoped,
        collective_axes="warpgroup",
        values=plgpu.SMEM((stages, TILE_M, TILE_K // 2), dtype, transforms=(VALUES_SWIZZLE,)),
        x=plgpu.SMEM((stages, config.tile_n, TILE_K), dtype, transforms=(SWIZZLE,)),
        metadata=plgpu.SMEM((stages, TILE_M // 64, 1, 128), jnp.uint32),
        out=plgpu.SMEM((CONSUMERS, STORE_SLOTS, config.store_n, 64), dtype, transforms=(SWIZZLE,)),
        filled=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        free=free_barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    )
    def _(values, x, metadata, out, filled, free):
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        tiles = pl.cdiv(m_tiles * n_tiles - block, blocks)

        def corner(tile):
            """The first output feature and row of a tile.

            Tiles are visited in stripes, back and forth, to reuse operands in the L2 cache.
            """
            mi, ni = plgpu.planar_snake(block + tile * blocks, (m_tiles, n_tiles), 0, config.stripe)
            if shared:
                mi = mi * cluster + lax.axis_index("cluster")
            return mi * TILE_M, ni * config.tile_n

        def produce():
            plgpu.set_max_registers(56 if shared else 40, action="decrease")

            @pl.loop(0, tiles)
            def _(tile):
                m0, n0 = corner(tile)

                @pl.loop(0, steps)
                def _(i):
                    # the ring continues from one tile to the next
                    slot = lax.rem(tile * steps + i, stages)
                    rows, columns = pl.ds(m0, TILE_M), pl.ds(i * (TILE_K // 2), TILE_K // 2)
                    plgpu.barrier_wait(free.at[slot])
                    plgpu.copy_gmem_to_smem(
                        values_ref.at[rows, columns], values.at[slot], filled.at[slot]
                    )
                    rows, columns = pl.ds(n0, config.tile_n), pl.ds(i * TILE_K, TILE_K)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[rows, columns], x.at[slot], filled.at[slot], collective_axes=shared
                    )
                    rows, columns = pl.ds(lax.div(m0, 64), TILE_M // 64), pl.ds(i, 1)
                    plgpu.copy_gmem_to_smem(
                        metadata_ref.at[rows, columns], metadata.at[slot], filled.at[slot]
                    )

            # wait for the other block of the cluster, which still arrives at these barriers
            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_wait(free.at[slot])

        def consume():
            plgpu.set_max_registers(224 if shared else 232, action="increase")

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_arrive(free.at[slot])

            @pl.loop(0, tiles)
            def _(tile):
                m0, n0 = corner(tile)
                m0 = m0 + warpgroup * 64

                def release(i):
                    plgpu.barrier_arrive(free.at[lax.rem(tile * steps + i, stages)])

                def advance(outer, total):
                    for inner in range(UNROLL):
                        i = outer * UNROLL + inner
                        slot = lax.rem(tile * steps + i, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        mine = (
                            values.at[slot, pl.ds(warpgroup * 64, 64)],
                            x.at[slot],
                            metadata.at[slot, pl.ds(warpgroup, 1)],
                        )
                        total = step(total, *mine)
                        if config.in_flight == 0:
                            release(i)
                        elif inner > 0:
                            release(i - 1)
                        else:
                            pl.when(outer > 0)(functools.partial(release, i - 1))
                    return total

                result = drain(lax.fori_loop(0, steps // UNROLL, advance, zeros()))
                if config.in_flight:
                    release(steps - 1)
                if bias_ref:
                    bias = load(bias_ref[0].at[pl.ds(m0, 64)], plgpu.Layout.WGMMA.reduce(1))
                    result = result + lax.broadcast_in_dim(bias, result.shape, [0])
                result = plgpu.layout_cast(
                    ACTIVATIONS[activation](result).astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                parts = config.tile_n // config.store_n
                for part in range(parts):
                    ours = out.at[warpgroup, part % STORE_SLOTS]
                    # min, because the next tile starts at slot 0 again
                    plgpu.wait_smem_to_gmem(min(STORE_SLOTS, parts) - 1, wait_read_only=True)
                    turn(result[:, part * config.store_n : (part + 1) * config.store_n], ours)
                    plgpu.commit_smem()
                    rows = pl.ds(n0 + part * config.store_n, config.store_n)
                    plgpu.copy_smem_to_gmem(ours, y_ref.at[rows, pl.ds(m0, 64)])

            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup == CONSUMERS, produce, consume)


def matmul(
    x: Float[AnArray, "N K"],
    values: Float[AnArray, "M K//2"],
    metadata: UInt32[AnArray, "2*((M+127)//128) 2*((K+127)//128) 128"],
    bias: Float[AnArray, " M"] | None = None,
    *,
    activation: str | None = None,
    config: Config | None = None,
    cores: int = 132,
    ops: Any = registers,
    **params: Any,
) -> Float[Array, "N M"]:
    """`activation(x @ W.T + bias)`, where W is given by its compressed values and metadata.

    Args:
      x: `[N, K]`, bfloat16 or float16. K is padded to a multiple of 16, which copies x and values.
      values: `[M, K/2]` of the same dtype. If M is not a multiple of 8, the result is computed for
        the next multiple and cut, which copies it.
      metadata: uint32 in the layout `"mma16"`.
      bias: float32 `[M]` or None.
      activation: a name in `ACTIVATIONS`.
      config: None chooses by N and M.
      cores: the number of multiprocessors of the device.
      ops: a function from a `Config` to the operations on registers.
      **params: further arguments of `plgpu.kernel`, such as `interpret`.

    Returns:
      `[N, M]` in the dtype of x.
    """
    n, m = x.shape[0], values.shape[0]
    x, values = padded(x, values, 16)
    config = config or default_config(n, m, cores)
    if bias is not None:
        bias = jnp.pad(bias, (0, -m % (TILE_M * config.cluster)))
    if config.cluster > 1:
        params |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
    blocks = cores // config.cluster
    body = functools.partial(_body, config=config, activation=activation, blocks=blocks, ops=ops)
    call = kernel(
        body,
        "sparse_matmul_hopper",
        jax.ShapeDtypeStruct((n, m + -m % 8), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        **params,
    )
    return call(x, values, metadata, *(() if bias is None else (bias,)))[:, :m]


def default_config(n: int, m: int, cores: int) -> Config:
    """The tile that ends first, if a step takes as long as 300 rows and those of the tile.

    This fits the times measured on an H200.
    """
    sizes = [size for size in (256, 128, 64, 32) if size < 2 * n or size == 32]
    tiles = {size: pl.cdiv(m, TILE_M) * pl.cdiv(n, size) for size in sizes}
    tile_n = min(sizes, key=lambda size: pl.cdiv(tiles[size], cores) * (300 + size))
    return Config(tile_n, stages={32: 8, 64: 8, 128: 7, 256: 5}[tile_n])
