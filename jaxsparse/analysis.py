"""Analysis: what sparse training does to weights, masks and gradients, and what a sparse model costs."""

from jaxsparse.costs import Costs as Costs
from jaxsparse.costs import LeafCosts as LeafCosts
from jaxsparse.costs import costs as costs
