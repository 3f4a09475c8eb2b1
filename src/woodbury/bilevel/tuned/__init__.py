"""Estimators of scikit-learn with one penalty per feature, tuned by hypergradients."""

from woodbury.bilevel.tuned.classification import TunedLogisticRegression
from woodbury.bilevel.tuned.regression import TunedElasticNet, TunedRidge

__all__ = ["TunedElasticNet", "TunedLogisticRegression", "TunedRidge"]
