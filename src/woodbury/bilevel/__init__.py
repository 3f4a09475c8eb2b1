"""Bilevel optimisation: hypergradients through the solution of an inner problem.

- :func:`hypergradient`: by the implicit function theorem, with any recipe and a certificate.
- :func:`check_hypergradient`: the same compared with finite differences on your own problem.
- :func:`unrolled_hypergradient`: by differentiating gradient descent, for comparison.
"""

from woodbury.bilevel.check import (
    HypergradientCheck,
    check_hypergradient,
    unrolled_hypergradient,
)
from woodbury.bilevel.hypergradient import Hypergradient, hypergradient

__all__ = [
    "Hypergradient",
    "HypergradientCheck",
    "check_hypergradient",
    "hypergradient",
    "unrolled_hypergradient",
]
