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
    from woodbury.curvature import Fisher, GaussNewton, Hessian, Jacobian, Objective
    from woodbury.influence import leave_one_out
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
        LDL,
        LSMR,
        LSQR,
        QR,
        Cholesky,
        Eigh,
        Neumann,
        Nystrom,
        Solution,
        SolveStatus,
        SparseCholesky,
        SparseLU,
        inverse,
        solve,
    )
    from woodbury.spaces import Space

_HOME = {
    "BlockDiagonal": "operators",
    "CG": "solvers",
    "Cholesky": "solvers",
    "Dense": "operators",
    "Diagonal": "operators",
    "Eigh": "solvers",
    "Fisher": "curvature",
    "FunctionOperator": "operators",
    "GaussNewton": "curvature",
    "Hessian": "curvature",
    "Identity": "operators",
    "Jacobian": "curvature",
    "Kernel": "operators",
    "Kronecker": "operators",
    "LSMR": "solvers",
    "LSQR": "solvers",
    "LinearOperator": "operators",
    "LowRank": "operators",
    "Neumann": "solvers",
    "Nystrom": "solvers",
    "Objective": "curvature",
    "LDL": "solvers",
    "QR": "solvers",
    "SparseCholesky": "solvers",
    "SparseLU": "solvers",
    "Solution": "solvers",
    "SolveStatus": "solvers",
    "Space": "spaces",
    "Sparse": "operators",
    "check_hypergradient": "bilevel",
    "clean": "apps.clean",
    "hypergradient": "bilevel",
    "inverse": "solvers",
    "leave_one_out": "influence",
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
)

__all__ = [
    "CG",
    "LDL",
    "LSMR",
    "LSQR",
    "QR",
    "BlockDiagonal",
    "Cholesky",
    "Dense",
    "Diagonal",
    "Eigh",
    "Fisher",
    "FunctionOperator",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Jacobian",
    "Kernel",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "Neumann",
    "Nystrom",
    "Objective",
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
    "hypergradient",
    "inverse",
    "leave_one_out",
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
