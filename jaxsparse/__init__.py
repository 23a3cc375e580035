"""Functional N:M sparsity for JAX and Flax: one set of masks from training to a compressed matmul."""

import importlib
from typing import TYPE_CHECKING

from jaxsparse import analysis as analysis
from jaxsparse import recipes as recipes
from jaxsparse._program.execute import sparsify as sparsify
from jaxsparse.budgets import layer_budget as layer_budget
from jaxsparse.compress import Sparse24 as Sparse24
from jaxsparse.compress import compress as compress
from jaxsparse.compress import decompress as decompress
from jaxsparse.forward import participate as participate
from jaxsparse.forward import sparse_params as sparse_params
from jaxsparse.masks import block_mask as block_mask
from jaxsparse.masks import magnitude_masks as magnitude_masks
from jaxsparse.masks import nm_mask as nm_mask
from jaxsparse.masks import topk_mask as topk_mask
from jaxsparse.masks import transposable_nm_mask as transposable_nm_mask
from jaxsparse.matmul import sparse_matmul as sparse_matmul
from jaxsparse.patterns import NM as NM
from jaxsparse.patterns import Block as Block
from jaxsparse.patterns import TransposableNM as TransposableNM
from jaxsparse.patterns import Unstructured as Unstructured
from jaxsparse.plan import Plan as Plan
from jaxsparse.plan import plan as plan
from jaxsparse.schedules import exponential_decay as exponential_decay
from jaxsparse.schedules import geometric_stages as geometric_stages
from jaxsparse.schedules import gradual_density as gradual_density
from jaxsparse.schedules import linear_decay as linear_decay
from jaxsparse.schedules import stepwise_stages as stepwise_stages
from jaxsparse.scores import diagonal_fisher as diagonal_fisher
from jaxsparse.scores import random_score as random_score
from jaxsparse.state import RewireState as RewireState
from jaxsparse.state import masks as masks
from jaxsparse.transforms import decay_nonparticipating as decay_nonparticipating
from jaxsparse.transforms import fix_nonparticipating as fix_nonparticipating
from jaxsparse.transforms import reset_nonparticipating as reset_nonparticipating
from jaxsparse.transforms import rewire as rewire
from jaxsparse.transforms import scale_nonparticipating as scale_nonparticipating
from jaxsparse.transforms import sr_ste as sr_ste

if TYPE_CHECKING:
    from jaxsparse import flax as flax
    from jaxsparse import nnx as nnx

__version__ = "0.1.0"


def __getattr__(name):
    if name in ("flax", "nnx"):  # only those who use Flax pay for its import
        return importlib.import_module(f"jaxsparse.{name}")
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")
