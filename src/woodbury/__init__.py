"""Inverses nobody can form: multiply by a matrix, get what its inverse would give, with proof.

Names are imported when they are first used, so ``import woodbury`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from woodbury import errors
    from woodbury.apps.clean import clean
    from woodbury.bilevel import check_hypergradient, hypergradient
    from woodbury.curvature import (
        Fisher,
        GaussNewton,
        GradientBuffer,
        GradientWindow,
        Hessian,
        Jacobian,
        Objective,
    )
    from woodbury.implicit import fixed_point, minimize, root
    from woodbury.influence import Influence, leave_one_out
    from woodbury.operators import (
        BlockDiagonal,
        Dense,
        Diagonal,
        FunctionOperator,
        Identity,
        Kernel,
        Kronecker,
        LinearOperator,
        LowRank,
        Sparse,
    )
    from woodbury.solvers import (
        CG,
        CUR,
        GMRES,
        LDL,
        LSMR,
        LSQR,
        MINRES,
        QR,
        SOR,
        SSOR,
        UTV,
        Auto,
        BiCGSTAB,
        BlockJacobi,
        Chebyshev,
        Cholesky,
        Deflation,
        Eigh,
        GaussSeidel,
        GeneralizedNystrom,
        IncompleteCholesky,
        IncompleteLU,
        Jacobi,
        Kaczmarz,
        NearestKronecker,
        Neumann,
        Nystrom,
        Richardson,
        SketchPrecondition,
        SketchProject,
        Solution,
        SolveStatus,
        SparseCholesky,
        SparseLU,
        inverse,
        solve,
    )
    from woodbury.spaces import Space

_HOME = {
    "Auto": "solvers",
    "BiCGSTAB": "solvers",
    "BlockDiagonal": "operators",
    "BlockJacobi": "solvers",
    "CG": "solvers",
    "CUR": "solvers",
    "Chebyshev": "solvers",
    "Cholesky": "solvers",
    "Deflation": "solvers",
    "Dense": "operators",
    "Diagonal": "operators",
    "Eigh": "solvers",
    "Fisher": "curvature",
    "FunctionOperator": "operators",
    "GMRES": "solvers",
    "GaussNewton": "curvature",
    "GaussSeidel": "solvers",
    "GeneralizedNystrom": "solvers",
    "GradientBuffer": "curvature",
    "GradientWindow": "curvature",
    "Hessian": "curvature",
    "Identity": "operators",
    "IncompleteCholesky": "solvers",
    "IncompleteLU": "solvers",
    "Influence": "influence",
    "Jacobi": "solvers",
    "Jacobian": "curvature",
    "Kaczmarz": "solvers",
    "Kernel": "operators",
    "Kronecker": "operators",
    "LDL": "solvers",
    "LSMR": "solvers",
    "LSQR": "solvers",
    "LinearOperator": "operators",
    "LowRank": "operators",
    "MINRES": "solvers",
    "NearestKronecker": "solvers",
    "Neumann": "solvers",
    "Nystrom": "solvers",
    "Objective": "curvature",
    "QR": "solvers",
    "Richardson": "solvers",
    "SOR": "solvers",
    "SSOR": "solvers",
    "SketchPrecondition": "solvers",
    "SketchProject": "solvers",
    "Solution": "solvers",
    "SolveStatus": "solvers",
    "Space": "spaces",
    "Sparse": "operators",
    "SparseCholesky": "solvers",
    "SparseLU": "solvers",
    "UTV": "solvers",
    "check_hypergradient": "bilevel",
    "clean": "apps.clean",
    "fixed_point": "implicit",
    "hypergradient": "bilevel",
    "inverse": "solvers",
    "leave_one_out": "influence",
    "minimize": "implicit",
    "root": "implicit",
    "solve": "solvers",
}
_ROOMS = (
    "apps",
    "bilevel",
    "curvature",
    "decompositions",
    "errors",
    "implicit",
    "influence",
    "kernels",
    "operators",
    "solvers",
    "spaces",
    "spectra",
)

__all__ = [
    "CG",
    "CUR",
    "GMRES",
    "LDL",
    "LSMR",
    "LSQR",
    "MINRES",
    "QR",
    "SOR",
    "SSOR",
    "UTV",
    "Auto",
    "BiCGSTAB",
    "BlockDiagonal",
    "BlockJacobi",
    "Chebyshev",
    "Cholesky",
    "Deflation",
    "Dense",
    "Diagonal",
    "Eigh",
    "Fisher",
    "FunctionOperator",
    "GaussNewton",
    "GaussSeidel",
    "GeneralizedNystrom",
    "GradientBuffer",
    "GradientWindow",
    "Hessian",
    "Identity",
    "IncompleteCholesky",
    "IncompleteLU",
    "Influence",
    "Jacobi",
    "Jacobian",
    "Kaczmarz",
    "Kernel",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "NearestKronecker",
    "Neumann",
    "Nystrom",
    "Objective",
    "Richardson",
    "SketchPrecondition",
    "SketchProject",
    "Solution",
    "SolveStatus",
    "Space",
    "Sparse",
    "SparseCholesky",
    "SparseLU",
    "__version__",
    "check_hypergradient",
    "clean",
    "errors",
    "fixed_point",
    "hypergradient",
    "inverse",
    "leave_one_out",
    "minimize",
    "root",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
