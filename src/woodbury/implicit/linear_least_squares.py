"""Linear least squares as a layer: batches, ridge, operators, derivatives of any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from woodbury.errors import (
    ArgumentError,
    DtypeError,
    GradientError,
    NonFiniteError,
    ShapeError,
    SingularError,
)
from woodbury.implicit.projections.common import observe
from woodbury.operators import Dense, LinearOperator
from woodbury.solvers import Recipe, SolveReport, solve

__all__ = ["least_squares"]


def least_squares(
    A: Tensor | LinearOperator,
    b: Tensor,
    *,
    ridge: float | Tensor = 0.0,
    recipe: Recipe | None = None,
    throw: bool = True,
    report: SolveReport | None = None,
) -> Tensor:
    r"""The minimiser of $\|A x - b\|^2 + \lambda\|x\|^2$, differentiable in $A$, $b$ and $\lambda$.

    Tensors are factorised, a batch at once, as $\begin{pmatrix} A \\ \sqrt\lambda I\end{pmatrix} =
    Q R$ in float64 whatever the dtype. The derivative takes $u = (A^T A + \lambda I)^{-1}\bar x$
    from the same factor and the residual $r = b - A x$: $\bar A = r u^T - A u\,x^T$,
    $\bar b = A u$, $\bar\lambda = -u^T x$; it can be differentiated again. With a recipe, and for
    operators, :func:`~woodbury.solve` does the work; a batch of tensors is then solved one by one.

    Args:
        A: ``[..., m, n]`` of any shape, or an operator ``[m, n]``, differentiated in all that it is
            made of.
        b: ``[..., m]``; beside an operator also a block ``[m, k]``.
        ridge: $\lambda \ge 0$, a number or a tensor ``[...]`` for the batch (a scalar beside an
            operator or a recipe); a tensor that requires a gradient must be positive there, since
            $\sqrt\lambda$ has no derivative at zero.
        recipe: how to solve, for least squares: :class:`~woodbury.QR` for any rank,
            :class:`~woodbury.LSMR`, :class:`~woodbury.SketchPrecondition`.
        throw: raise where the recipe fails.
        report: receives the solves of a recipe, forward and backward.

    Returns:
        $x$ ``[..., n]``, or ``[n, k]``; of smallest norm where the recipe says so.

    Raises:
        ArgumentError: the ridge is negative, or not positive where its derivative is needed.
        DtypeError: an argument is not real, or dtypes differ.
        GradientError: a ridge that requires a gradient has another shape than the problem takes.
        NonFiniteError: an argument is NaN or infinite.
        ShapeError: shapes do not fit.
        SingularError: without a recipe, $A$ has no full column rank and there is no ridge.
        SolveError: the recipe did not converge, and ``throw`` is true.

    Cost: one QR factorisation of ``[m + n, n]`` (``[m, n]`` without ridge), and for the backward
    pass triangular solves and two products; or that of the recipe, twice more backward.

    Source: Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares
    problems whose variables separate" (1973).

    Example:
        >>> import torch
        >>> from woodbury.implicit import least_squares
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], requires_grad=True)
        >>> b = torch.tensor([1.0, 2.0, 3.0])
        >>> x = least_squares(A, b, ridge=1.0)
        >>> x
        tensor([0.5000, 0.8000], grad_fn=...)
        >>> x.sum().backward()
        >>> A.grad[2]  # b_2 is not reached: the residual times (A^T A + I)^-1 1
        tensor([1.5000, 0.6000])
    """
    _check(A, b)
    if isinstance(A, LinearOperator):
        return _by_recipe(A, b, ridge, recipe, throw, report)
    if recipe is None:
        return _by_factor(A, b, ridge)
    batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1])
    if not batch:
        return _by_recipe(Dense(A), b, ridge, recipe, throw, report)
    rows = A.expand(*batch, *A.shape[-2:]).reshape(-1, *A.shape[-2:])
    right = b.expand(*batch, b.shape[-1]).reshape(-1, b.shape[-1])
    found = [
        _by_recipe(Dense(one), other, ridge, recipe, throw, report)
        for one, other in zip(rows, right, strict=True)
    ]
    return torch.stack(found).reshape(*batch, A.shape[-1])


def _check(A: Any, b: Any) -> None:
    for name, t in (("A", A), ("b", b)):
        real = isinstance(t, (Tensor, LinearOperator)) and t.dtype.is_floating_point
        if not real:
            kind = t.dtype if isinstance(t, (Tensor, LinearOperator)) else type(t).__name__
            raise DtypeError(f"{name} is {kind}; real floating-point numbers are needed")
    if A.dtype != b.dtype:
        raise DtypeError(f"A is {A.dtype} and b is {b.dtype}; convert one")
    if isinstance(A, Tensor):
        if A.dim() < 2 or 0 in A.shape or b.dim() < 1 or A.shape[-2] != b.shape[-1]:
            raise ShapeError(
                f"A has shape {tuple(A.shape)} and b {tuple(b.shape)}; expected [..., m, n] and "
                "[..., m], not empty"
            )
        try:
            torch.broadcast_shapes(A.shape[:-2], b.shape[:-1])
        except RuntimeError as error:
            raise ShapeError(f"the leading dimensions do not broadcast: {error}") from error


def _ridge(ridge: float | Tensor, like: Tensor, batch: torch.Size) -> Tensor:
    """The ridge as a tensor of float64 of the shape of the batch."""
    needs = isinstance(ridge, Tensor) and ridge.requires_grad
    value = ridge if isinstance(ridge, Tensor) else torch.tensor(ridge, dtype=torch.float64)
    value = value.to(like.device)
    if value.is_complex() or (needs and not value.is_floating_point()):
        raise DtypeError(f"ridge is {value.dtype}; a real number is needed")
    try:
        value = value.double().expand(batch)
    except RuntimeError as error:
        raise ShapeError(
            f"ridge has shape {tuple(value.shape)}, the problems {tuple(batch)}"
        ) from error

    def look(v: Tensor) -> Tensor:
        if not bool(torch.isfinite(v).all()):
            raise NonFiniteError("ridge is NaN or infinite")
        if bool((v < 0).any()) or (needs and bool((v == 0).any())):
            bound = "positive where its derivative is needed" if needs else ">= 0"
            raise ArgumentError(f"ridge is {v.min().item()}; it must be {bound}")
        return v

    observe(look, value)
    return value


def _by_recipe(
    A: LinearOperator,
    b: Tensor,
    ridge: float | Tensor,
    recipe: Recipe | None,
    throw: bool,
    report: SolveReport | None,
) -> Tensor:
    if isinstance(ridge, Tensor) and ridge.dim() > 0:
        raise GradientError(
            f"ridge has shape {tuple(ridge.shape)}; beside an operator or a recipe it is a scalar"
        )
    value = _ridge(ridge, b, torch.Size()).to(b.dtype)
    if not isinstance(ridge, Tensor) and ridge == 0:
        return solve(A, b, recipe, throw=throw, report=report).value
    right = torch.cat([b, b.new_zeros(A.shape[1], *b.shape[1:])])
    return solve(_Stacked(A, value.sqrt()), right, recipe, throw=throw, report=report).value


class _Stacked(LinearOperator):
    """``A`` above ``root I``."""

    _made_of = ("operator", "root")

    def __init__(self, operator: LinearOperator, root: Tensor) -> None:
        m, n = operator.shape
        super().__init__((m + n, n), dtype=operator.dtype, device=operator.device)
        self.operator, self.root = operator, root

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.cat([self.operator._matmat(X), self.root * X])

    def _rmatmat(self, Y: Tensor) -> Tensor:
        m = self.operator.shape[0]
        return self.operator._rmatmat(Y[:m]) + self.root * Y[m:]


def _by_factor(A: Tensor, b: Tensor, ridge: float | Tensor) -> Tensor:
    batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1])
    if isinstance(ridge, Tensor) and not batch:
        batch = ridge.shape
    value = _ridge(ridge, b, batch)
    wide_A = A.double().expand(*batch, *A.shape[-2:])
    wide_b = b.double().expand(*batch, b.shape[-1])
    n = A.shape[-1]
    plain = not isinstance(ridge, Tensor) and ridge == 0

    def factorise(A: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
        for name, t in (("A", A), ("b", b)):
            if not bool(torch.isfinite(t).all()):
                raise NonFiniteError(f"{name} has an entry that is NaN or infinite")
        if not plain:
            eye = torch.eye(n, dtype=A.dtype, device=A.device)
            A = torch.cat([A, ridge.sqrt()[..., None, None] * eye], -2)
            b = torch.cat([b, b.new_zeros(*b.shape[:-1], n)], -1)
        if A.shape[-2] < n:
            raise SingularError(
                f"A has {A.shape[-2]} rows and {n} columns: without a ridge the solution is not "
                "unique; add one, or take the one of smallest norm with recipe=QR()"
            )
        Q, R = torch.linalg.qr(A)
        if not bool((torch.linalg.cond(R, 1) < 0.1 / torch.finfo(R.dtype).eps).all()):
            raise SingularError(
                "A has no full column rank to working precision: the solution is not unique; add "
                "a ridge, or take the one of smallest norm with recipe=QR()"
            )
        x = torch.linalg.solve_triangular(R, Q.mT @ b.unsqueeze(-1), upper=True)
        return torch.cat([R, x.mT], -2)

    packed = observe(factorise, wide_A, wide_b, value)
    x: Tensor = _Attached.apply(packed[..., n, :], packed[..., :n, :], wide_A, wide_b, value)
    return x.to(b.dtype)


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


class _Attached(torch.autograd.Function):
    """A solution with its derivative, in operations that can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, R: Tensor, A: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, R, A, b, ridge = ctx.saved_tensors
        u = _Gram.apply(g, R, A, ridge)
        Au = _times(A, u)
        return None, None, _outer(b - _times(A, x), u) - _outer(Au, x), Au, -(u * x).sum(-1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, R, A, b, ridge = ctx.saved_tensors
        dA, db, dridge = (
            torch.zeros_like(t) if d is None else d
            for d, t in zip(tangents[2:], (A, b, ridge), strict=True)
        )
        change = _times(dA.mT, b - _times(A, x)) - dridge.unsqueeze(-1) * x
        return _Gram.apply(change + _times(A.mT, db - _times(dA, x)), R, A, ridge)


class _Gram(torch.autograd.Function):
    r"""$(A^T A + \lambda I)^{-1} c$ from the factor $R$ of that matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor, R: Tensor, A: Tensor, ridge: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(R.mT, c.unsqueeze(-1), upper=False)
        return torch.linalg.solve_triangular(R, half, upper=True).squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, R, A, ridge = ctx.saved_tensors
        u = _Gram.apply(g, R, A, ridge)
        return u, None, -A @ (_outer(u, y) + _outer(y, u)), -(u * y).sum(-1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        y, R, A, ridge = ctx.saved_tensors
        dc, dA, dridge = (
            torch.zeros_like(t) if d is None else d
            for d, t in zip((tangents[0], *tangents[2:]), (y, A, ridge), strict=True)
        )
        change = _times(dA.mT, _times(A, y)) + _times(A.mT, _times(dA, y))
        return _Gram.apply(dc - change - dridge.unsqueeze(-1) * y, R, A, ridge)
