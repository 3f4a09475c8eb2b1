"""Factorisations of dense matrices (and of stacks of them) that a solve can be made from.

One place decides how a dense matrix is factorised and when it counts as singular:

- half precision is factorised in float32 (LAPACK has nothing smaller), float32 and above as they
  are; results come back in the matrix's dtype;
- a matrix is refused as singular where its reciprocal condition number in the 1-norm is below the
  machine epsilon, the criterion of LAPACK's expert drivers (``xGESVX``, ``xPOSVX``); that number is
  estimated by Hager's method with a few solves, not by forming an inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import NonFiniteError, NotPositiveDefiniteError, SingularError
from woodbury.operators.dtypes import real_dtype, working_dtype
from woodbury.operators.tags import Tags

__all__ = [
    "Factorization",
    "factorize",
    "norm_of_inverse",
    "reciprocal_condition",
    "require_finite",
    "working_dtype",
]

_HAGER_STEPS = 5


@dataclass(frozen=True)
class Factorization:
    """A factorised matrix ``[n, n]`` or a stack ``[..., n, n]``.

    Args:
        kind: ``"cholesky"``, ``"lu"``, ``"lower"`` or ``"upper"``.
        factor: the packed factor in the working dtype.
        pivots: row exchanges of ``"lu"``.
        dtype: dtype of the matrix, in which solutions are returned.
    """

    kind: str
    factor: Tensor
    pivots: Tensor | None
    dtype: torch.dtype

    def solve(self, B: Tensor, *, adjoint: bool = False) -> Tensor:
        """``A^-1 B`` (``A^-H B``) for ``B`` of shape ``[..., n, k]``."""
        B = B.to(self.factor.dtype)
        if self.kind == "cholesky":
            X = torch.cholesky_solve(B, self.factor)
        elif self.pivots is not None:
            X = torch.linalg.lu_solve(self.factor, self.pivots, B, adjoint=adjoint)
        else:
            upper = (self.kind == "upper") != adjoint
            X = torch.linalg.solve_triangular(
                self.factor.mH if adjoint else self.factor, B, upper=upper
            )
        return X.to(self.dtype)

    def logdet(self) -> Tensor:
        """``log |det A|``, one for each matrix of the stack."""
        logs = torch.diagonal(self.factor, dim1=-2, dim2=-1).abs().log().sum(-1)
        return (2 * logs if self.kind == "cholesky" else logs).to(real_dtype(self.dtype))


def factorize(matrix: Tensor, tags: Tags) -> Factorization:
    """Factorise ``[n, n]`` or ``[..., n, n]`` as its tags allow.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        NotPositiveDefiniteError: it is tagged positive definite and is not.
        SingularError: it is singular to working precision.
    """
    require_finite(matrix, "the matrix")
    work = matrix.to(working_dtype(matrix.dtype))
    pivots = None
    if "positive_definite" in tags:
        kind, factor = "cholesky", _cholesky(work)
    elif "lower_triangular" in tags or "upper_triangular" in tags:
        kind, factor = ("lower" if "lower_triangular" in tags else "upper"), work
        _require_pivots(factor)
    else:
        kind = "lu"
        factor, pivots, _ = torch.linalg.lu_factor_ex(work)
        _require_pivots(factor)
    result = Factorization(kind, factor, pivots, matrix.dtype)
    if matrix.numel():
        _require_condition(work.detach(), result)
    return result


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise :class:`NonFiniteError` at the first NaN or infinity."""
    bad = ~torch.isfinite(tensor.detach())
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        count = int(bad.sum())
        raise NonFiniteError(
            f"{what} has {count} non-finite entries, the first at {index}: {tensor[index].item()}"
        )


def _cholesky(work: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(work)
    failed = info.detach() != 0
    if not bool(failed.any()):
        return factor
    where = "" if info.dim() == 0 else f" of block {tuple(failed.nonzero()[0].tolist())}"
    order = int(info[failed][0])
    raise NotPositiveDefiniteError(
        f"tagged positive definite, but the leading minor of order {order}{where} is not positive; "
        "drop the tag, or add a multiple of the identity"
    )


def _require_pivots(factor: Tensor) -> None:
    pivots = torch.diagonal(factor.detach(), dim1=-2, dim2=-1)
    zero = pivots == 0
    if bool(zero.any()):
        index = tuple(zero.nonzero()[0].tolist())
        raise SingularError(
            f"the matrix is singular: pivot {index[-1] if len(index) == 1 else index} is 0 "
            "(reciprocal condition 0); add a multiple of the identity"
        )


def _require_condition(matrix: Tensor, factorization: Factorization) -> None:
    with torch.no_grad():
        rcond = _reciprocal_condition(matrix, factorization)
    eps = torch.finfo(matrix.dtype).eps
    worst = float(rcond.min())
    # Written so that NaN fails.
    if not worst >= eps:
        where = "" if rcond.dim() == 0 else f" (block {int(rcond.argmin())})"
        raise SingularError(
            f"the matrix is singular to working precision{where}: reciprocal condition {worst:.1e} "
            f"is below {eps:.1e}, the rounding of {matrix.dtype}; add a multiple of the identity"
            + ("" if matrix.dtype in (torch.float64, torch.complex128) else " or use float64")
        )


def _reciprocal_condition(matrix: Tensor, factorization: Factorization) -> Tensor:
    """``1 / (||A||_1 ||A^-1||_1)``, one for each matrix of the stack."""
    work = Factorization(
        factorization.kind, factorization.factor.detach(), factorization.pivots, matrix.dtype
    )
    if factorization.kind == "cholesky":  # only the lower triangle was read
        matrix = torch.tril(matrix) + torch.tril(matrix, -1).mH
    inverse_norm = norm_of_inverse(
        lambda B, adjoint: work.solve(B, adjoint=adjoint),
        matrix.shape[:-1],
        matrix.dtype,
        matrix.device,
    )
    return 1 / (matrix.abs().sum(-2).amax(-1) * inverse_norm)


def reciprocal_condition(
    matrix_norm: float, solve: Callable[[Tensor, bool], Tensor], like: Tensor
) -> float:
    """``1 / (||A||_1 ||A^-1||_1)`` from a few solves, an estimate from above.

    Args:
        matrix_norm: ``||A||_1``.
        solve: ``(B, adjoint) -> A^-1 B`` or ``A^-H B`` for ``[n, 1]``.
        like: tensor ``[n, ...]`` of the dtype and device of the solves.
    """
    n = like.shape[0]
    if n == 0 or matrix_norm == 0:
        return 1.0 if n == 0 else 0.0
    inverse_norm = norm_of_inverse(solve, torch.Size([n]), like.dtype, like.device).item()
    rcond = 1 / (matrix_norm * inverse_norm) if inverse_norm > 0 else 0.0
    return rcond if math.isfinite(rcond) else 0.0


def norm_of_inverse(
    solve: Callable[[Tensor, bool], Tensor],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """An estimate (a lower bound) of ``||A^-1||_1`` from a few solves.

    Args:
        solve: ``(B, adjoint) -> A^-1 B`` or ``A^-H B`` for ``[..., n, 1]``.
        shape: ``[..., n]``.
        dtype: dtype of the solves.
        device: device of the solves.

    Returns:
        One number for each matrix of the stack, ``[...]``.

    Source: Hager (1984); Higham (1988), algorithm 2.4, with its alternating test vector, as in
    LAPACK's ``xLACON``.
    """
    n = shape[-1]
    x = torch.full((*shape, 1), 1.0 / n, dtype=dtype, device=device)
    norm = torch.zeros(shape[:-1], dtype=real_dtype(dtype), device=device)
    for _ in range(_HAGER_STEPS):
        y = solve(x, False)
        size = y.abs().sum((-2, -1))
        if not bool((size > norm).any()):
            break
        norm = torch.maximum(norm, size)
        z = solve(torch.where(y == 0, torch.ones_like(y), torch.sgn(y)), True)
        x = torch.zeros_like(x).scatter_(-2, z.abs().argmax(-2, keepdim=True), 1.0)
    steps = torch.arange(n, dtype=norm.dtype, device=device)
    x = ((1 - 2 * (steps % 2)) * (1 + steps / max(n - 1, 1))).to(dtype)
    y = solve(x.unsqueeze(-1).expand(*shape, 1), False)
    return torch.maximum(norm, 2 * y.abs().sum((-2, -1)) / (3 * n))
