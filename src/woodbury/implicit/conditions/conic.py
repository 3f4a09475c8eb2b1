"""Cone programs: the residual of the homogeneous self-dual embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError
from woodbury.implicit.conditions.common import flagged
from woodbury.implicit.projections.second_order import project_second_order_cone
from woodbury.implicit.projections.semidefinite import project_semidefinite

__all__ = ["Cones", "conic_residual"]


@dataclass(frozen=True)
class Cones:
    r"""A product of cones, in the order of the rows: zero, nonnegative, second-order, semidefinite.

    A semidefinite matrix of order $k$ takes $k(k+1)/2$ rows: its lower triangle column by column,
    what is off the diagonal times $\sqrt 2$, so that inner products are those of the matrices.

    Args:
        zero: number of rows that are zero (equations).
        nonnegative: number of rows that are nonnegative.
        second_order: sizes of the second-order cones $(t, z)$, at least 2 each.
        semidefinite: orders of the semidefinite matrices.

    Raises:
        ArgumentError: a negative size, or one too small for its cone.

    Example:
        >>> import torch
        >>> from woodbury.implicit import Cones
        >>> Cones(zero=1, nonnegative=1).project(torch.tensor([2.0, -1.0]))
        tensor([0., 0.])
    """

    zero: int = 0
    nonnegative: int = 0
    second_order: tuple[int, ...] = ()
    semidefinite: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "second_order", tuple(self.second_order))
        object.__setattr__(self, "semidefinite", tuple(self.semidefinite))
        least = (("zero", (self.zero,), 0), ("nonnegative", (self.nonnegative,), 0))
        more = (("second_order", self.second_order, 2), ("semidefinite", self.semidefinite, 1))
        for name, sizes, bound in (*least, *more):
            for size in sizes:
                if not isinstance(size, int) or size < bound:
                    raise ArgumentError(f"{name} has the size {size!r}; it must be >= {bound}")

    @property
    def rows(self) -> int:
        """Number of rows of all cones."""
        matrices = sum(k * (k + 1) // 2 for k in self.semidefinite)
        return self.zero + self.nonnegative + sum(self.second_order) + matrices

    def project(self, y: Tensor) -> Tensor:
        """Projection of ``y`` ``[..., rows]`` onto the cone."""
        return self._project(y, dual=False)

    def project_dual(self, y: Tensor) -> Tensor:
        """Projection onto the dual cone, in which the zero rows are free."""
        return self._project(y, dual=True)

    def _project(self, y: Tensor, *, dual: bool) -> Tensor:
        if y.dim() == 0 or y.shape[-1] != self.rows:
            raise ShapeError(f"y has shape {tuple(y.shape)}; the cones have {self.rows} rows")
        matrices = [k * (k + 1) // 2 for k in self.semidefinite]
        first = [self.zero, self.nonnegative]
        pieces = list(y.split([*first, *self.second_order, *matrices], -1))
        equations, signs, *others = pieces
        found = [equations if dual else torch.zeros_like(equations)]
        found.append(torch.where(signs.detach() > 0, signs, 0))
        for _ in self.second_order:
            found.append(project_second_order_cone(others.pop(0)))
        for k, piece in zip(self.semidefinite, others, strict=True):
            found.append(_vector(project_semidefinite(_matrix(piece, k))))
        return torch.cat(found, -1)


def conic_residual(cones: Cones, *, homogeneous: bool = False) -> Callable[..., Any]:
    r"""The condition of a cone program $\min_z c^T z$ with $E z + s = d$, $s \in K$.

    $F = ((Q - I)\Pi + I)\, x$ with $x = (u, v, w)$, $\Pi$ the projection onto
    $\mathbb R^p \times K^* \times \mathbb R_+$ and
    $Q = \begin{pmatrix} 0 & E^T & c \\ -E & 0 & d \\ -c^T & -d^T & 0 \end{pmatrix}$: zero at
    $u = z$, $v = y - s$ with the dual variable $y$, $w = 1$. As $F$ is positively homogeneous, its
    Jacobian is singular along $x$ itself. So by default $w = 1$ is fixed and the last row, which
    follows from the others, is left out: two equations for $x = (u, v)$, regular where the
    solution is unique and strictly complementary. From $(u, v)$ follow
    $y = \Pi_{K^*}(v)$ and $s = y - v$.

    Args:
        cones: the cone $K$.
        homogeneous: keep $w$ and the last row; solve with its Jacobian by least squares.

    Returns:
        ``F(x, c, E, d)`` for ``x = (u, v)``, or ``(u, v, w)`` with ``w`` of shape ``[1]``;
        ``c`` ``[p]``, ``E`` ``[rows, p]``, ``d`` ``[rows]``; the value has the structure of ``x``.

    Raises:
        ArgumentError: ``cones`` is something else.
        ShapeError: ``E`` has not the rows of the cones.

    Cost: two products with ``E`` and a projection.

    Source: Busseti, Moursi and Boyd 2019, sections 2 and 3; Agrawal et al. 2019.

    Example:
        >>> import torch
        >>> from woodbury.implicit import Cones, conic_residual
        >>> F = conic_residual(Cones(nonnegative=1))  # min z with z >= 2
        >>> u, v = torch.tensor([2.0]), torch.tensor([1.0])
        >>> F((u, v), torch.ones(1), -torch.ones(1, 1), torch.tensor([-2.0]))
        (tensor([0.]), tensor([0.]))
    """
    if not isinstance(cones, Cones):
        raise ArgumentError(f"cones is {type(cones).__name__}; give Cones(...)")

    def condition(x: Any, c: Tensor, E: Tensor, d: Tensor) -> Any:
        if len(x) != (3 if homogeneous else 2):
            wanted = "(u, v, w)" if homogeneous else "(u, v)"
            raise ShapeError(f"x has {len(x)} parts; it must be {wanted}")
        u, v = x[0], x[1]
        if tuple(E.shape) != (cones.rows, u.shape[-1]):
            raise ShapeError(
                f"E has shape {tuple(E.shape)}; {cones.rows} rows of cones and {u.shape[-1]} "
                "variables were expected"
            )
        y = cones.project_dual(v)
        w = x[2] if homogeneous else torch.ones_like(u[:1])
        scale = torch.where(w.detach() > 0, w, 0)
        stationary = E.T @ y + c * scale
        feasible = -(E @ u) + d * scale - (y - v)
        if not homogeneous:
            return type(x)((stationary, feasible))
        gap = -(c @ u) - (d @ y) - scale + w
        return type(x)((stationary, feasible, gap))

    return flagged(condition, "conic_residual")


def _matrix(rows: Tensor, k: int) -> Tensor:
    """The symmetric matrix whose scaled lower triangle is given column by column."""
    where, scale = _places(k, rows)
    return (rows * scale.reciprocal())[..., where]


def _vector(X: Tensor) -> Tensor:
    k = X.shape[-1]
    columns, lines = torch.triu_indices(k, k, device=X.device)
    _, scale = _places(k, X)
    return X[..., lines, columns] * scale


def _places(k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which row of the triangle holds each entry ``[k, k]``, and the scale of each row."""
    columns, lines = torch.triu_indices(k, k, device=like.device)  # columns of the lower triangle
    where = torch.zeros(k, k, dtype=torch.long, device=like.device)
    where[lines, columns] = where[columns, lines] = torch.arange(len(lines), device=like.device)
    scale = torch.full(lines.shape, math.sqrt(2), dtype=like.dtype, device=like.device)
    scale[lines == columns] = 1
    return where, scale
