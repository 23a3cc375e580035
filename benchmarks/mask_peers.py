"""Times 2:4 and 1:16 masks of the library against naive forms and other installed libraries.

python benchmarks/mask_peers.py                                   # pip install qwix torch
PYTHONPATH=path/to/qwix python benchmarks/mask_peers.py           # or a checkout
"""

import argparse
import importlib.metadata

import timing

if __name__ == "__main__":
    timing.with_warm_heap()

import jax
import jax.numpy as jnp
import masks
import tabulate

PATTERNS = ((2, 4), (1, 16))


def top_k_one_hot(n, m, w):
    """N:M masks along the last axis by `top_k` and a sum of one-hot vectors."""
    groups = jnp.abs(w).reshape(*w.shape[:-1], -1, m)
    places = jax.lax.top_k(groups, n)[1]
    return jax.nn.one_hot(places, m, dtype=bool).any(-2).reshape(w.shape)


def double_argsort(n, m, w):
    """N:M masks along the last axis by ranks, from sorting twice."""
    groups = jnp.abs(w).reshape(*w.shape[:-1], -1, m)
    return (jnp.argsort(jnp.argsort(-groups, -1), -1) < n).reshape(w.shape)


def jitted(f, n, m):
    return jax.jit(lambda w: f(n, m, w))


def qwix(n, m):
    from qwix._src.core.sparsity import get_sparsity_mask

    return jax.jit(lambda w: get_sparsity_mask(w, n, m))


def torch_weight_norm(n, m, w):
    import torch
    from torch.ao.pruning import WeightNormSparsifier

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=getattr(torch, w.dtype.name))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(jnp.asarray(w, jnp.float32).__array__().copy()))
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n
    )
    sparsifier.prepare(layer, [{"tensor_fqn": "weight"}])

    def step(_):
        sparsifier.step()

    return step


def candidates(n, m, w):
    """The candidates that can run here, by name, and the reason for each that cannot."""
    peers = {
        "qwix get_sparsity_mask": lambda: qwix(n, m),
        "torch.ao WeightNormSparsifier": lambda: torch_weight_norm(n, m, w),
    }
    calls, missing = {"jaxsparse": masks.mask(masks.nm(f"{n}:{m}", 1), w)}, {}
    calls |= {
        "top_k and one-hot": jitted(top_k_one_hot, n, m),
        "argsort twice": jitted(double_argsort, n, m),
    }
    for name, peer in peers.items():
        try:
            calls[name] = peer()
        except ImportError as error:
            missing[name] = str(error)
    return calls, missing


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    rows, missing = {}, {}
    for n, m in PATTERNS:
        for dtype in masks.DTYPES:
            w = masks.weights(masks.SHAPES["square"], dtype)
            calls, missing = candidates(n, m, w)
            for name, ratio in masks.ratios(calls, w, rounds, f"{n}:{m} {dtype}").items():
                rows.setdefault(name, []).append(ratio)
    header = (
        "mask along the last axis",
        *(f"{n}:{m} {dtype}" for n, m in PATTERNS for dtype in masks.DTYPES),
    )
    rows = [(name, *ratios) for name, ratios in rows.items()]
    print(tabulate.tabulate(rows, header, floatfmt=".2f"))
    for name, reason in missing.items():
        print(f"Not measured: {name} ({reason})")
    versions = {
        name: importlib.metadata.version(name)
        for name in ("qwix", "torch")
        if not any(name in peer for peer in missing)
    }
    timing.save(
        "mask_peers", rounds=rounds, header=header, rows=rows, missing=missing, versions=versions
    )


if __name__ == "__main__":
    main()
