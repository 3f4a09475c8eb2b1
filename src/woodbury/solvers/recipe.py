"""What every recipe is: a frozen description of how to solve, apart from what it works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from woodbury.errors import ShapeError, TagError
from woodbury.solvers.columns import norms, width

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator
    from woodbury.solvers.pullback import Watch
    from woodbury.solvers.solution import SolveStatus

__all__ = ["Outcome", "Problem", "Progress", "Recipe", "State", "work_dtype"]

Progress = Callable[[int, float], object]


@dataclass(frozen=True, eq=False)
class State:
    """What a recipe prepared for one operator: a factor, a sketch, a preconditioner.

    It may be passed to later solves with the same or a similar operator of the same shape; the
    residual of each solve tells whether it is still good enough.

    Attributes:
        recipe: what prepared it.
        shape: shape of the operator.
        dtype: dtype of the operator.
        device: device of the operator.
        products: columns the operator was multiplied by.

    Example:
        >>> import torch
        >>> from woodbury import Cholesky, Dense, solve
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), tags={"positive_definite"})
        >>> state = Cholesky().prepare(A)
        >>> solve(A, torch.tensor([3.0, 4.0]), Cholesky(), state=state).value
        tensor([1., 1.])
    """

    recipe: Recipe
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    products: int

    @classmethod
    def of(cls, recipe: Recipe, A: LinearOperator, products: int = 0, **parts: Any) -> Any:
        """A state for ``A``; ``parts`` are the fields of the subclass."""
        return cls(recipe, A.shape, A.dtype, A.device, products, **parts)


@dataclass(frozen=True)
class Recipe:
    """How to solve: a frozen description that holds no data of any operator.

    A subclass gives ``_prepare`` (what is worth keeping between solves), ``_run`` (one solve of a
    block) and ``needs`` (tags without which it would be wrong). A recipe whose result is a fixed
    linear function of ``b`` also gives ``_apply`` and may then precondition another. One that sets
    ``rectangular`` takes operators ``[m, n]`` and returns the least-squares solution of smallest
    norm.

    Example:
        >>> from woodbury import CG, Nystrom
        >>> CG(rtol=1e-8, preconditioner=Nystrom(rank=20)) == CG(1e-8, preconditioner=Nystrom(20))
        True
    """

    needs: ClassVar[tuple[str, ...]] = ()
    # Whether it takes [m, n] operators and returns the least-squares solution of smallest norm.
    rectangular: ClassVar[bool] = False
    # Whether what it makes of a hermitian operator is hermitian, up to its tolerance.
    mirrors: ClassVar[bool] = True

    def check(self, A: LinearOperator) -> None:
        """Raise unless the recipe can work on ``A``.

        Raises:
            ShapeError: ``A`` is not square, and the recipe does not solve least squares.
            TagError: ``A`` lacks a tag that the method relies on.
        """
        name = type(self).__name__
        if not A.is_square and not self.rectangular:
            raise ShapeError(
                f"{name} needs a square operator, this one is {A.shape}; for least "
                "squares use LSMR() or QR()"
            )
        for tag in self.needs:
            if tag not in A.tags:
                raise TagError(
                    f"{name} needs the tag {tag!r}, {type(A).__name__} has {sorted(A.tags)}; if it "
                    f"holds, promise it where the operator is made, for example "
                    f"Dense(matrix, tags={{{tag!r}}})"
                )

    def prepare(self, A: LinearOperator) -> State:
        """Do the work that does not depend on ``b``, to be passed to solves as ``state=``.

        Raises:
            ShapeError: ``A`` is not square, and the recipe does not solve least squares.
            TagError: ``A`` lacks a tag that the method relies on.
            NotPositiveDefiniteError: ``A`` has no Cholesky factor.
            SingularError: ``A`` is singular and the recipe cannot do with that.
            NonFiniteError: the matrix holds NaN or infinity.
        """
        self.check(A)
        with torch.no_grad():
            return self._prepare(A)

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """The approximate inverse that this recipe stands for, as an operator.

        Raises:
            TagError: the recipe is not a fixed linear function of ``b``.
        """
        if type(self)._apply is Recipe._apply:
            raise TagError(
                f"{type(self).__name__} is not a fixed linear function of b, so it cannot "
                "precondition; use Jacobi, IncompleteCholesky, Nystrom or an operator"
            )
        from woodbury.solvers.inverse import AppliedRecipe

        return AppliedRecipe(A, self, state)

    def adjoint_state(self, A: LinearOperator, state: State) -> State:
        """The state for ``A.H``, for backward passes; ``state`` itself where ``A`` is hermitian."""
        return state if "hermitian" in A.tags else self.prepare(A.H)

    def _prepare(self, A: LinearOperator) -> State:
        return State.of(self, A)

    def _run(self, problem: Problem, state: Any) -> Outcome:
        raise NotImplementedError(f"{type(self).__name__} does not define _run")

    def _apply(self, A: LinearOperator, state: Any, B: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _apply")


@dataclass(eq=False)
class Problem:
    """One block of systems as a recipe meets it: no zero columns, entries of moderate size.

    ``b`` is ``[m]`` for one column and ``[m, k]`` for more, ``x0`` ``[n]`` or ``[n, k]``, in the
    dtype of the work (float32 where products are in half precision). ``products`` counts the
    columns that ``A`` or ``A.H`` was multiplied by.
    """

    A: LinearOperator
    b: Tensor
    x0: Tensor | None = None
    scales: Sequence[float] = (1.0,)
    watch: Watch | None = None
    progress: Progress | None = None
    history: list[list[float]] | None = None
    products: int = 0
    b_norms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.b_norms = norms(self.A.out_space, self.b)

    @property
    def width(self) -> int:
        """The number of columns."""
        return width(self.b)

    @property
    def silent(self) -> bool:
        """Whether nobody asked for history or progress."""
        return self.history is None and self.progress is None

    def tolerances(self, rtol: float, atol: float) -> list[float]:
        """The largest norm of ``b - A x`` that counts as converged, per column."""
        pairs = zip(self.b_norms, self.scales, strict=True)
        return [max(rtol * norm, atol / scale) for norm, scale in pairs]

    def product(self, X: Tensor) -> Tensor:
        """``A @ X``, counted; half-precision products of a float32 block."""
        if X.dim() == 1 and X.dtype == self.A.dtype and self.watch is None:
            self.products += 1
            return self.A._matvec(X)
        return self._multiply(self.A._matmat, X)

    def adjoint_product(self, Y: Tensor) -> Tensor:
        """``A.H @ Y``, counted; half-precision products of a float32 block."""
        return self._multiply(self.A._rmatmat, Y)

    def _multiply(self, hook: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        # What the operator would check of a vector holds here.
        self.products += width(X)
        block = X.unsqueeze(1) if X.dim() == 1 else X
        if X.dtype != self.A.dtype:
            block = block.to(self.A.dtype)
        if self.watch is not None:
            watch, self.watch = self.watch, None
            Y = watch.product(hook, block)
        else:
            Y = hook(block)
        if X.dtype != self.A.dtype:
            Y = Y.to(X.dtype)
        return Y.squeeze(1) if X.dim() == 1 else Y

    def residual(self, X: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        """``b - A X`` for all columns, or for the block ``X`` of those listed."""
        b = self.b if columns is None or X.dim() == 1 else self.b[:, list(columns)]
        return b - self.product(X)

    def start(self) -> tuple[Tensor, Tensor]:
        """The first iterate and its residual, both to be changed freely."""
        if self.x0 is None:
            shape = self.A.shape[1:] + self.b.shape[1:]
            return self.b.new_zeros(shape), self.b.clone()
        return self.x0.clone(), self.residual(self.x0)

    def note(self, step: int, residuals: Sequence[float]) -> None:
        """Record norms of the residual of all columns after a step, and show progress."""
        if self.silent:
            return
        relative = [r / norm for r, norm in zip(residuals, self.b_norms, strict=True)]
        if self.history is not None:
            self.history.append(relative)
        if self.progress is not None:
            self.progress(step, max(relative))


@dataclass(eq=False)
class Outcome:
    """What ``Recipe._run`` hands back; ``residuals`` only where they are true and of ``value``.

    ``state`` is what the solve learnt for the next one, in place of the state it was given.
    """

    value: Tensor
    statuses: list[SolveStatus]
    steps: int = 0
    residuals: list[float] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    state: State | None = None


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype vectors are kept in: float32 for half precision, otherwise the operator's."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
