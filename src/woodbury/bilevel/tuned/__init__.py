"""Estimators of scikit-learn with one penalty per feature, tuned by hypergradients."""

from woodbury.bilevel.tuned.estimators import TunedElasticNet, TunedLogisticRegression, TunedRidge

__all__ = ["TunedElasticNet", "TunedLogisticRegression", "TunedRidge"]
