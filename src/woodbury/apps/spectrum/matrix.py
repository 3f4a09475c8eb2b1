"""A Matrix Market file as an operator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
import scipy.sparse

from woodbury.errors import DataError
from woodbury.operators.base import LinearOperator
from woodbury.operators.function import FunctionOperator
from woodbury.operators.sparse import Sparse

__all__ = ["Source", "read_matrix"]

# How far from its conjugate transpose a matrix may be, relative to its largest entry.
_ASYMMETRY = 1e-10


class Source(NamedTuple):
    """What is to be drawn, and what a report says of it."""

    operator: LinearOperator
    name: str
    facts: dict[str, Any]
    notes: list[str]


def read_matrix(path: Path, *, gram: bool = False, symmetric_part: bool = False) -> Source:
    """Read a file ``.mtx`` or ``.mtx.gz``.

    Args:
        path: the file; coordinate or array format, real, integer, pattern or complex.
        gram: take $A^H A$, whose eigenvalues are the squared singular values.
        symmetric_part: take $(A + A^H) / 2$.

    Raises:
        DataError: the file is not there or not of this format, or the matrix is not what can be
            drawn; the message says what to do.
    """
    if gram and symmetric_part:
        raise DataError("Give one of --gram and --symmetric-part, not both.")
    if not path.exists():
        raise DataError(f"There is no file {path}.")
    if path.is_dir() or not path.name.lower().endswith((".mtx", ".mtx.gz")):
        raise DataError(
            f"{path.name} is not a Matrix Market file. Give a file that ends in .mtx or .mtx.gz; "
            "scipy.io.mmwrite writes one."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = scipy.io.mmread(path, spmatrix=False)
    except MemoryError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path.name} cannot be read as Matrix Market ({said}).") from None
    A = scipy.sparse.csr_array(found)
    kind = np.complex128 if np.iscomplexobj(A.data) else np.float64
    A = A.astype(kind)
    rows, columns = A.shape
    if rows == 0 or columns == 0:
        raise DataError(f"The matrix of {path.name} is empty ({rows} by {columns}).")
    bad = np.flatnonzero(~np.isfinite(A.data))
    if len(bad):
        coo = A.tocoo()
        i, j = int(coo.row[bad[0]]) + 1, int(coo.col[bad[0]]) + 1
        raise DataError(
            f"The matrix of {path.name} holds {coo.data[bad[0]]} in row {i}, column {j} (and "
            f"{len(bad) - 1} other places that are not finite). Correct the file."
        )
    facts = {"file": str(path), "rows": rows, "columns": columns, "entries": int(A.nnz)}
    name = path.name.removesuffix(".gz").removesuffix(".mtx")
    if gram:
        return Source(_gram(A), f"AᵀA of {name}", facts | {"matrix": "gram"}, [])
    if rows != columns:
        raise DataError(
            f"The matrix of {path.name} is {rows} by {columns} and has no eigenvalues. Add --gram "
            "to draw the squares of its singular values."
        )
    notes = []
    gap = abs(A - A.conj().T)
    if symmetric_part:
        notes.append("The symmetric part (A + Aᴴ) / 2 is shown.")
    elif gap.nnz and gap.max() > _ASYMMETRY * abs(A).max():
        i, j = (int(k) for k in np.unravel_index(gap.argmax(), A.shape))
        raise DataError(
            f"The matrix of {path.name} is not symmetric: entry ({i + 1}, {j + 1}) is "
            f"{A[i, j]:.6g} and ({j + 1}, {i + 1}) is {A[j, i]:.6g}. Add --gram for the squares of "
            "its singular values, or --symmetric-part for the eigenvalues of (A + Aᵀ) / 2."
        )
    operator = Sparse(((A + A.conj().T) / 2).tocsr(), tags={"hermitian"})
    return Source(operator, name, facts | {"matrix": "given"}, notes)


def _gram(A: Any) -> LinearOperator:
    operator = Sparse(A)
    return FunctionOperator(
        lambda X: operator.rmatmat(operator @ X),
        (A.shape[1], A.shape[1]),
        tags={"positive_semidefinite"},
        dtype=operator.dtype,
    )
