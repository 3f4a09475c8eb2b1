"""``inverse(A, recipe)``: an operator whose products solve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.operators.base import LinearOperator
from woodbury.operators.parts import transforms_active
from woodbury.operators.tags import Tags, inverse_tags
from woodbury.solvers.solution import SolveReport

if TYPE_CHECKING:
    from woodbury.solvers.recipe import Recipe, State
    from woodbury.solvers.solve import OnFailure

__all__ = ["AppliedRecipe", "InverseOperator", "inverse"]


def _tags(A: LinearOperator, recipe: Recipe) -> Tags:
    """Tags of the inverse; a pseudo-inverse keeps less, and is not definite where ``A`` is not."""
    if not recipe.mirrors:
        return frozenset()
    if not recipe.rectangular:
        return inverse_tags(A.tags)
    mirrored = {"symmetric", "hermitian", "positive_semidefinite", "positive_definite", "diagonal"}
    return A.tags & mirrored


class InverseOperator(LinearOperator):
    """$A^{-1}$ whose products solve; made by :func:`~woodbury.inverse`.

    Attributes:
        operator: ``A``.
        recipe: how it solves.
        state: what was prepared once, for all products; ``None`` inside a transform of
            ``torch.func``, where each product prepares for itself.
        report: what the solves did; ``report.last`` is the last :class:`~woodbury.Solution`.

    Example:
        >>> import torch
        >>> from woodbury import Cholesky, Dense, inverse
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> inverse(A, Cholesky()).to_dense()
        tensor([[ 0.6000, -0.2000],
                [-0.2000,  0.4000]])
    """

    _made_of = ("operator",)
    _forgets = ("state", "_adjoint_state")

    def __init__(
        self,
        operator: LinearOperator,
        recipe: Recipe,
        state: State | None,
        on_failure: OnFailure,
        report: SolveReport,
    ) -> None:
        super().__init__(
            (operator.shape[1], operator.shape[0]),
            dtype=operator.dtype,
            device=operator.device,
            tags=_tags(operator, recipe),
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator = operator
        self.recipe = recipe
        self.state = state
        self.on_failure = on_failure
        self.report = report
        self._adjoint_state: State | None = None

    def _matmat(self, X: Tensor) -> Tensor:
        return self._solve(self.operator, X, self.state)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if self._adjoint_state is None and self.state is not None:
            with torch.no_grad():
                self._adjoint_state = self.recipe.adjoint_state(self.operator, self.state)
        return self._solve(self.operator.H, Y, self._adjoint_state)

    def _solve(self, A: LinearOperator, B: Tensor, state: State | None) -> Tensor:
        from woodbury.solvers.solve import solve_with_policy

        return solve_with_policy(
            A,
            B,
            self.recipe,
            state=state,
            on_failure=self.on_failure,
            backward=self.on_failure,
            report=self.report,
        ).value

    def _logdet(self) -> Tensor | None:
        found = self.operator._logdet() if self._has_inverse() else None
        return None if found is None else -found

    def _has_inverse(self) -> bool:
        # A pseudo-inverse may be of a singular or damped operator.
        return not self.recipe.rectangular and self.operator.has_inverse

    def _inverse(self) -> LinearOperator | None:
        return self.operator if self._has_inverse() else None


class AppliedRecipe(LinearOperator):
    r"""The fixed linear map $b \mapsto x$ of a recipe, without residual or status.

    What preconditions; for everything else use :func:`~woodbury.inverse`. ``tags`` are those of an
    inverse unless they are given.
    """

    def __init__(
        self,
        operator: LinearOperator,
        recipe: Recipe,
        state: State,
        *,
        tags: Tags | None = None,
    ) -> None:
        super().__init__(
            (operator.shape[1], operator.shape[0]),
            dtype=operator.dtype,
            device=operator.device,
            tags=_tags(operator, recipe) if tags is None else tags,
            space=operator.out_space,
            out_space=operator.space,
        )
        self.operator = operator
        self.recipe = recipe
        self.state = state
        self._adjoint_state: State | None = None

    def _matmat(self, X: Tensor) -> Tensor:
        return self.recipe._apply(self.operator, self.state, X)

    def _rmatmat(self, Y: Tensor) -> Tensor:
        if self._adjoint_state is None:
            self._adjoint_state = self.recipe.adjoint_state(self.operator, self.state)
        return self.recipe._apply(self.operator.H, self._adjoint_state, Y)


def inverse(
    A: LinearOperator,
    recipe: Recipe | None = None,
    *,
    on_failure: OnFailure = "raise",
    state: State | None = None,
    report: SolveReport | None = None,
) -> InverseOperator:
    r"""$A^{-1}$ as an operator: ``inverse(A, recipe) @ b`` solves $A x = b$.

    With a recipe for least squares (``LSMR``, ``LSQR``, ``QR``) it is the pseudo-inverse $A^+$, of
    rectangular operators too: ``[n, m]``, with the adjoint $(A^H)^+$.

    What the recipe prepares (a factor, a sketch) is prepared here, once, and used for all products.
    Products are differentiable as :func:`~woodbury.solve` is.

    Args:
        A: operator ``[m, n]``; square unless the recipe solves least squares.
        recipe: how to solve; the default is that of :func:`~woodbury.solve`.
        on_failure: what a failed solve does, in a product and in backward passes alike:
            ``"raise"``, ``"warn"``, return ``"nan"`` in the columns that failed, or ``"ignore"``.
        state: what was prepared earlier for a similar operator.
        report: receives what every solve did; also at hand as ``.report``.

    Returns:
        An :class:`InverseOperator` with the tags of ``A`` that an inverse keeps.

    Raises:
        ShapeError: ``A`` is not square, and the recipe does not solve least squares.
        TagError: the recipe relies on a tag that ``A`` does not have.
        NotPositiveDefiniteError: the recipe's factorisation does not exist.
        SingularError: ``A`` is singular and the recipe cannot do with that.
        ArgumentError: ``on_failure`` is unknown.

    Cost: preparation now, one solve per product.

    Example:
        >>> import torch
        >>> from woodbury import CG, Dense, inverse
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> inverse_A = inverse(A, CG())
        >>> inverse_A @ torch.tensor([3.0, 4.0])
        tensor([1.0000, 1.0000])
        >>> inverse_A.report.last.status.name
        'converged'
    """
    from typing import get_args

    from woodbury.errors import ArgumentError
    from woodbury.solvers.default import default_recipe
    from woodbury.solvers.solve import OnFailure

    if on_failure not in get_args(OnFailure):
        raise ArgumentError(
            f"on_failure is {on_failure!r}; it must be one of {list(get_args(OnFailure))}"
        )
    if recipe is None:
        recipe = default_recipe(A) if state is None else state.recipe
    recipe.check(A)
    # Inside a transform there are no plain numbers to prepare from; each solve prepares then.
    if state is None and not transforms_active():
        with torch.no_grad():
            state = recipe.prepare(A)
    return InverseOperator(A, recipe, state, on_failure, report or SolveReport())
