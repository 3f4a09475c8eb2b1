"""Factorisations that solvers and spectra are both made of."""

from woodbury.decompositions.lanczos import Lanczos, lanczos
from woodbury.decompositions.nystrom import NystromFactor, nystrom
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.decompositions.partial import PartialEigen
from woodbury.decompositions.power import ExtremeEigenvalues, extreme_eigenvalues

__all__ = [
    "ExtremeEigenvalues",
    "Lanczos",
    "NystromFactor",
    "PartialEigen",
    "extreme_eigenvalues",
    "lanczos",
    "nystrom",
    "orthonormalize",
]
