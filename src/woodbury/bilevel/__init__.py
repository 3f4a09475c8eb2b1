"""Bilevel optimisation: hypergradients through the solution of an inner problem.

- :class:`Bilevel`: a problem with its oracles; :func:`estimate_hypergradient` at one point of it.
- :class:`AlternatingIFT` and others: algorithms, one outer step a call of ``step()``.
- :class:`HyperLearner`: hyperparameters learned inside a training loop that exists.
- :func:`hypergradient`: by the implicit function theorem, with any recipe and a certificate.
- :func:`check_hypergradient`: the same compared with finite differences on your own problem.
- :func:`unrolled_hypergradient`: by differentiating gradient descent, for comparison.
- :class:`TunedRidge`, :class:`TunedLogisticRegression`, :class:`TunedElasticNet`: estimators of
  scikit-learn (from the extra ``app``) that tune one penalty per feature.
- :class:`SOBA`, :class:`SABA`, :class:`F2SA`, :class:`BOREP`: stochastic algorithms.
- :class:`BSVRBv1`, :class:`BSVRBv2`: for many inner problems, few of them sampled at a time.
- :class:`LVHBA`: for an inner problem with constraints that couple both levels.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from woodbury.bilevel.algorithm import BilevelAlgorithm, StepReport
from woodbury.bilevel.alternating import AlternatingIFT, AlternatingNystrom
from woodbury.bilevel.amigo import AmIGO
from woodbury.bilevel.blockwise import BlockwiseStep
from woodbury.bilevel.bo_rep import BOREP
from woodbury.bilevel.bsvrb_v1 import BSVRBv1
from woodbury.bilevel.bsvrb_v2 import BSVRBv2
from woodbury.bilevel.check import (
    HypergradientCheck,
    check_hypergradient,
    unrolled_hypergradient,
)
from woodbury.bilevel.estimate import Hypergradient, estimate_hypergradient
from woodbury.bilevel.estimators import FiniteDifference, HypergradientState, UnrolledDescent
from woodbury.bilevel.f2sa import F2SA
from woodbury.bilevel.hypergradient import hypergradient
from woodbury.bilevel.learner import (
    Augmentation,
    ExampleWeights,
    Hyper,
    HyperLearner,
    HyperReport,
    Indexed,
    LabelCorrection,
    LearningRates,
    LossWeights,
    WeightDecay,
)
from woodbury.bilevel.linearization import Linearization
from woodbury.bilevel.lv_hba import LVHBA, LVHBAStep
from woodbury.bilevel.oracles import Gradients, Joint, OracleCounts
from woodbury.bilevel.problem import Bilevel
from woodbury.bilevel.saba import SABA
from woodbury.bilevel.sampling import Sampler
from woodbury.bilevel.soba import SOBA
from woodbury.bilevel.stocbio import StocBiO

if TYPE_CHECKING:
    from woodbury.bilevel.tuned import TunedElasticNet, TunedLogisticRegression, TunedRidge

__all__ = [
    "BOREP",
    "F2SA",
    "LVHBA",
    "SABA",
    "SOBA",
    "AlternatingIFT",
    "AlternatingNystrom",
    "AmIGO",
    "Augmentation",
    "BSVRBv1",
    "BSVRBv2",
    "Bilevel",
    "BilevelAlgorithm",
    "BlockwiseStep",
    "ExampleWeights",
    "FiniteDifference",
    "Gradients",
    "Hyper",
    "HyperLearner",
    "HyperReport",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientState",
    "Indexed",
    "Joint",
    "LVHBAStep",
    "LabelCorrection",
    "LearningRates",
    "Linearization",
    "LossWeights",
    "OracleCounts",
    "Sampler",
    "StepReport",
    "StocBiO",
    "TunedElasticNet",
    "TunedLogisticRegression",
    "TunedRidge",
    "UnrolledDescent",
    "WeightDecay",
    "check_hypergradient",
    "estimate_hypergradient",
    "hypergradient",
    "unrolled_hypergradient",
]

_TUNED = ("TunedElasticNet", "TunedLogisticRegression", "TunedRidge")


def __getattr__(name: str) -> Any:
    # Estimators of scikit-learn are imported when they are used: the library does without it.
    if name not in _TUNED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.tuned"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise ImportError(
            f"{name} needs scikit-learn, not installed here. Install it with: "
            'pip install "woodbury[app]"'
        ) from error
