"""Analysis: what sparse training does to weights, masks and gradients, and what a sparse model costs."""

from jaxsparse.costs import Costs as Costs
from jaxsparse.costs import LeafCosts as LeafCosts
from jaxsparse.costs import costs as costs
from jaxsparse.metrics import density as density
from jaxsparse.metrics import mask_churn as mask_churn
from jaxsparse.metrics import retained_magnitude as retained_magnitude
from jaxsparse.metrics import second_moment as second_moment
from jaxsparse.metrics import variance as variance
from jaxsparse.recorder import Recordings as Recordings
from jaxsparse.recorder import RecordState as RecordState
from jaxsparse.recorder import record as record
from jaxsparse.recorder import recordings as recordings
from jaxsparse.trajectories import autocorrelation as autocorrelation
from jaxsparse.trajectories import decorrelation_by_magnitude as decorrelation_by_magnitude
from jaxsparse.trajectories import decorrelation_time as decorrelation_time
