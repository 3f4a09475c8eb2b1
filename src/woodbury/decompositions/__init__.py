"""Factorisations that solvers and spectra are both made of."""

from woodbury.decompositions.arnoldi import KrylovFactor, arnoldi
from woodbury.decompositions.cur import cur
from woodbury.decompositions.lanczos import Lanczos, lanczos
from woodbury.decompositions.lanczos_batch import LanczosBatch, lanczos_batch
from woodbury.decompositions.meta import (
    MetaFactor,
    generalized_nystrom,
    meta_factorization,
    utv,
)
from woodbury.decompositions.nystrom import NystromFactor, nystrom
from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.decompositions.partial import PartialEigen
from woodbury.decompositions.power import ExtremeEigenvalues, extreme_eigenvalues
from woodbury.decompositions.range_finder import RangeBasis, range_finder
from woodbury.decompositions.sketches import Hadamard, random_sketch
from woodbury.decompositions.two_sided import TwoSided
from woodbury.decompositions.volume import RowSample, sample_rows

__all__ = [
    "ExtremeEigenvalues",
    "Hadamard",
    "KrylovFactor",
    "Lanczos",
    "LanczosBatch",
    "MetaFactor",
    "NystromFactor",
    "PartialEigen",
    "RangeBasis",
    "RowSample",
    "TwoSided",
    "arnoldi",
    "cur",
    "extreme_eigenvalues",
    "generalized_nystrom",
    "lanczos",
    "lanczos_batch",
    "meta_factorization",
    "nystrom",
    "orthonormalize",
    "random_sketch",
    "range_finder",
    "sample_rows",
    "utv",
]
