"""How far influence scores are to be trusted: what retraining says.

- ``retraining``: :func:`retrain` trains on subsets of the rows, resumable and over processes;
  :func:`half_subsets` draws them.
- One question a file: ``datamodeling`` (do scores predict the effect of random halves?),
  ``removal`` (of leaving rows out, and of removing the rows that scores name?), ``mislabeled`` (do
  they find wrong labels?), ``bregman`` (do they predict the response they are the derivative of?).
- ``statistics``: rank correlations and bootstrap intervals, which all of them share.
"""

from woodbury.influence.evaluation.bregman import BregmanResponse, bregman_response
from woodbury.influence.evaluation.datamodeling import (
    DatamodelingScore,
    linear_datamodeling_score,
)
from woodbury.influence.evaluation.mislabeled import (
    Detection,
    flip_labels,
    label_margin,
    mislabel_detection,
)
from woodbury.influence.evaluation.removal import (
    Agreement,
    Counterfactuals,
    RemovalEffects,
    counterfactual_removal,
    leave_one_out_retraining,
    removal_effects,
)
from woodbury.influence.evaluation.retraining import Retrained, half_subsets, retrain
from woodbury.influence.evaluation.statistics import Interval

__all__ = [
    "Agreement",
    "BregmanResponse",
    "Counterfactuals",
    "DatamodelingScore",
    "Detection",
    "Interval",
    "RemovalEffects",
    "Retrained",
    "bregman_response",
    "counterfactual_removal",
    "flip_labels",
    "half_subsets",
    "label_margin",
    "leave_one_out_retraining",
    "linear_datamodeling_score",
    "mislabel_detection",
    "removal_effects",
    "retrain",
]
