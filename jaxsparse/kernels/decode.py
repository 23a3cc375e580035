"""2:4 product for few rows of x, where reading the weight is everything: from global memory straight to `mma.sp`.

One warpgroup computes `tile_m` output features for all rows of x; its four warps share out the contraction and add up in shared
memory. The order of a contraction is free as long as both operands follow it, so a lane reads 16 neighbouring bytes of its row
of values: four groups, which are its share of two instructions. Its metadata then are the nibbles of the same
number from the words of the four lanes of its quad, a transposition of 4 by 4. The instruction places the values, so nothing is
decompressed in registers.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse.kernels import ACTIVATIONS
from jaxsparse.kernels.mosaic import add, arith, asm, constant, fragments, ir, kernel, lane, llvm, memref, mma_sp, utils, vector

__all__ = ["Config", "matmul"]

TILE_K, WARPS = 64, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned.

    Attributes:
      tile_m: output features of a block: 16, 32 or 64. More share each row of x, fewer keep more multiprocessors busy.
      unroll: steps of 64 of the contraction that each warp loads before it multiplies.
    """

    tile_m: int = 16
    unroll: int = 4


class Ops(NamedTuple):
    """The blocks that only a GPU has. Interpret mode puts arithmetic on arrays in their place.

    Attributes:
      step: partial sums `[4 * tile_m, N]`, of which each 64 rows are four times the same 16 output features, once for each
        warp; values, x and metadata in global memory; the first output feature; a number i. Adds what the warps w contribute in
        their steps `4 * (unroll * i + u) + w` of the contraction for all u.
      reduce: partial sums, their place `[4 * tile_m, N]` in shared memory, bias or nothing, and the first output feature to
        `[N, tile_m]`.
      store: results `[N, tile_m]` to the rows that y has, from the first output feature on.
    """

    step: object
    reduce: object
    store: object


def _load_words(ref, element, count):
    """So many registers from global memory, from an element of 16 bits on, past the L1 cache if they are 4."""
    i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
    size = ir.MemRefType(ref.type).element_type
    pointer = utils.getelementptr(utils.memref_ptr(ref), [arith.muli(element, constant(utils.bitwidth(size) // 8, 64))], i8)
    pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)
    names = ",".join(f"${i}" for i in range(count))
    kind = "L1::no_allocate.v4.b32" if count == 4 else "b32"
    text = f"ld.global.nc.{kind} {{{names}}}, [${count}];" if count > 1 else f"ld.global.nc.{kind} $0, [$1];"
    return asm([i32] * count, text, ",".join(["=r"] * count + ["l"]), [pointer], side_effects=False)


def _wide(value):
    return arith.extui(ir.IntegerType.get_signless(64), value)


def _transposed(word, place):
    """Nibble i of the result is nibble `place` of lane i of the quad, in both halves of the word: two exchanges between neighbours."""
    for distance, mask in ((2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        other = utils.shfl_bfly(word, distance)
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(place, constant(distance)), constant(0))
        shift, low, high = constant(4 * distance), constant(mask), constant(mask ^ 0xFFFFFFFF)
        kept_low = arith.ori(arith.andi(word, low), arith.shli(arith.andi(other, low), shift))
        kept_high = arith.ori(arith.andi(word, high), arith.shrui(arith.andi(other, high), shift))
        word = arith.select(upper, kept_high, kept_low)
    return word


def _multiply(total, values, x, metadata, m0, i, config):
    """The steps of one iteration: all loads first, so that many bytes are on their way."""
    dtype = str(ir.MemRefType(values.type).element_type)
    rows, k = ir.MemRefType(x.type).shape
    steps, index = k // TILE_K, ir.IndexType.get()
    warp, group, place = lane()
    index_of = functools.partial(arith.index_cast, index)
    ragged = steps % (WARPS * config.unroll) != 0
    total = total.copy()
    loaded = []
    for u in range(config.unroll):
        step = add(arith.muli(add(arith.muli(i, constant(config.unroll)), u), constant(WARPS)), warp)
        inside = arith.cmpi(arith.CmpIPredicate.slt, step, constant(steps))
        step = arith.minsi(step, constant(steps - 1))

        def load(ref, at, count, inside=inside):
            """Steps beyond the last load it again and multiply zeros."""
            found = _load_words(ref, at, count)
            return [arith.select(inside, register, constant(0)) for register in found] if ragged else found

        weights = []
        for part in range(config.tile_m // 16):
            row = add(m0, 16 * part)
            thread = add(
                arith.shli(arith.shrui(arith.andi(row, constant(63)), constant(4)), constant(5)), arith.shli(group, constant(2)), place
            )
            word = memref.load(metadata, [index_of(arith.shrui(row, constant(6))), index_of(step), index_of(thread)])
            a = []
            for half in (0, 8):
                at = arith.muli(_wide(add(row, group, half)), constant(k // 2, 64))
                at = arith.addi(at, _wide(add(arith.muli(step, constant(32)), arith.shli(place, constant(3)))))
                a.append(load(values, at, 4))
            weights.append((a, word))
        columns = []
        for column in range(0, total.shape[1], 8):
            row = arith.minsi(add(group, column), constant(rows - 1))  # rows that x lacks are computed and not stored
            first = add(arith.muli(step, constant(64)), arith.shli(arith.shrui(place, constant(1)), constant(4)))
            first = add(first, arith.shli(arith.andi(place, constant(1)), constant(1)))
            at = arith.addi(arith.muli(_wide(row), constant(k, 64)), _wide(first))
            pairs = [32 * (q % 2) + 4 * (q // 2) + 8 * half for half in range(2) for q in range(4)]
            columns.append([load(x, arith.addi(at, constant(pair, 64)), 1)[0] for pair in pairs])
        loaded.append((weights, columns))
    for weights, columns in loaded:
        for part, (a, word) in enumerate(weights):
            word = _transposed(word, place)
            for half in range(2):
                ours = [a[0][2 * half], a[1][2 * half], a[0][2 * half + 1], a[1][2 * half + 1]]
                for column, b in enumerate(columns):
                    tile = slice(64 * part, 64 * part + 64), slice(8 * column, 8 * column + 8)
                    total[tile] = mma_sp(total[tile], ours, b[4 * half : 4 * half + 4], word, half, dtype)
    return total


def _elements(shape):
    """The places `(row, column)` that this thread has in the strided layout of an array, one after the other."""
    index = ir.IndexType.get()
    thread = arith.index_cast(index, arith.remui(utils.thread_idx(), constant(128)))
    for first in range(0, shape[0] * shape[1], 128):
        element = arith.addi(thread, utils.c(first, index))
        yield arith.divui(element, utils.c(shape[1], index)), arith.remui(element, utils.c(shape[1], index))


def _reduce(total, scratch, bias, m0, config):
    index = ir.IndexType.get()
    shape = total.shape[1], config.tile_m
    total.store_untiled(scratch, optimized=False)
    utils.warpgroup_barrier()
    sums = []
    for n, m in _elements(shape):
        part, within = arith.divui(m, utils.c(16, index)), arith.remui(m, utils.c(16, index))
        first = arith.addi(arith.muli(part, utils.c(64, index)), within)
        value = memref.load(scratch, [first, n])
        for warp in range(1, WARPS):
            value = arith.addf(value, memref.load(scratch, [arith.addi(first, utils.c(16 * warp, index)), n]))
        if bias is not None:
            value = arith.addf(value, memref.load(bias, [arith.addi(arith.index_cast(index, m0), m)]))
        sums.append(vector.from_elements(ir.VectorType.get((1,), value.type), [value]))
    layout = fragments.WGStridedFragLayout(shape, vec_size=1)
    registers = np.array(sums, dtype=object)
    return fragments.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _store(result, y, m0, config):
    index = ir.IndexType.get()
    rows = ir.MemRefType(y.type).shape[0]
    for register, (n, m) in zip(result.registers.flat, _elements(result.shape), strict=True):
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, n, utils.c(rows, index))):
            value = vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
            memref.store(value, y, [n, arith.addi(arith.index_cast(index, m0), m)])


def registers(config: Config, n: int, has_bias: bool) -> Ops:
    """The blocks that run on a GPU."""
    shape = (WARPS * config.tile_m, n)
    ref, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT((1,))
    strided = plgpu.Layout.WG_STRIDED((n, config.tile_m), vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, ref, ref, ref, number, number),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def step(_, total, values, x, metadata, m0, i):
        return _multiply(total, values, x, metadata, m0.registers.item(), i.registers.item(), config)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, ref, *[ref] * has_bias, number),
        return_type=plgpu.ShapeDtypeStruct((n, config.tile_m), jnp.float32, layout=strided),
    )
    def reduce(_, total, scratch, *rest):
        return _reduce(total, scratch, rest[0] if has_bias else None, rest[-1].registers.item(), config)

    @plgpu.inline_mgpu(arg_types=(strided, ref, number))
    def store(_, result, y, m0):
        _store(result, y, m0.registers.item(), config)

    return Ops(step, reduce, store)


def _body(x_ref, values_ref, metadata_ref, *rest, config: Config, activation, ops):
    *bias_ref, y_ref = rest
    rows, k = x_ref.shape
    n = rows + -rows % 8
    step, reduce, store = ops(config, n, bool(bias_ref))
    m0 = jnp.broadcast_to(lax.axis_index("m") * config.tile_m, (1,))  # as an array, since inline code takes no scalars

    @functools.partial(pl.run_scoped, scratch=plgpu.SMEM((WARPS * config.tile_m, n), jnp.float32))
    def _(scratch):
        zeros = plgpu.layout_cast(jnp.zeros((WARPS * config.tile_m, n), jnp.float32), plgpu.Layout.WGMMA)
        iterations = pl.cdiv(k // TILE_K, WARPS * config.unroll)

        def advance(i, total):
            return step(total, values_ref, x_ref, metadata_ref, m0, jnp.broadcast_to(i, (1,)))

        total = lax.fori_loop(0, iterations, advance, zeros)
        result = reduce(total, scratch, *bias_ref, m0)
        store(ACTIVATIONS[activation](result).astype(y_ref.dtype), y_ref, m0)


def matmul(x, values, metadata, bias=None, *, activation=None, config: Config | None = None, cores: int = 132, ops=registers, **params):
    """`activation(x @ W.T + bias)` with W from its compressed values and metadata.

    Args:
      x: `[N, K]`, bfloat16 or float16, N at most 64, K a multiple of 64.
      values: `[M, K/2]` of the same dtype, M a multiple of 64.
      metadata: uint32 in the layout `"mma16"`.
      bias: float32 `[M]` or None.
      activation: a name in `ACTIVATIONS`.
      config: None chooses by N and M.
      cores: multiprocessors of the device.
      ops: makes the blocks that only a GPU has from a `Config`, N in full eights and whether there is a bias.
      **params: for `plgpu.kernel`, as `interpret`.

    Returns:
      `[N, M]` in the dtype of x.
    """
    m = values.shape[0]
    config = config or default_config(x.shape[0], m, cores)
    call = kernel(
        functools.partial(_body, config=config, activation=activation, ops=ops),
        "sparse_matmul_decode",
        jax.ShapeDtypeStruct((x.shape[0], m), x.dtype),
        grid=(m // config.tile_m,),
        grid_names=("m",),
        **params,
    )
    return call(x, values, metadata, *(() if bias is None else (bias,)))


def default_config(n: int, m: int, cores: int) -> Config:
    """The largest tile of which every multiprocessor gets two; about the same number of bytes on their way for each."""
    tile_m = next((size for size in (64, 32) if m // size >= 2 * cores), 16)
    return Config(tile_m, unroll=64 // tile_m if n <= 16 else 1)
