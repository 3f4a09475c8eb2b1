"""Which training data made the model do this.

- :class:`Influence`: what every training example does to the loss, the margin or any measurement of
  a query, with any matrix and any recipe; :class:`Scores`, :class:`SelfInfluence` are what it
  returns.
- :func:`leave_one_out`: for every row, the prediction of the model that did not see it.
"""

from woodbury.influence.forecast import Forecast
from woodbury.influence.influence import Influence
from woodbury.influence.leave_one_out import LeaveOneOut, leave_one_out
from woodbury.influence.scores import Scores, Top
from woodbury.influence.self_influence import SelfInfluence

__all__ = [
    "Forecast",
    "Influence",
    "LeaveOneOut",
    "Scores",
    "SelfInfluence",
    "Top",
    "leave_one_out",
]
