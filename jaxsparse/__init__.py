"""Sparsity for JAX: one set of masks from training to a compressed 2:4 matmul."""

import importlib
from typing import TYPE_CHECKING

from jaxsparse import analysis, recipes
from jaxsparse._execution.sparsify import sparsify
from jaxsparse._masks.masks import (
    block_mask,
    magnitude_masks,
    nm_mask,
    score_masks,
    topk_mask,
    transposable_nm_mask,
)
from jaxsparse._packed.compress import Sparse24, compress, decompress
from jaxsparse._packed.matmul import sparse_matmul
from jaxsparse._plan.budgets import layer_budget
from jaxsparse._plan.patterns import NM, Block, Pattern, TransposableNM, Unstructured
from jaxsparse._plan.plan import Leaf, Plan, plan
from jaxsparse._training.forward import effective_params, effective_weight
from jaxsparse._training.pieces import (
    add_decayed_nonparticipating,
    decay_nonparticipating,
    fix_nonparticipating,
    reset_nonparticipating,
    scale_nonparticipating,
)
from jaxsparse._training.rewire import rewire
from jaxsparse._training.schedules import (
    Schedule,
    exponential_decay,
    geometric_stages,
    gradual_density,
    linear_decay,
    stepwise_stages,
)
from jaxsparse._training.scores import Score, diagonal_fisher, random_score
from jaxsparse._training.state import RewireState, masks

if TYPE_CHECKING:
    from jaxsparse import flax, nnx

__version__ = "0.1.0"

__all__ = [
    # which weights
    "Block",
    "Leaf",
    "NM",
    "Pattern",
    "Plan",
    "TransposableNM",
    "Unstructured",
    "layer_budget",
    "plan",
    # masks
    "block_mask",
    "magnitude_masks",
    "masks",
    "nm_mask",
    "score_masks",
    "topk_mask",
    "transposable_nm_mask",
    # training
    "RewireState",
    "Schedule",
    "Score",
    "add_decayed_nonparticipating",
    "decay_nonparticipating",
    "diagonal_fisher",
    "effective_params",
    "effective_weight",
    "exponential_decay",
    "fix_nonparticipating",
    "geometric_stages",
    "gradual_density",
    "linear_decay",
    "random_score",
    "recipes",
    "reset_nonparticipating",
    "rewire",
    "scale_nonparticipating",
    "stepwise_stages",
    # compressed weights
    "Sparse24",
    "compress",
    "decompress",
    "sparse_matmul",
    "sparsify",
    # frameworks and analysis
    "analysis",
    "flax",
    "nnx",
]  # fmt: skip


def __getattr__(name):
    if name in ("flax", "nnx"):  # imported on first use: only users of Flax pay for it
        return importlib.import_module(f"jaxsparse.{name}")
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")


def __dir__():
    return __all__
