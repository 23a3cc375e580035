"""Sparsity for JAX: one set of masks from training to a compressed 2:4 matmul."""

import importlib
from typing import TYPE_CHECKING

from jaxsparse import analysis, recipes
from jaxsparse._execution.quantize import quantize
from jaxsparse._execution.sparsify import sparsify
from jaxsparse._masks.blocks import block_mask
from jaxsparse._masks.nm import nm_mask
from jaxsparse._masks.topk import topk_mask
from jaxsparse._masks.transposable import transposable_nm_mask
from jaxsparse._packed.compress import compress
from jaxsparse._packed.cutlass import from_cutlass, to_cutlass
from jaxsparse._packed.files import load_safetensors, save_safetensors
from jaxsparse._packed.matmul import sparse_matmul
from jaxsparse._packed.sparse24 import Sparse24, decompress
from jaxsparse._packed.verify import assert_sparse
from jaxsparse._plan.budgets import layer_budget
from jaxsparse._plan.eligibility import anywhere
from jaxsparse._plan.masks import magnitude_masks, score_masks
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.patterns import NM, Block, TransposableNM, Unstructured
from jaxsparse._plan.plan import Leaf, Plan
from jaxsparse._plan.planning import plan
from jaxsparse._plan.stages import geometric_stages, stepwise_stages
from jaxsparse._pruning.permutation import column_order
from jaxsparse._pruning.permute import permute
from jaxsparse._pruning.prune import prune
from jaxsparse._training.forward import effective_params, effective_weight
from jaxsparse._training.pieces import (
    add_decayed_nonparticipating,
    decay_nonparticipating,
    fix_nonparticipating,
    reset_nonparticipating,
    scale_nonparticipating,
)
from jaxsparse._training.renew import Renew, by_score, staged
from jaxsparse._training.rewire import rewire
from jaxsparse._training.schedules import (
    Schedule,
    exponential_decay,
    gradual_density,
    linear_decay,
)
from jaxsparse._training.scores import Score, diagonal_fisher, random_score, running_mean
from jaxsparse._training.state import RewireState, masks

if TYPE_CHECKING:
    from jaxsparse import flax, nnx

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Leaf",
    "Pattern",
    "Plan",
    "Renew",
    "RewireState",
    "Schedule",
    "Score",
    "Sparse24",
    "TransposableNM",
    "Unstructured",
    "add_decayed_nonparticipating",
    "analysis",
    "anywhere",
    "assert_sparse",
    "block_mask",
    "by_score",
    "column_order",
    "compress",
    "decay_nonparticipating",
    "decompress",
    "diagonal_fisher",
    "effective_params",
    "effective_weight",
    "exponential_decay",
    "fix_nonparticipating",
    "flax",
    "from_cutlass",
    "geometric_stages",
    "gradual_density",
    "layer_budget",
    "linear_decay",
    "load_safetensors",
    "magnitude_masks",
    "masks",
    "nm_mask",
    "nnx",
    "permute",
    "plan",
    "prune",
    "quantize",
    "random_score",
    "recipes",
    "reset_nonparticipating",
    "rewire",
    "running_mean",
    "save_safetensors",
    "scale_nonparticipating",
    "score_masks",
    "sparse_matmul",
    "sparsify",
    "staged",
    "stepwise_stages",
    "to_cutlass",
    "topk_mask",
    "transposable_nm_mask",
]


def __getattr__(name):
    if name in ("flax", "nnx"):  # imported on first use, so that only users of Flax pay for it
        return importlib.import_module(f"jaxsparse.{name}")
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")


def __dir__():
    return __all__
