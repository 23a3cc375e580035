"""The papers' recipes as optax transformations, one call each.

In each recipe, step t is forward pass t and the update that follows it, starting from 0. A boundary
between two phases is the first step of the second phase: an int is an optimizer step, a float in
[0, 1] is a fraction of `total_steps`, rounded to the nearest step.
"""

from jaxsparse._training.explore_exploit import explore_exploit
from jaxsparse._training.gradual import gradual
from jaxsparse._training.mdgf import mdgf
from jaxsparse._training.sdgf import sdgf
from jaxsparse._training.sr_ste import sr_ste
from jaxsparse._training.static import static

__all__ = ["explore_exploit", "gradual", "mdgf", "sdgf", "sr_ste", "static"]
