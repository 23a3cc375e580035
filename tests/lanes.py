"""Sparse tensor core instructions in NumPy, lane by lane, after the PTX manual.

Shares no code with the library. A fragment holds the registers of the 32 lanes of a warp: `[32,
elements]`. Lane `4 * g + t` is in row group g and quad place t. The nibble `first | second << 2`
gives the places of two kept values among four.
"""

import numpy as np

LANE = np.arange(32)
G, T = LANE[:, None] // 4, LANE[:, None] % 4

_EIGHT, _FOUR = np.arange(8), np.arange(4)
# compressed 16 x 16
A_ROW, A_COLUMN = (G + 8 * (_EIGHT // 2 % 2), 2 * T + _EIGHT % 2 + 8 * (_EIGHT // 4))
B_ROW, B_COLUMN = 2 * T + _EIGHT % 2 + 8 * (_EIGHT // 2), G + 0 * _EIGHT  # 32 x 8
C_ROW, C_COLUMN = G + 8 * (_FOUR // 2), 2 * T + _FOUR % 2  # 16 x 8


class UnorderedMetadataError(Exception):
    """A nibble whose places do not ascend, which is undefined behaviour on the hardware."""


def expand(values, nibbles):
    """Compressed `[R, C/2]` and nibbles `[R, C/4]` to dense `[R, C]`, one group after the other."""
    dense = np.zeros((values.shape[0], 2 * values.shape[1]), values.dtype)
    for row, column in np.ndindex(nibbles.shape):
        first, second = int(nibbles[row, column]) & 3, int(nibbles[row, column]) >> 2
        if first >= second:
            raise UnorderedMetadataError(f"nibble {nibbles[row, column]:#x} at {row, column}")
        dense[row, 4 * column + first] = values[row, 2 * column]
        dense[row, 4 * column + second] = values[row, 2 * column + 1]
    return dense


def nibbles_k32(words, selector):
    """The nibbles `[16, 8]` in a warp's metadata words `[32]` for one k32 step of 16-bit operands.

    The quad's lanes `2 * selector` and `2 * selector + 1` supply them, the first for the left half
    of the columns and the second for the right half; the low half-word is row g, the high one row g
    + 8.
    """
    nibbles = np.zeros((16, 8), np.uint32)
    for g in range(8):
        for right in range(2):
            word = int(words[4 * g + 2 * selector + right])
            for group in range(4):
                nibbles[g, 4 * right + group] = word >> 4 * group & 15
                nibbles[g + 8, 4 * right + group] = word >> 16 + 4 * group & 15
    return nibbles


def mma_sp_m16n8k32(a, b, c, words, selector):
    """One `mma.sp::ordered_metadata.m16n8k32` of a warp.

    Maps fragments a `[32, 8]`, b `[32, 8]`, c `[32, 4]` to d `[32, 4]`.
    """
    compressed, right, total = (
        np.zeros((16, 16), a.dtype),
        np.zeros((32, 8), b.dtype),
        np.zeros((16, 8), c.dtype),
    )
    compressed[A_ROW, A_COLUMN], right[B_ROW, B_COLUMN], total[C_ROW, C_COLUMN] = a, b, c
    return (total + expand(compressed, nibbles_k32(words, selector)) @ right)[C_ROW, C_COLUMN]


def wgmma_sp_m64k32(a, b, words, selector):
    """The product of one `wgmma.mma_async.sp` m64nNk32.

    Takes compressed a `[64, 16]`, b `[32, N]` and the words `[128]` of the four warps.
    """
    warps = [
        expand(a[16 * w : 16 * w + 16], nibbles_k32(words[32 * w : 32 * w + 32], selector)) @ b
        for w in range(4)
    ]
    return np.concatenate(warps)


def prune(rng, rows, columns):
    """A 2:4 mask `[rows, columns]` with every pair of places, and nonzero small integers."""
    pairs = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    chosen = pairs[rng.integers(0, 6, (rows, columns // 4))]
    mask = np.zeros((rows, columns // 4, 4), bool)
    np.put_along_axis(mask, chosen, True, -1)
    weights = rng.integers(1, 9, (rows, columns)) * rng.choice([-1, 1], (rows, columns))
    return mask.reshape(rows, columns), weights.astype(np.float32)


def tma_tile(tile, swizzle):
    """The bytes that TMA writes for a tile `[R, C]` of 16-bit words.

    These are blocks of 8 rows by `swizzle` bytes, one after the other.
    """
    rows, columns = tile.shape
    memory = np.zeros(rows * columns, tile.dtype)
    for row, column in np.ndindex(rows, columns):
        block = (row // 8) * (2 * columns // swizzle) + 2 * column // swizzle
        memory[
            _swizzled(block * 8 * swizzle + row % 8 * swizzle + 2 * column % swizzle, swizzle) // 2
        ] = tile[row, column]
    return memory


def descriptor_tile(memory, descriptor, rows, columns):
    """The tile `[rows, columns]` that a K-major matrix descriptor refers to in shared memory."""
    start, stride = (descriptor & 0x3FFF) * 16, (descriptor >> 32 & 0x3FFF) * 16
    swizzle = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    tile = np.zeros((rows, columns), memory.dtype)
    for row, column in np.ndindex(rows, columns):
        tile[row, column] = memory[
            _swizzled(start + row // 8 * stride + row % 8 * swizzle + 2 * column, swizzle) // 2
        ]
    return tile


def _swizzled(address, swizzle):
    return address ^ (address >> 7 & swizzle // 16 - 1) << 4
