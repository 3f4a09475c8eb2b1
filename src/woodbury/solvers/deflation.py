"""Conjugate gradients with deflation, for a sequence of systems."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.solvers.cg import CG
from woodbury.solvers.preconditioned import KrylovState, Preconditioned, preconditioning
from woodbury.solvers.recipe import Outcome, Problem, State
from woodbury.spaces import Space

__all__ = ["Deflation", "DeflationState"]


@dataclass(frozen=True, eq=False)
class DeflationState(KrylovState):
    r"""What one system leaves to the next, beside the preconditioner.

    Attributes:
        basis: Ritz vectors $W$ of $M A$ for its smallest eigenvalues, ``[n, r]``, with $W^H A W =
            I$ for the operator they come from; ``None`` before the first solve.
        image: $A W$ for that operator, ``[n, r]``.
        operator: that operator. With it the image is used again; for another one it is multiplied
            anew.
    """

    basis: Tensor | None = None
    image: Tensor | None = None
    operator: LinearOperator | None = None


@dataclass(frozen=True)
class Deflation(Preconditioned):
    r"""Conjugate gradients that keep the slowest directions from one system to the next.

    What a system with few small eigenvalues costs is the time to find their eigenvectors. Each
    solve leaves ``rank`` approximations $W$ of them in ``solution.state``; the caller hands that
    state to the solve of the next system, with the same or a slowly changing operator, where

    $$M_W = W E^{-1} W^H + (I - W E^{-1} (A W)^H)\, M\, (I - A W E^{-1} W^H), \qquad E = W^H A W,$$

    preconditions :class:`CG`: it is hermitian positive definite, and takes the eigenvalues of
    $M A$ that belong to $W$ to 1. $W$ are harmonic Ritz vectors: with $Z$ the old $W$ and the
    vectors that CG multiplied by $A$ (no further product is needed), those of
    $(AZ)^H M (AZ)\, y = \theta\, Z^H A Z\, y$ for the smallest $\theta$, taken anew whenever
    ``window`` vectors have come together. The first solve, without a state, takes the steps of CG.

    Args:
        rtol: converged when $\|b - A x\| \le$ ``rtol`` $\|b\|$.
        atol: or when $\|b - A x\| \le$ ``atol``.
        max_steps: limit of steps; default ``10 n``.
        preconditioner: $M$, as of :class:`CG`; what the first system prepared serves all.
        rank: vectors kept, at least 1.
        window: vectors collected before they are condensed; default ``2 rank``.

    Raises:
        TagError: the operator or the preconditioner is not known to be hermitian.
        ArgumentError: ``rank``, ``window`` or a limit makes no sense; or the recipe is to
            precondition another and its state has no vectors yet.

    Cost: per step one product, one with the preconditioner, $8 n r$ multiplications for the
    deflation, and on average $4 n (r + w)^2 / w$ for the vectors; ``rank`` products per system
    whose operator is not the last one's. Memory of $3 (r + w)$ vectors.

    Source: Saad, Yeung, Erhel and Guyomarc'h, "A deflated version of the conjugate gradient
    algorithm" (2000) for the harmonic vectors; Tang, Nabben, Vuik and Erlangga, "Comparison of
    two-level preconditioners" (2009) for the balancing form; Stathopoulos and Orginos, "Computing
    and deflating eigenvalues while solving multiple right-hand side linear systems" (2010) for the
    window.

    Example:
        >>> import torch
        >>> from woodbury import Deflation, Diagonal, solve
        >>> spectrum = torch.cat([torch.logspace(-5, -3, 8), torch.linspace(1, 2, 192)]).double()
        >>> state, steps = None, []
        >>> for shift in (0.0, 1e-6, 2e-6):
        ...     A = Diagonal(spectrum + shift, tags={"positive_definite"})
        ...     b = torch.ones(200, dtype=torch.float64)
        ...     solution = solve(A, b, Deflation(rank=8, rtol=1e-8), state=state)
        ...     state = solution.state
        ...     steps.append(solution.steps)
        >>> steps[1] < steps[0] / 2 and steps[2] < steps[0] / 2
        True
    """

    rank: int = field(default=10, kw_only=True)
    window: int | None = field(default=None, kw_only=True)

    needs: ClassVar[tuple[str, ...]] = ("hermitian",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ArgumentError(f"rank is {self.rank}; it must be at least 1")
        if self.window is not None and self.window < 1:
            raise ArgumentError(f"window is {self.window}; it must be at least 1")

    def _prepare(self, A: LinearOperator) -> DeflationState:
        state = super()._prepare(A)
        return DeflationState.of(self, A, state.products, preconditioner=state.preconditioner)

    def as_preconditioner(self, A: LinearOperator, state: State) -> LinearOperator:
        """$M_W$ for this operator, with the vectors of the state."""
        assert isinstance(state, DeflationState)  # made by _prepare or _run
        if state.basis is None:
            raise ArgumentError(
                "Deflation has no vectors before it has solved a system: solve one with it, and "
                "use Deflation().as_preconditioner(A, solution.state)"
            )
        image = state.image if state.operator is A else None
        image = A @ state.basis.to(A.dtype) if image is None else image
        return _Balanced(A, state.preconditioner, state.basis, image.to(state.basis.dtype))

    def _run(self, problem: Problem, state: DeflationState) -> Outcome:
        A, M = problem.A, state.preconditioner
        basis, image = state.basis, state.image
        outer = M
        if basis is not None:
            if image is None or state.operator is not A:
                image = problem.product(basis)
            outer = _Balanced(A, M, basis, image)
        vectors = _Vectors(A.space, M, self.rank, self.window or 2 * self.rank)
        if basis is not None and image is not None:
            vectors.add(basis, image)
        inner = replace(problem, A=_Recorder(A, vectors))
        recipe = CG(self.rtol, self.atol, self.max_steps, outer)
        outcome = recipe._run(inner, KrylovState.of(recipe, A, preconditioner=outer))
        problem.products, problem.watch = inner.products, inner.watch
        basis, image = vectors.condensed()
        outcome.state = replace(
            state, recipe=self, products=0, basis=basis, image=image, operator=A
        )
        outcome.info["recycled"] = 0 if basis is None else basis.shape[1]
        return outcome


class _Balanced(LinearOperator):
    """``M`` balanced by a coarse solve in the span of ``W``: hermitian positive definite."""

    def __init__(
        self, like: LinearOperator, M: LinearOperator | None, basis: Tensor, image: Tensor
    ) -> None:
        super().__init__(
            like.shape,
            dtype=like.dtype,
            device=like.device,
            tags={"positive_definite"},
            space=like.space,
        )
        self.precondition = preconditioning(M)
        core = like.space.gram(basis, image)
        core = core.to(torch.complex128 if core.is_complex() else torch.float64)
        values, vectors = torch.linalg.eigh((core + core.mH) / 2)
        # Directions that the operator does not have positive are left to CG, which reports them.
        kept = values > torch.finfo(basis.dtype).eps * values.abs().amax()
        turn = (vectors[:, kept] / values[kept].sqrt()).to(basis.dtype)
        self.basis, self.image = basis @ turn, image @ turn  # now E = I

    def _matmat(self, X: Tensor) -> Tensor:
        B = X.to(self.basis.dtype)
        inside = self.space.gram(self.basis, B)
        R = B - self.image @ inside
        Z = R if self.precondition is None else self.precondition(R)
        Z = Z + self.basis @ (inside - self.space.gram(self.image, Z))
        return Z.to(self.dtype)


class _Vectors:
    """Pairs ``z, A z``, condensed to the harmonic Ritz vectors of the smallest eigenvalues."""

    def __init__(self, space: Space, M: LinearOperator | None, rank: int, window: int) -> None:
        self.space, self.rank, self.limit = space, rank, rank + window
        self.precondition = preconditioning(M)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def add(self, Z: Tensor, AZ: Tensor) -> None:
        """Take pairs, as blocks."""
        self.pairs.append((Z.clone(), AZ.clone()))
        self.count += Z.shape[1]
        if self.count >= self.limit:
            self._condense()

    def condensed(self) -> tuple[Tensor | None, Tensor | None]:
        """``W`` and ``A W`` of what has come together."""
        if self.count:
            self._condense()
        return self.pairs[0] if self.pairs else (None, None)

    def _condense(self) -> None:
        Z, AZ = (torch.cat(parts, 1) for parts in zip(*self.pairs, strict=True))
        self.pairs, self.count = [], 0
        wide = torch.complex128 if Z.is_complex() else torch.float64
        energies = self.space.inner(Z, AZ).real
        good = torch.isfinite(energies) & (energies > 0)
        scales = energies[good].rsqrt()
        Z, AZ = Z[:, good] * scales, AZ[:, good] * scales
        if not Z.shape[1]:
            return
        MAZ = AZ if self.precondition is None else self.precondition(AZ)
        metric = self.space.gram(Z, AZ).to(wide)
        target = self.space.gram(AZ, MAZ).to(wide)
        values, vectors = torch.linalg.eigh((metric + metric.mH) / 2)
        # Directions that are dependent to rounding would bring noise of the size of their norm.
        kept = values > torch.finfo(Z.dtype).eps ** 0.75 * values[-1]
        white = vectors[:, kept] / values[kept].sqrt()
        target = white.mH @ ((target + target.mH) / 2) @ white
        if not bool(torch.isfinite(target).all()):
            return
        _, inside = torch.linalg.eigh(target)
        turn = (white @ inside[:, : self.rank]).to(Z.dtype)
        self.pairs, self.count = [(Z @ turn, AZ @ turn)], turn.shape[1]


class _Recorder(LinearOperator):
    """An operator that hands over what it was multiplied by, and the products."""

    def __init__(self, operator: LinearOperator, vectors: _Vectors) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            tags=operator.tags,
            space=operator.space,
            out_space=operator.out_space,
        )
        self.operator, self.vectors = operator, vectors

    def _matvec(self, x: Tensor) -> Tensor:
        y = self.operator._matvec(x)
        self._hand_over(x.unsqueeze(1), y.unsqueeze(1))
        return y

    def _matmat(self, X: Tensor) -> Tensor:
        Y = self.operator._matmat(X)
        self._hand_over(X, Y)
        return Y

    def _hand_over(self, X: Tensor, Y: Tensor) -> None:
        half = X.dtype in (torch.float16, torch.bfloat16)
        work = torch.float32 if half else X.dtype
        self.vectors.add(X.detach().to(work), Y.detach().to(work))
