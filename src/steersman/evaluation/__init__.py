"""What is measured of a policy while it trains, beside its loss: its answers by any metric, tasks of others."""

from steersman.evaluation.answers import judge, needs_of_all
from steersman.evaluation.looks import Evaluation

__all__ = ["Evaluation", "judge", "needs_of_all"]
