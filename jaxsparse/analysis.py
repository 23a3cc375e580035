"""Analysis of sparse training (weights, masks, gradients) and of the costs of a sparse model."""

from jaxsparse._analysis.costs import Costs as Costs
from jaxsparse._analysis.costs import LeafCosts as LeafCosts
from jaxsparse._analysis.costs import costs as costs
from jaxsparse._analysis.metrics import mask_churn as mask_churn
from jaxsparse._analysis.metrics import mask_density as mask_density
from jaxsparse._analysis.metrics import retained_magnitude as retained_magnitude
from jaxsparse._analysis.recorder import Recordings as Recordings
from jaxsparse._analysis.recorder import RecordState as RecordState
from jaxsparse._analysis.recorder import record as record
from jaxsparse._analysis.recorder import recordings as recordings
from jaxsparse._analysis.trajectories import autocorrelation as autocorrelation
from jaxsparse._analysis.trajectories import (
    decorrelation_by_magnitude as decorrelation_by_magnitude,
)
from jaxsparse._analysis.trajectories import decorrelation_time as decorrelation_time
