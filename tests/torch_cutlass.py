"""Writes tests/torch_cutlass.npz: 2:4 weights as PyTorch's CUTLASS conversion packs them, on a CPU.

python tests/torch_cutlass.py     # needs torch; the committed file is of torch 2.13.0
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".npz")
SIZES = {"int16": (64, 96), "int8": (48, 128)}


def dense(name):
    """A weight `[M, K]` with two of four neighbours unequal to zero."""
    random = np.random.default_rng(0)
    m, k = SIZES[name]
    ranks = random.random((m, k // 4, 4)).argsort(-1)
    values = random.integers(1, 100, (m, k // 4, 4)) * random.choice([-1, 1], (m, k // 4, 4))
    return np.where(ranks < 2, values, 0).reshape(m, k)


def main():
    import torch
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
    )

    arrays = {}
    for name, dtype in (("int16", torch.float16), ("int8", torch.int8)):
        values, metadata = sparse_semi_structured_from_dense_cutlass(
            torch.tensor(dense(name), dtype=dtype)
        )
        arrays |= {f"{name} values": values.numpy(), f"{name} metadata": metadata.numpy()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
