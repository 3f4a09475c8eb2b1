"""Convex quadratic programs as a layer: batches, statuses, derivatives of any order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    SingularError,
)
from woodbury.implicit.interior_point import interior_point
from woodbury.implicit.projections.common import observe
from woodbury.implicit.sparse_programs import sparse_program
from woodbury.operators import LinearOperator, Sparse

__all__ = ["QuadraticProgram", "QuadraticProgramStatus", "quadratic_program", "solve_program"]


class QuadraticProgramStatus(Enum):
    """How a quadratic program ended; each member is a sentence that says what to do next.

    Example:
        >>> import torch
        >>> from woodbury.implicit import quadratic_program
        >>> found = quadratic_program(torch.zeros(1, 1), torch.ones(1), throw=False)
        >>> found.status.name
        'unbounded'
    """

    optimal = "The Karush-Kuhn-Tucker equations hold to the tolerance."
    infeasible = (
        "No point satisfies the constraints: multipliers that prove it were found. Loosen them."
    )
    unbounded = (
        "The objective has no minimum: a direction along which it falls for ever was found. Add a "
        "bound or a ridge."
    )
    max_steps = (
        "The tolerance was not reached. Scale the problem so that its entries are near one, or "
        "allow more steps or a larger tolerance."
    )


_STATUSES = tuple(QuadraticProgramStatus)


@dataclass(frozen=True)
class QuadraticProgram:
    r"""A solution of :func:`quadratic_program`.

    Attributes:
        value: $z$ ``[..., n]``, differentiable.
        equality: multipliers $\nu$ of the equations ``[..., p]``, differentiable.
        inequality: multipliers $\lambda \ge 0$ of the inequalities ``[..., m]``, differentiable.
        codes: index into the members of :class:`QuadraticProgramStatus` for each problem ``[...]``.
        residual: the largest violation of the optimality conditions, relative to the sizes of the
            terms in each, ``[...]``.
        margin: the smallest $\max(\lambda_i, h_i - g_i^T z)$ ``[...]``: where it is near zero, a
            constraint and its multiplier vanish together, the solution has a kink, and its
            derivative is not to be trusted.
        steps: interior-point steps taken.

    Example:
        >>> import torch
        >>> from woodbury.implicit import quadratic_program
        >>> found = quadratic_program(torch.eye(1), -torch.ones(1))
        >>> found.status, found.ok
        (<QuadraticProgramStatus.optimal: 'The Karush...tolerance.'>, True)
    """

    value: Tensor
    equality: Tensor
    inequality: Tensor
    codes: Tensor
    residual: Tensor
    margin: Tensor
    steps: int

    @property
    def status(self) -> QuadraticProgramStatus:
        """The status of the first problem that failed, or ``optimal``."""
        bad = self.codes[self.codes != 0]
        return _STATUSES[int(bad.flatten()[0])] if bad.numel() else _STATUSES[0]

    @property
    def ok(self) -> bool:
        """Whether every problem of the batch was solved."""
        return not bool(self.codes.any())


def quadratic_program(
    P: Tensor | Sparse,
    q: Tensor,
    A: Tensor | Sparse | None = None,
    b: Tensor | None = None,
    G: Tensor | Sparse | None = None,
    h: Tensor | None = None,
    *,
    tol: float = 1e-9,
    max_steps: int = 100,
    throw: bool = True,
) -> QuadraticProgram:
    r"""Minimise $\frac12 z^T P z + q^T z$ subject to $A z = b$ and $G z \le h$, a batch at once.

    Mehrotra's primal-dual interior-point method, in float64 whatever the dtype. The derivative
    solves with the Jacobian of the Karush-Kuhn-Tucker equations at the solution,
    $K = \begin{pmatrix} P & A^T & G^T \\ A & 0 & 0 \\ \operatorname{diag}(\lambda) G & 0 &
    \operatorname{diag}(G z - h) \end{pmatrix}$, factorised once for all six arguments: with
    $K^T d = (\bar z, \bar\nu, \bar\lambda)$ it is $\bar q = -d_z$, $\bar P = -d_z z^T$,
    $\bar b = d_\nu$, $\bar A = -\nu d_z^T - d_\nu z^T$, $\bar h = \lambda \odot d_\lambda$,
    $\bar G = -\lambda d_z^T - (\lambda \odot d_\lambda) z^T$. It can be differentiated again.

    Matrices that are :class:`~woodbury.Sparse`, all that are given, make it sparse, one problem on
    the CPU: each step factorises the Karush-Kuhn-Tucker matrix by SuperLU, and derivatives are with
    respect to the stored values, in reverse mode, of any order.

    Args:
        P: symmetric positive semidefinite ``[..., n, n]``; zero for a linear program. A sparse one
            stores both triangles.
        q: ``[..., n]``.
        A: equations ``[..., p, n]``, or ``None``.
        b: ``[..., p]``, with ``A``.
        G: inequalities ``[..., m, n]``, or ``None``.
        h: ``[..., m]``, with ``G``.
        tol: bound of the relative violation of each optimality condition.
        max_steps: interior-point steps.
        throw: raise where a problem of the batch is not solved.

    Returns:
        A :class:`QuadraticProgram`; leading dimensions are broadcast.

    Raises:
        ArgumentError: a matrix without its right-hand side; with ``throw``, a problem is infeasible
            or unbounded; ``P`` is not symmetric or has a negative eigenvalue.
        DtypeError: an argument is not real, or dtypes differ.
        NonFiniteError: an argument is NaN or infinite; with ``throw``, the tolerance was not
            reached.
        ShapeError: shapes do not fit.
        SingularError: in the backward pass, the derivative does not exist: constraints depend on
            each other, or one of them and its multiplier are both zero.

    Cost: some ten factorisations of order ``n + p``, ``O((n + p)^3 + m n^2)`` each; one of order
    ``n + p + m`` for each backward pass; dense.

    Source: Nocedal and Wright, "Numerical Optimization" (2nd ed.), algorithm 16.4; Amos and Kolter
    2017, equation 8.

    Example:
        >>> import torch
        >>> from woodbury.implicit import quadratic_program
        >>> q = torch.tensor([-1.0, 0.5], requires_grad=True)
        >>> found = quadratic_program(torch.eye(2), q, G=-torch.eye(2), h=torch.zeros(2))
        >>> found.value.detach().round(decimals=4)
        tensor([1., 0.])
        >>> found.value.sum().backward()
        >>> q.grad.round(decimals=4).abs()
        tensor([1., 0.])
    """
    return solve_program(P, q, A, b, G, h, tol=tol, max_steps=max_steps, throw=throw)


def solve_program(
    P: Tensor | Sparse,
    q: Tensor,
    A: Tensor | Sparse | None,
    b: Tensor | None,
    G: Tensor | Sparse | None,
    h: Tensor | None,
    *,
    tol: float,
    max_steps: int,
    throw: bool,
    barrier: float = 0.0,
) -> QuadraticProgram:
    """:func:`quadratic_program`, or the point of its central path at the ``barrier``.

    There the equations that are differentiated are the same, up to a constant.
    """
    if not tol > 0 or max_steps < 1:
        raise ArgumentError(f"tol is {tol} and max_steps {max_steps}; both must be positive")
    for one, other, names in ((A, b, "A and b"), (G, h, "G and h")):
        if (one is None) != (other is None):
            raise ArgumentError(f"{names} belong together: give both or neither")
    if any(isinstance(M, LinearOperator) for M in (P, A, G)):
        z, nu, lam, report, count = sparse_program(P, q, A, b, G, h, tol=tol, max_steps=max_steps)
        return _result(z, nu, lam, report, count, q.dtype, throw, max_steps)
    given = _checked(P, q, A, b, G, h)  # type: ignore[arg-type]  # tensors by now
    doubles = [t.double() for t in given]
    n, p, m = given[1].shape[-1], given[3].shape[-1], given[5].shape[-1]
    steps = [0]

    def search(*plain: Tensor) -> Tensor:
        found, steps[0] = interior_point(*plain, tol=tol, max_steps=max_steps, barrier=barrier)
        return found

    packed = observe(search, *doubles)
    z, nu, lam, report = packed.split([n, p, m, 3], -1)
    z, nu, lam = _Attached.apply(z, nu, lam, *doubles)
    return _result(z, nu, lam, report, steps[0], q.dtype, throw, max_steps)


def _result(
    z: Tensor,
    nu: Tensor,
    lam: Tensor,
    report: Tensor,
    steps: int,
    dtype: torch.dtype,
    throw: bool,
    max_steps: int,
) -> QuadraticProgram:
    if throw:
        observe(lambda c: _raise(c, max_steps), report)
    return QuadraticProgram(
        value=z.to(dtype),
        equality=nu.to(dtype),
        inequality=lam.to(dtype),
        codes=report[..., 0].long(),
        residual=report[..., 1],
        margin=report[..., 2],
        steps=steps,
    )


def _raise(report: Tensor, max_steps: int) -> Tensor:
    codes = report[..., 0].long()
    if bool(codes.any()):
        code = int(codes[codes != 0].flatten()[0])
        where = (codes != 0).nonzero()[0].tolist()
        place = f" (problem {where} of the batch)" if where else ""
        residual = report[..., 1][codes != 0].flatten()[0].item()
        message = f"{_STATUSES[code].value}{place} Relative residual {residual:.1e}."
        if _STATUSES[code] is QuadraticProgramStatus.max_steps:
            raise NonFiniteError(f"{message} max_steps was {max_steps}.")
        raise ArgumentError(message)
    return codes


def _checked(
    P: Tensor, q: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> list[Tensor]:
    """All six arguments, empty ones for what is missing, broadcast to one batch."""
    named = {"P": P, "q": q, "A": A, "b": b, "G": G, "h": h}
    present = {name: t for name, t in named.items() if t is not None}
    for name, t in present.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise DtypeError(f"{name} is {kind}; a real floating-point tensor is needed")
        if t.dtype != q.dtype:
            raise DtypeError(f"{name} is {t.dtype} and q is {q.dtype}; convert one")
        if t.dim() < (2 if name in "PAG" else 1):
            raise ShapeError(f"{name} has shape {tuple(t.shape)}, too few dimensions")
    n = q.shape[-1]
    if n == 0 or P.shape[-2:] != (n, n):
        raise ShapeError(f"P has shape {tuple(P.shape)} and q {tuple(q.shape)}")
    empty = q.new_zeros(0)
    A, b = (q.new_zeros(0, n), empty) if A is None or b is None else (A, b)
    G, h = (q.new_zeros(0, n), empty) if G is None or h is None else (G, h)
    for names, M, v in (("A and b", A, b), ("G and h", G, h)):
        if M.shape[-1] != n or M.shape[-2] != v.shape[-1]:
            raise ShapeError(f"{names} have shapes {tuple(M.shape)} and {tuple(v.shape)}, n is {n}")
    matrices, vectors = (P, A, G), (q, b, h)
    try:
        batch = torch.broadcast_shapes(
            *(M.shape[:-2] for M in matrices), *(v.shape[:-1] for v in vectors)
        )
    except RuntimeError as error:
        raise ShapeError(f"the leading dimensions do not broadcast: {error}") from error
    full = []
    for M, v in zip(matrices, vectors, strict=True):
        full += [M.expand(*batch, *M.shape[-2:]), v.expand(*batch, v.shape[-1])]

    def look(P: Tensor, *others: Tensor) -> Tensor:
        for name, t in zip("PqAbGh", (P, *others), strict=True):
            if not bool(torch.isfinite(t).all()):
                raise NonFiniteError(f"{name} has an entry that is NaN or infinite")
        size = P.abs().amax()
        if bool((P - P.mT).abs().amax() > 1e-6 * size):
            raise ArgumentError("P is not symmetric; use (P + P.mT) / 2")
        values = torch.linalg.eigvalsh(P)
        least = values.amin()
        if bool(least < -1e3 * torch.finfo(P.dtype).eps * size * P.shape[-1]):
            raise ArgumentError(f"P has the eigenvalue {least.item():.1e}: not convex; add a ridge")
        return P

    observe(look, *full)
    return full


def _kkt_matrix(z: Tensor, lam: Tensor, P: Tensor, A: Tensor, G: Tensor, h: Tensor) -> Tensor:
    slack = (G @ z.unsqueeze(-1)).squeeze(-1) - h
    p, m = A.shape[-2], G.shape[-2]
    top = torch.cat([P, A.mT, G.mT], -1)
    middle = torch.cat([A, A.new_zeros(*A.shape[:-1], p + m)], -1)
    scaled = lam.unsqueeze(-1) * G
    bottom = torch.cat([scaled, G.new_zeros(*G.shape[:-1], p), torch.diag_embed(slack)], -1)
    return torch.cat([top, middle, bottom], -2)


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _solved(K: Tensor, right: Tensor) -> Tensor:
    """``K^-1 right`` by LU, refused where K is singular."""

    def look(K: Tensor) -> Tensor:
        singular = torch.linalg.cond(K, 1) > 1e14
        if bool(singular.any()):
            raise SingularError(
                "the Karush-Kuhn-Tucker matrix is singular: constraints depend on each other, or a "
                "constraint and its multiplier are both zero, so the solution has no derivative; "
                "add a small ridge to P, remove redundant constraints, or look at margin"
            )
        return K

    observe(look, K)
    return torch.linalg.solve(K, right.unsqueeze(-1)).squeeze(-1)


class _Attached(torch.autograd.Function):
    """A solution with the derivatives of one, in operations that can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, nu: Tensor, lam: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        return z.clone(), nu.clone(), lam.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output, *inputs[3:])
        ctx.save_for_forward(*output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, gz: Tensor, gnu: Tensor, glam: Tensor) -> tuple[Any, ...]:
        z, nu, lam, P, _, A, _, G, h = ctx.saved_tensors
        n, p, m = z.shape[-1], nu.shape[-1], lam.shape[-1]
        K = _kkt_matrix(z, lam, P, A, G, h)
        dz, dnu, dlam = _solved(K.mT, torch.cat([gz, gnu, glam], -1)).split([n, p, m], -1)
        weighted = lam * dlam
        return (
            None,
            None,
            None,
            -_outer(dz, z),
            -dz,
            -_outer(nu, dz) - _outer(dnu, z),
            dnu,
            -_outer(lam, dz) - _outer(weighted, z),
            weighted,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        z, nu, lam, P, q, A, b, G, h = ctx.saved_tensors
        dP, dq, dA, db, dG, dh = (
            torch.zeros_like(t) if d is None else d
            for d, t in zip(tangents[3:], (P, q, A, b, G, h), strict=True)
        )
        first = _times(dP, z) + dq + _times(dA.mT, nu) + _times(dG.mT, lam)
        third = lam * (_times(dG, z) - dh)
        right = torch.cat([first, _times(dA, z) - db, third], -1)
        moved = -_solved(_kkt_matrix(z, lam, P, A, G, h), right)
        return moved.split([z.shape[-1], nu.shape[-1], lam.shape[-1]], -1)
