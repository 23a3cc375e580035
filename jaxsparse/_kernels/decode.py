"""2:4 product for few rows of x, bound by reading the weight: global memory to `mma.sp`.

One block computes `tile_m` output features for all rows of x; its warps divide the contraction
among themselves and add up their sums in shared memory. The order of a contraction is arbitrary as
long as both operands follow it, so a lane reads 16 neighbouring bytes of its row of values: four
groups, its share of two instructions. Its metadata are then the nibbles with its own number in the
words of the four lanes of its quad, a 4 by 4 transposition. It also reads 16 neighbouring bytes of
x and exchanges half of them with its neighbour. The instruction puts the values into their places,
so nothing is decompressed in registers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    fragments,
    gpu,
    ir,
    kernel,
    llvm,
    memref,
    mma_sp,
    padded,
    utils,
    vector,
)

__all__ = ["Config", "matmul"]

TILE_K, WARPS = 64, 4
# words after each row of partial sums, without which a warp that reads down a column would meet one
# bank of shared memory up to 16 times
SPARE = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """The parameters to tune.

    Attributes:
      tile_m: output features of a block: 16, 32 or 64. More share each row of x, fewer keep more
        multiprocessors busy.
      unroll: steps of 64 of the contraction that each warp loads before it multiplies.
      warpgroups: the number of warpgroups, of four warps each, that divide the contraction; at most
        `tile_m / 16`.
    """

    tile_m: int = 16
    unroll: int = 8
    warpgroups: int = 1


class Ops(NamedTuple):
    """The operations that need a GPU; interpret mode replaces them by arithmetic on arrays.

    Attributes:
      step: adds to the partial sums of a warpgroup. Takes partial sums `[4 * tile_m, N]`, where
        each 64 rows hold the same 16 output features four times, once for each warp; values, x and
        metadata in global memory; the first output feature; and a number i. Warp w, of W in the
        block, contributes the steps `W * (unroll * i + u) + w` of the contraction for all u.
      gather: writes partial sums to shared memory and waits for all threads of the block; takes
        `scratch`.
      reduce: maps partial sums `[warpgroups, 4 * tile_m, N + SPARE]` in shared memory, an optional
        bias and the first output feature of the block to this warpgroup's share
        `[N, tile_m / warpgroups]`.
      store: writes the share to the rows and output features that exist in y; takes y and the first
        output feature of the block.
      scratch: further shared memory that `gather` needs.
    """

    step: object
    gather: object
    reduce: object
    store: object
    scratch: tuple = ()


def _load_words(ref, byte, offset, count, cached):
    """Loads 1 or 4 registers from global memory, at a byte address plus a constant offset."""
    pointer = utils.getelementptr(utils.memref_ptr(ref), [byte], ir.IntegerType.get_signless(8))
    pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)
    kind = ("" if cached else "L1::no_allocate.") + {1: "b32", 4: "v4.b32"}[count]
    names = {1: "$0", 4: "{$0,$1,$2,$3}"}[count]
    text = f"ld.global.nc.{kind} {names}, [${count}+{offset}];"
    return asm(
        [ir.IntegerType.get_signless(32)] * count,
        text,
        ",".join(["=r"] * count + ["l"]),
        [pointer],
        side_effects=False,
    )


def _cut(first, further, last, sure):
    """`first + further` as a register and a constant to add, limited to `last` unless `sure`."""
    return (first, further) if sure else (arith.minsi(add(first, further), constant(last)), 0)


def _bytes(number, size):
    return arith.muli(arith.extui(ir.IntegerType.get_signless(64), number), constant(size, 64))


def _odd(place, bit):
    return arith.cmpi(arith.CmpIPredicate.ne, arith.andi(place, constant(bit)), constant(0))


def _transposed(word, place):
    """Transposes nibbles within a quad: nibble i of the result is nibble `place` of lane i.

    This holds for both halves of the word, and takes two exchanges between neighbours.
    """
    for distance, mask in ((2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        other = utils.shfl_bfly(word, distance)
        shift, low, high = constant(4 * distance), constant(mask), constant(mask ^ 0xFFFFFFFF)
        kept_low = arith.ori(arith.andi(word, low), arith.shli(arith.andi(other, low), shift))
        kept_high = arith.ori(arith.andi(word, high), arith.shrui(arith.andi(other, high), shift))
        word = arith.select(_odd(place, distance), kept_high, kept_low)
    return word


def _exchanged(chunks, place):
    """Operands of two instructions from two chunks of 8 neighbouring elements of x.

    Each chunk has two groups. In a group, the even lanes of the quad need the first two elements
    and the odd lanes the last two. In a chunk, the even lanes hold the groups of the first
    instruction and the odd lanes those of the second.
    """
    odd = _odd(place, 1)
    operands: list[list] = [[], []]
    for group in range(2):
        for chunk in chunks:
            first, last = chunk[2 * group : 2 * group + 2]
            other = utils.shfl_bfly(arith.select(odd, first, last), 1)
            operands[0].append(arith.select(odd, other, first))
            operands[1].append(arith.select(odd, last, other))
    return operands


def _multiply(total, values, x, metadata, m0, i, config):
    """The steps of one iteration, with all loads first, so that many bytes are in flight."""
    dtype = str(ir.MemRefType(values.type).element_type)
    (m, _), (rows, k), tiles = (ir.MemRefType(ref.type).shape for ref in (values, x, metadata))
    thread = utils.thread_idx()
    lane = arith.andi(thread, constant(31))
    warp, group, place = (
        arith.shrui(thread, constant(5)),
        arith.shrui(lane, constant(2)),
        arith.andi(lane, constant(3)),
    )
    warps, steps = WARPS * config.warpgroups, pl.cdiv(k, TILE_K)
    sure_k, sure_m, sure_n = (
        k % (TILE_K * warps * config.unroll) == 0,
        m % config.tile_m == 0,
        rows % 8 == 0,
    )
    step = add(arith.muli(i, constant(warps * config.unroll)), warp)
    column = arith.muli(step, constant(TILE_K))

    def load(ref, row, row_size, start, further, width, size, cached):
        """Loads 16 bytes from column `start + further` on, with zeros beyond the last column.

        Rows and columns are each a register and a constant.
        """
        at, offset = _cut(start, further, k - width, sure_k)
        byte = arith.addi(_bytes(row[0], row_size), _bytes(at, size))
        words = _load_words(ref, byte, row[1] * row_size + offset * size, 4, cached)
        if sure_k:
            return words
        inside = arith.cmpi(arith.CmpIPredicate.slt, add(start, further), constant(k))
        return [arith.select(inside, register, constant(0)) for register in words]

    loaded = []
    for u in range(config.unroll):
        further = TILE_K * warps * u
        weights, columns = [], []
        for part in range(config.tile_m // 16):
            tile, tile_further = _cut(step, warps * u, steps - 1, sure_k)
            word = add(arith.muli(arith.shrui(m0, constant(6)), constant(tiles[1])), tile)
            word = add(
                arith.muli(word, constant(128)),
                arith.muli(arith.andi(m0, constant(63)), constant(2)),
                lane,
            )
            (word,) = _load_words(
                metadata, _bytes(word, 4), 4 * (128 * tile_further + 32 * part), 1, cached=False
            )
            row = [_cut(add(m0, group), 16 * part + half, m - 1, sure_m) for half in (0, 8)]
            start = add(column, arith.muli(place, constant(16)))
            weights.append(
                ([load(values, one, k, start, further, 16, 1, cached=False) for one in row], word)
            )
        for first in range(0, total.shape[1], 8):
            # rows beyond those of x are computed but not stored
            row = _cut(group, first, rows - 1, sure_n)
            start = add(column, arith.muli(place, constant(8)))
            columns.append(
                [load(x, row, 2 * k, start, further + 32 * a, 8, 2, cached=True) for a in range(2)]
            )
        loaded.append((weights, columns))
    total = total.copy()
    for weights, columns in loaded:
        operands = [_exchanged(chunks, place) for chunks in columns]
        for part, (a, word) in enumerate(weights):
            word = _transposed(word, place)
            for half in range(2):
                ours = [a[0][2 * half], a[1][2 * half], a[0][2 * half + 1], a[1][2 * half + 1]]
                for n, b in enumerate(operands):
                    where = slice(64 * part, 64 * part + 64), slice(8 * n, 8 * n + 8)
                    total[where] = mma_sp(total[where], ours, b[half], word, half, dtype)
    return total


def _elements(config, n):
    """The positions `(row, feature)` in the block's results that this thread handles, in turn."""
    index = ir.IndexType.get()
    share = config.tile_m // config.warpgroups
    thread = arith.index_cast(index, utils.thread_idx())
    warpgroup, thread = (
        arith.divui(thread, utils.c(128, index)),
        arith.remui(thread, utils.c(128, index)),
    )
    for first in range(0, n * share, 128):
        element = arith.addi(thread, utils.c(first, index))
        feature = arith.addi(
            arith.remui(element, utils.c(share, index)),
            arith.muli(warpgroup, utils.c(share, index)),
        )
        yield arith.divui(element, utils.c(share, index)), feature


def _reduce(sums, bias, m0, config):
    index = ir.IndexType.get()
    n = ir.MemRefType(sums.type).shape[2] - SPARE
    registers = []
    for row, feature in _elements(config, n):
        part, within = (
            arith.divui(feature, utils.c(16, index)),
            arith.remui(feature, utils.c(16, index)),
        )
        first = arith.addi(arith.muli(part, utils.c(64, index)), within)
        parts: list[Any] = [
            memref.load(
                sums, [utils.c(warpgroup, index), arith.addi(first, utils.c(16 * warp, index)), row]
            )
            for warpgroup in range(config.warpgroups)
            for warp in range(WARPS)
        ]
        if bias is not None:
            last = utils.c(ir.MemRefType(bias.type).shape[0] - 1, index)
            feature = arith.addi(arith.index_cast(index, m0), feature)
            parts.append(memref.load(bias, [arith.minui(feature, last)]))
        value = functools.reduce(arith.addf, parts)
        registers.append(vector.from_elements(ir.VectorType.get((1,), value.type), [value]))
    layout = fragments.WGStridedFragLayout((n, config.tile_m // config.warpgroups), vec_size=1)
    return fragments.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout, _is_signed=None
    )


def _store(result, y, m0, config):
    index = ir.IndexType.get()
    rows, m = ir.MemRefType(y.type).shape
    for register, (row, feature) in zip(
        result.registers.flat, _elements(config, result.shape[0]), strict=True
    ):
        feature = arith.addi(arith.index_cast(index, m0), feature)
        inside = [
            arith.cmpi(arith.CmpIPredicate.ult, at, utils.c(size, index))
            for at, size in ((row, rows), (feature, m))
        ]
        with utils.when(arith.andi(*inside)):
            value = vector.extract(
                register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
            )
            memref.store(value, y, [row, feature])


def registers(config: Config, n: int, has_bias: bool) -> Ops:
    """The operations as they run on a GPU."""
    partial, share = (WARPS * config.tile_m, n), (n, config.tile_m // config.warpgroups)
    ref, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT((1,))
    strided = plgpu.Layout.WG_STRIDED(share, vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, ref, ref, ref, number, number),
        return_type=plgpu.ShapeDtypeStruct(partial, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def step(_, total, values, x, metadata, m0, i):
        return _multiply(
            total, values, x, metadata, m0.registers.item(), i.registers.item(), config
        )

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, ref))
    def gather(_, total, place):
        total.store_untiled(place, optimized=False)
        gpu.barrier()

    @plgpu.inline_mgpu(
        arg_types=(ref, *[ref] * has_bias, number),
        return_type=plgpu.ShapeDtypeStruct(share, jnp.float32, layout=strided),
    )
    def reduce(_, sums, *rest):
        return _reduce(sums, rest[0] if has_bias else None, rest[-1].registers.item(), config)

    @plgpu.inline_mgpu(arg_types=(strided, ref, number))
    def store(_, result, y, m0):
        _store(result, y, m0.registers.item(), config)

    return Ops(step, gather, reduce, store)


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
    rows, k = x_ref.shape
    n = rows + -rows % 8
    step, gather, reduce, store, scratch = ops(config, n, bool(bias_ref))
    # an array, since inline code does not accept scalars
    m0 = jnp.broadcast_to(lax.axis_index("m") * config.tile_m, (1,))

    def run(sums, *scratch):
        zeros = plgpu.layout_cast(
            jnp.zeros((WARPS * config.tile_m, n), jnp.float32), plgpu.Layout.WGMMA
        )
        iterations = pl.cdiv(k, TILE_K * WARPS * config.warpgroups * config.unroll)

        def advance(i, total):
            return step(total, values_ref, x_ref, metadata_ref, m0, jnp.broadcast_to(i, (1,)))

        gather(
            lax.fori_loop(0, iterations, advance, zeros),
            sums.at[lax.axis_index("warpgroup"), :, pl.ds(0, n)],
            *scratch,
        )
        store(ACTIVATIONS[activation](reduce(sums, *bias_ref, m0)).astype(y_ref.dtype), y_ref, m0)

    sums = plgpu.SMEM((config.warpgroups, WARPS * config.tile_m, n + SPARE), jnp.float32)
    pl.run_scoped(run, sums, *scratch, collective_axes="warpgroup")


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
      x: `[N, K]`, bfloat16 or float16, N at most 64. K is padded to a multiple of 16, which copies
        x and values.
      values: `[M, K/2]` of the same dtype.
      metadata: uint32 in the layout `"mma16"`.
      bias: float32 `[M]` or None.
      activation: a name in `ACTIVATIONS`.
      config: None chooses by N and M.
      cores: the number of multiprocessors of the device.
      ops: a function from a `Config`, N rounded up to a multiple of 8, and whether there is a bias,
        to the operations that need a GPU.
      **params: further arguments of `plgpu.kernel`, such as `interpret`.

    Returns:
      `[N, M]` in the dtype of x.
    """
    n, m = x.shape[0], values.shape[0]
    x, values = padded(x, values, 16)
    config = config or default_config(n, m, cores)
    call = kernel(
        functools.partial(_body, config=config, activation=activation, ops=ops),
        "sparse_matmul_decode",
        jax.ShapeDtypeStruct((n, m), x.dtype),
        grid=(pl.cdiv(m, config.tile_m),),
        grid_names=("m",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        **params,
    )
    return call(x, values, metadata, *(() if bias is None else (bias,)))


def default_config(n: int, m: int, cores: int) -> Config:
    """The larger tile if it keeps most multiprocessors busy, since each block reads all of x."""
    tile_m = 32 if 10 * m >= 9 * 32 * cores else 16
    return Config(tile_m, 64 // tile_m if n <= 16 else 1, warpgroups=tile_m // 16)
