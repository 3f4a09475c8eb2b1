"""Hyperparameters learned inside an existing training loop; see :class:`HyperLearner`."""

from woodbury.bilevel.learner.augmentation import Augmentation
from woodbury.bilevel.learner.example_weights import ExampleWeights
from woodbury.bilevel.learner.hyper import Hyper
from woodbury.bilevel.learner.indexed import Indexed
from woodbury.bilevel.learner.label_correction import LabelCorrection
from woodbury.bilevel.learner.learner import HyperLearner
from woodbury.bilevel.learner.learning_rates import LearningRates
from woodbury.bilevel.learner.loss_weights import LossWeights
from woodbury.bilevel.learner.report import HyperReport
from woodbury.bilevel.learner.weight_decay import WeightDecay

__all__ = [
    "Augmentation",
    "ExampleWeights",
    "Hyper",
    "HyperLearner",
    "HyperReport",
    "Indexed",
    "LabelCorrection",
    "LearningRates",
    "LossWeights",
    "WeightDecay",
]
