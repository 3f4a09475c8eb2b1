"""Recipes for ``A^-1 b`` and what they return."""

from woodbury.solvers.arnoldi import Arnoldi
from woodbury.solvers.auto import Auto, AutoState, Choice
from woodbury.solvers.bicgstab import BiCGSTAB
from woodbury.solvers.block_cg import BlockCG
from woodbury.solvers.block_jacobi import BlockJacobi
from woodbury.solvers.certificate import (
    EnergyHistory,
    ErrorBound,
    Guarantee,
    energy_history,
    error_bound,
)
from woodbury.solvers.cg import CG
from woodbury.solvers.chebyshev import Chebyshev
from woodbury.solvers.cholesky import Cholesky
from woodbury.solvers.cur import CUR
from woodbury.solvers.deflation import Deflation
from woodbury.solvers.eigh import Eigh
from woodbury.solvers.functions import MatrixFunction, matrix_function
from woodbury.solvers.gauss_seidel import GaussSeidel
from woodbury.solvers.generalized_nystrom import GeneralizedNystrom
from woodbury.solvers.gmres import GMRES
from woodbury.solvers.incomplete import IncompleteCholesky, IncompleteLU
from woodbury.solvers.inverse import InverseOperator, inverse
from woodbury.solvers.jacobi import Jacobi
from woodbury.solvers.kaczmarz import Kaczmarz
from woodbury.solvers.ldl import LDL
from woodbury.solvers.lsmr import LSMR
from woodbury.solvers.lsqr import LSQR
from woodbury.solvers.lu import LU
from woodbury.solvers.minres import MINRES
from woodbury.solvers.nearest_kronecker import NearestKronecker
from woodbury.solvers.neumann import Neumann
from woodbury.solvers.nystrom import Nystrom
from woodbury.solvers.qr import QR
from woodbury.solvers.recipe import Recipe, State
from woodbury.solvers.richardson import Richardson
from woodbury.solvers.sketch_precondition import SketchPrecondition
from woodbury.solvers.sketch_project import SketchProject
from woodbury.solvers.solution import Solution, SolveReport, SolveStatus
from woodbury.solvers.solve import SolveWarning, solve
from woodbury.solvers.sor import SOR
from woodbury.solvers.sparse_cholesky import SparseCholesky
from woodbury.solvers.sparse_lu import SparseLU
from woodbury.solvers.spectrum_bounds import (
    smallest_eigenvalue_bound,
    smallest_singular_value_bound,
)
from woodbury.solvers.ssor import SSOR
from woodbury.solvers.structural import Structural
from woodbury.solvers.utv import UTV

__all__ = [
    "CG",
    "CUR",
    "GMRES",
    "LDL",
    "LSMR",
    "LSQR",
    "LU",
    "MINRES",
    "QR",
    "SOR",
    "SSOR",
    "UTV",
    "Arnoldi",
    "Auto",
    "AutoState",
    "BiCGSTAB",
    "BlockCG",
    "BlockJacobi",
    "Chebyshev",
    "Choice",
    "Cholesky",
    "Deflation",
    "Eigh",
    "EnergyHistory",
    "ErrorBound",
    "GaussSeidel",
    "GeneralizedNystrom",
    "Guarantee",
    "IncompleteCholesky",
    "IncompleteLU",
    "InverseOperator",
    "Jacobi",
    "Kaczmarz",
    "MatrixFunction",
    "NearestKronecker",
    "Neumann",
    "Nystrom",
    "Recipe",
    "Richardson",
    "SketchPrecondition",
    "SketchProject",
    "Solution",
    "SolveReport",
    "SolveStatus",
    "SolveWarning",
    "SparseCholesky",
    "SparseLU",
    "State",
    "Structural",
    "energy_history",
    "error_bound",
    "inverse",
    "matrix_function",
    "smallest_eigenvalue_bound",
    "smallest_singular_value_bound",
    "solve",
]
