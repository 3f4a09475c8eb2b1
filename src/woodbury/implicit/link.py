"""A solution made differentiable by the implicit function theorem."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodbury.errors import GradientError, NotPositiveDefiniteError, SingularError
from woodbury.implicit.closures import Witness
from woodbury.implicit.condition import FlatCondition
from woodbury.implicit.jacobian import ConditionJacobian
from woodbury.operators import LinearOperator
from woodbury.solvers import CG, GMRES, LU, MINRES, Cholesky, Eigh, Recipe, SolveReport
from woodbury.solvers.pullback import pulled_back, pushed_forward, refuse_nested_forward_mode
from woodbury.solvers.solve import solve_with_policy

if TYPE_CHECKING:
    from woodbury.solvers.solve import OnFailure

__all__ = ["Link", "WarmStart", "attach_flat"]

# Up to this size a factorisation is the default.
_SMALL = 256


class WarmStart:
    r"""Keeps the last $\lambda = A^{-T} g$ and the last $\dot x$, where the next solves start.

    For outer loops, in which one system is close to the one before. Starts are not used inside
    transforms of ``torch.func``, and not where the size has changed.

    Attributes:
        adjoint: the last $\lambda$ ``[n]``, or ``None``.
        tangent: the last $\dot x$ ``[n]``, or ``None``.

    Example:
        >>> import torch
        >>> from woodbury.implicit import WarmStart, root
        >>> warm = WarmStart()
        >>> halve = root(lambda x, t: 2 * x - t, lambda x0, t: t / 2, warm=warm)
        >>> t = torch.ones(2, requires_grad=True)
        >>> halve(None, t).sum().backward()
        >>> warm.adjoint
        tensor([0.5000, 0.5000])
    """

    def __init__(self) -> None:
        self.adjoint: Tensor | None = None
        self.tangent: Tensor | None = None

    def start(self, b: Tensor, *, adjoint: bool) -> Tensor | None:
        """The start for a right-hand side like ``b``, if there is one."""
        kept = self.adjoint if adjoint else self.tangent
        if kept is None or torch._C._functorch.is_functorch_wrapped_tensor(b):
            return None
        fits = (kept.shape, kept.dtype, kept.device) == (b.shape, b.dtype, b.device)
        return kept if fits else None

    def keep(self, solution: Tensor, *, adjoint: bool) -> None:
        """Keep a plain and finite solution."""
        if torch._C._functorch.is_functorch_wrapped_tensor(solution):
            return
        found = solution.detach()
        if solution.dim() == 1 and bool(torch.isfinite(found).all()):
            setattr(self, "adjoint" if adjoint else "tangent", found.clone())


@dataclass(eq=False)
class Link:
    """How one solution hangs on its arguments, and how the systems in between are solved.

    Attributes:
        flat: the condition.
        recipe: how to solve; ``None`` for the default.
        on_failure: what a failed solve does.
        report: receives the solves.
        warm: where they start.
        witness: knows whether tensors that the condition closes over have changed.
    """

    flat: FlatCondition
    recipe: Recipe | None = None
    on_failure: OnFailure = "raise"
    report: SolveReport | None = None
    warm: WarmStart | None = None
    witness: Witness | None = None

    def jacobian(self, x: Tensor, tensors: Sequence[Tensor]) -> ConditionJacobian:
        """$A$ at ``x``."""
        return ConditionJacobian(self.flat, x, tensors)

    def solve(self, A: ConditionJacobian, b: Tensor, *, adjoint: bool) -> Tensor:
        """$A^{-1} b$ or $A^{-T} b$, differentiable in all."""
        recipe = default_recipe(A) if self.recipe is None else self.recipe
        operator: LinearOperator = A
        if adjoint and "hermitian" not in A.tags:
            operator, recipe = A.H, adjoint_recipe(recipe)
        start = None if self.warm is None else self.warm.start(b, adjoint=adjoint)
        try:
            solution = solve_with_policy(
                operator,
                b,
                recipe,
                on_failure=self.on_failure,
                backward=self.on_failure,
                x0=start,
                report=self.report,
            )
        except (SingularError, NotPositiveDefiniteError) as error:
            raise type(error)(
                f"the Jacobian {A.shape} of the condition {self.flat.condition.name} at the "
                f"solution cannot be inverted, so the solution has no derivative there: {error}. "
                "Where a singular one is meant, Implicit(LSMR()) gives the derivative of smallest "
                "norm; at a saddle point that is meant, Implicit(Eigh()) the derivative"
            ) from error
        if self.warm is not None:
            self.warm.keep(solution.value, adjoint=adjoint)
        return solution.value

    def pull(
        self, x: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], g: Tensor
    ) -> list[Tensor | None]:
        """$-B^T A^{-T} g$ for each tensor that is needed and differentiated: one solve for all."""
        wanted = self.flat.arguments.wanted
        with self.full_precision():
            adjoint = self.solve(self.jacobian(x, tensors), g, adjoint=True)
            return pulled_back(
                lambda x, *new: self.flat(x, new),
                x,
                tensors,
                [n and w for n, w in zip(needed, wanted, strict=True)],
                -adjoint,
                self.flat.condition.name,
            )

    def push(
        self, x: Tensor, tensors: Sequence[Tensor], directions: Sequence[Tensor | None]
    ) -> Tensor:
        r"""$-A^{-1} B \dot\theta$."""
        with self.full_precision():
            change = pushed_forward(
                lambda *new: self.flat(x, new), tensors, directions, self.flat.condition.name
            )
            return self.solve(self.jacobian(x, tensors), -change, adjoint=False)

    def full_precision(self) -> torch.autocast:
        """Autocast off: it would reach backward passes, and so the products of the solve."""
        return torch.autocast(self.flat.unknown.device.type, enabled=False)


def default_recipe(A: LinearOperator) -> Recipe:
    """A factorisation for small Jacobians, a Krylov method of the right symmetry for large ones."""
    small = A.shape[0] <= _SMALL
    if "positive_definite" in A.tags:
        return Cholesky() if small else CG()
    if "hermitian" in A.tags:
        return Eigh() if small else MINRES()
    return LU() if small else GMRES()


def adjoint_recipe(recipe: Recipe) -> Recipe:
    """The recipe for ``A.H``: a preconditioner $M$ of ``A`` turns into $M^H$."""
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if isinstance(value, LinearOperator):
            changes[entry.name] = value.H
        elif isinstance(value, Recipe):
            changes[entry.name] = adjoint_recipe(value)
    return dataclasses.replace(recipe, **changes) if changes else recipe


def attach_flat(link: Link, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """``x [n]`` with the derivatives of a solution."""
    return _Attach.apply(link, x, *tensors)


class _Attach(torch.autograd.Function):
    """``x`` to itself, with the derivative of a solution in the tensors."""

    @staticmethod
    def forward(link: Link, x: Tensor, *tensors: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        link, _, *tensors = inputs
        ctx.link = link
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        g = gradients[0]
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *tensors = _saved(ctx)
        return None, None, *ctx.link.pull(x, tensors, ctx.needs_input_grad[2:], g.contiguous())

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_nested_forward_mode()
        x, *tensors = _saved(ctx)
        wanted = ctx.link.flat.arguments.wanted
        directions = [d if w else None for d, w in zip(tangents[2:], wanted, strict=True)]
        if all(direction is None for direction in directions):
            return torch.zeros_like(x)
        return ctx.link.push(x, tensors, directions)

    @staticmethod
    def vmap(info: Any, in_dims: Any, link: Link, *tensors: Tensor) -> Any:
        samples = [
            t if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        batched = [dim is not None for dim in in_dims[1:]]
        found = [
            _Attach.apply(link, *(t[i] if b else t for t, b in zip(samples, batched, strict=True)))
            for i in range(info.batch_size)
        ]
        return torch.stack(found), 0


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors, unless something has been changed in place since."""
    link: Link = ctx.link
    if link.witness is not None:
        link.witness.check()
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        names = ", ".join(link.flat.arguments.names)
        raise GradientError(
            f"the solution or one of its arguments ({names}) was modified in place between the "
            "solution and its derivative, which would belong to another problem; an optimizer step "
            "does that: call backward() before it, or clone the tensor. torch says: "
            f"{error}"
        ) from error
