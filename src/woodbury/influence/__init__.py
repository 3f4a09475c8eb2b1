"""Which training data made the model do this.

- :class:`Influence`: what every training example does to the loss, the margin or any measurement of
  a query, with any matrix and any recipe; :class:`Scores`, :class:`SelfInfluence` are what it
  returns. :func:`token_scores`: which tokens of a training sequence its score is of.
- :class:`GradientStore`: compressed gradients on disk, asked many times, with the error that
  compression costs; :class:`EigenProjection`, :class:`RandomProjection`: what is kept.
- :func:`leave_group_out`: what leaving out groups does, with standard errors; :class:`TfIdf`: which
  texts share rare tokens with a query, to choose what is scored.
- :func:`leave_one_out`: for every row, the prediction of the model that did not see it.
"""

from woodbury.influence.forecast import Forecast
from woodbury.influence.groups import GroupEffects, leave_group_out
from woodbury.influence.influence import Influence
from woodbury.influence.leave_one_out import LeaveOneOut, leave_one_out
from woodbury.influence.projection import EigenProjection, RandomProjection
from woodbury.influence.scores import Scores, Top
from woodbury.influence.self_influence import SelfInfluence
from woodbury.influence.store import GradientStore
from woodbury.influence.store_forecast import StoreForecast
from woodbury.influence.tfidf import TfIdf
from woodbury.influence.tokens import TokenScores, token_scores

__all__ = [
    "EigenProjection",
    "Forecast",
    "GradientStore",
    "GroupEffects",
    "Influence",
    "LeaveOneOut",
    "RandomProjection",
    "Scores",
    "SelfInfluence",
    "StoreForecast",
    "TfIdf",
    "TokenScores",
    "Top",
    "leave_group_out",
    "leave_one_out",
    "token_scores",
]
