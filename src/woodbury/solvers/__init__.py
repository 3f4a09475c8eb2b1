"""Recipes for ``A^-1 b`` and what they return."""

from woodbury.solvers.cg import CG
from woodbury.solvers.cholesky import Cholesky
from woodbury.solvers.eigh import Eigh
from woodbury.solvers.inverse import InverseOperator, inverse
from woodbury.solvers.ldl import LDL
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.lsqr import LSQR
from woodbury.solvers.lu import LU
from woodbury.solvers.neumann import Neumann
from woodbury.solvers.nystrom import Nystrom
from woodbury.solvers.qr import QR
from woodbury.solvers.recipe import Recipe, State
from woodbury.solvers.solution import Solution, SolveReport, SolveStatus
from woodbury.solvers.solve import SolveWarning, solve
from woodbury.solvers.sparse_cholesky import SparseCholesky
from woodbury.solvers.sparse_lu import SparseLU
from woodbury.solvers.structural import Structural

__all__ = [
    "CG",
    "LDL",
    "LSMR",
    "LSQR",
    "LU",
    "QR",
    "Cholesky",
    "Eigh",
    "InverseOperator",
    "Neumann",
    "Nystrom",
    "Recipe",
    "Solution",
    "SolveReport",
    "SolveStatus",
    "SolveWarning",
    "SparseCholesky",
    "SparseLU",
    "State",
    "Structural",
    "inverse",
    "solve",
]
