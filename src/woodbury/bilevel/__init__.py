"""Bilevel optimisation: hypergradients through the solution of an inner problem.

- :func:`hypergradient`: by the implicit function theorem, with any recipe and a certificate.
- :func:`check_hypergradient`: the same compared with finite differences on your own problem.
- :func:`unrolled_hypergradient`: by differentiating gradient descent, for comparison.
- :class:`LVHBA`: for an inner problem with constraints that couple both levels.
"""

from woodbury.bilevel.check import (
    HypergradientCheck,
    check_hypergradient,
    unrolled_hypergradient,
)
from woodbury.bilevel.hypergradient import Hypergradient, hypergradient
from woodbury.bilevel.lv_hba import LVHBA, LVHBAStep

__all__ = [
    "LVHBA",
    "Hypergradient",
    "HypergradientCheck",
    "LVHBAStep",
    "check_hypergradient",
    "hypergradient",
    "unrolled_hypergradient",
]
