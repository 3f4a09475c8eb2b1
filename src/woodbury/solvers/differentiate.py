r"""Derivatives of a solution with respect to ``b`` and to all that the operator is made of.

With $x = A(\theta)^{-1} b$ and a cotangent $g$ of $x$: $\lambda = A^{-H} g$ is that of ``b``, and
that of $\theta$ is the pullback of $-\lambda$ through the product $\theta \mapsto A(\theta)\,x$.
Both are written in terms of the output $x$ and of solves that are differentiable themselves, so
they hold to any order and in every transform of ``torch.func``. A tangent is $\dot x = A^{-1}(\dot
b - \dot A x)$.

For the least-squares solution of smallest norm, at locally constant rank (Golub and Pereyra 1973,
equation 4.12; in the range of full column rank the last term is zero), with $r = b - A x$,
$\dot x = A^+(\dot b - \dot A x) + A^+ A^{+H} \dot A^H r + (I - A^+ A)\dot A^H A^{+H} x$;
with damping $\delta$, and $N = A^H A + \delta^2 I$, it is $N^{-1}(A^H(\dot b - \dot A x) + \dot A^H
r)$.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import GradientError, WoodburyError
from woodbury.operators.base import LinearOperator
from woodbury.operators.parts import (
    is_opaque,
    parts,
    rebuilt,
    transforms_active,
    watched_tensors,
)
from woodbury.solvers.pullback import (
    Watch,
    pulled_back,
    pushed_forward,
    refuse_nested_forward_mode,
)
from woodbury.solvers.recipe import Recipe, State
from woodbury.solvers.solution import Solution, SolveStatus

__all__ = ["Related", "System"]

# (A, b, recipe, x0, state, watch) to a solution, on plain tensors, with the policy applied.
Run = Callable[..., Solution]
# (A, b, recipe, related) to the value of a solution that a derivative asks for.
Again = Callable[[LinearOperator, Tensor, Recipe, "Related"], Tensor]


@dataclass(frozen=True)
class Related:
    """A system whose state serves another: the same operator, or its adjoint."""

    system: System
    adjoint: bool

    def state(self, A: LinearOperator, recipe: Recipe) -> State | None:
        """The state for ``A``, from what the related system prepared."""
        found = self.system
        if not self.adjoint:
            return found.state
        origin = found.related
        if origin is not None and origin.adjoint:  # the adjoint of the adjoint
            return origin.system.state
        if found.adjoint_state is None and found.state is not None:
            found.adjoint_state = recipe.adjoint_state(A.H, found.state)
        return found.adjoint_state

    def child(self, index: int) -> Related:
        """What serves one sample of a batch of operators."""
        return Related(self.system.child(index), self.adjoint)


@dataclass(eq=False)
class System:
    """One linear system as automatic differentiation sees it.

    Attributes:
        A: the operator.
        recipe: how to solve.
        run: solves on plain tensors.
        again: solves a system that a derivative asks for.
        state: what was prepared.
        related: the system whose state serves this one.
    """

    A: LinearOperator
    recipe: Recipe
    run: Run
    again: Again
    state: State | None = None
    related: Related | None = None
    adjoint_state: State | None = None
    originals: tuple[Tensor, ...] = ()
    solved: list[Solution] = field(default_factory=list)
    children: dict[int, System] = field(default_factory=dict)
    batched: bool = False

    def solve(self, b: Tensor, x0: Tensor | None) -> Solution:
        """The solution, its value connected to ``b`` and to the tensors of the operator."""
        active = transforms_active()
        if active:
            return self._solve_inside_transforms(b, x0)
        if not torch.is_grad_enabled():
            return self._run(self.A, self.recipe, b.detach(), x0, None)
        watch = Watch(self.A) if is_opaque(self.A) else None
        solution = self._run(self.A, self.recipe, b.detach(), x0, watch)
        tensors = [part for part in parts(self.A) if part.requires_grad]
        if watch is not None and (watch.seen is not None or solution.ok):
            extra = watch.closed_over()
            tensors += [t for t in extra if not any(t is known for known in tensors)]
            solution = replace(solution, products=solution.products + watch.products)
        if not tensors and not b.requires_grad:
            return solution
        self.originals, self.solved = tuple(tensors), [solution]
        value, _ = _Solve.apply(self, None, b, *tensors)
        return replace(solution, value=value)

    def _solve_inside_transforms(self, b: Tensor, x0: Tensor | None) -> Solution:
        operators = [self.A, *_operators(self.recipe)]
        tensors = parts(*operators)
        for operator in operators:
            if is_opaque(operator):
                known = {id(t) for t in tensors}
                tensors += [t for t in watched_tensors(operator) if id(t) not in known]
        self.originals = tuple(tensors)
        value, residual = _Solve.apply(self, x0, b, *tensors)
        found = self._all_solved()
        if len(found) == 1 and not self.batched:
            return replace(found[0], value=value, residual=residual)
        return Solution(
            value=value,
            status=SolveStatus.worst(solution.status for solution in found),
            residual=residual,
            steps=max((solution.steps for solution in found), default=0),
            products=sum(solution.products for solution in found),
            recipe=self.recipe,
        )

    def _all_solved(self) -> list[Solution]:
        return [*self.solved, *(s for child in self.children.values() for s in child._all_solved())]

    def _run(
        self,
        A: LinearOperator,
        recipe: Recipe,
        b: Tensor,
        x0: Tensor | None,
        watch: Watch | None,
    ) -> Solution:
        state = self.state
        if state is None and self.related is not None:
            with torch.no_grad():
                state = self.related.state(A, recipe)
        solution = self.run(A, b, recipe, x0, state, watch)
        self.state = solution.state
        return solution

    def run_plain(self, b: Tensor, x0: Tensor | None, tensors: Sequence[Tensor]) -> Solution:
        """Solve with tensors that belong to no transform, which ``A`` itself may."""
        A, recipe = self.remade(tensors, plain=True)
        try:
            solution = self._run(A, recipe, b, x0, None)
        except RuntimeError as error:
            if isinstance(error, WoodburyError) or not is_opaque(self.A):
                raise
            raise self._out_of_reach() from error
        if torch._C._functorch.is_functorch_wrapped_tensor(solution.value):
            raise self._out_of_reach()
        self.solved.append(solution)
        return solution

    def _out_of_reach(self) -> GradientError:
        return GradientError(
            f"the products of {type(self.A).__name__} use tensors of a torch.func transform in a "
            "way that cannot be followed (in a custom autograd.Function, or a graph made before): "
            "write the product with plain tensor operations, or differentiate by backward()"
        )

    def remade(
        self, tensors: Sequence[Tensor], *, plain: bool = False
    ) -> tuple[LinearOperator, Recipe]:
        """The operator and the recipe with other tensors in the place of the original ones."""

        def renew(operator: LinearOperator) -> LinearOperator:
            return rebuilt(operator, self.originals, tensors, plain=plain)

        return renew(self.A), _renewed(self.recipe, renew)

    def child(self, index: int) -> System:
        """The system of one sample where the operators are batched."""
        if index not in self.children:
            related = None if self.related is None else self.related.child(index)
            self.children[index] = System(
                self.A,
                self.recipe,
                self.run,
                self.again,
                related=related,
                originals=self.originals,
            )
        return self.children[index]

    def inverse(self, A: LinearOperator, recipe: Recipe, b: Tensor) -> Tensor:
        """``A^-1 b`` in a derivative."""
        return self.again(A, b, recipe, Related(self, adjoint=False))

    def adjoint_inverse(self, A: LinearOperator, recipe: Recipe, g: Tensor) -> Tensor:
        """``A^-H g`` in a derivative."""
        return self.again(A.H, g, recipe, Related(self, adjoint=True))


class _Solve(torch.autograd.Function):
    """``(b, tensors of A)`` to the value and its residual."""

    @staticmethod
    def forward(
        system: System, x0: Tensor | None, b: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Outside transforms it is solved already; a view keeps graphs out of that solution.
        solution = system.solved[-1] if system.solved else system.run_plain(b, x0, tensors)
        return solution.value.view_as(solution.value), solution.residual.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        system, _, b, *tensors = inputs
        value, residual = output
        ctx.system = system
        ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)
        saved = (value, b if system.recipe.rectangular else None, *tensors)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if gradients[0] is None:
            return (None,) * (3 + len(ctx.saved_tensors) - 2)
        # The function that torch.func.vjp returns is called when its level has ended.
        g = _alive(gradients[0]).resolve_conj().contiguous()
        x, b, *tensors = [_alive(t) for t in ctx.saved_tensors]
        nothing = [None] * len(tensors)
        system: System = ctx.system
        A, recipe = system.remade(tensors)
        of_b = system.adjoint_inverse(A, recipe, g)
        needed = ctx.needs_input_grad[3:]
        if not any(needed):
            return None, None, of_b, *nothing
        # The cotangent of A is the sum of outer products of these columns.
        left, right = [-of_b], [x]
        if recipe.rectangular:
            left.append(b - A @ x)
            damping = getattr(recipe, "damping", 0.0)
            rest = g - A.H @ of_b
            if damping:
                right.append(rest / damping**2)
            else:
                right += [system.inverse(A, recipe, of_b), rest]
                left.append(system.adjoint_inverse(A, recipe, x))
        found = pulled_back(
            lambda X, *new: system.remade(new)[0] @ X,
            _side_by_side(right),
            tensors,
            needed,
            _side_by_side(left),
            type(system.A).__name__,
        )
        return None, None, of_b, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_nested_forward_mode()
        db, directions = tangents[2], tangents[3:]
        x, b, *tensors = ctx.saved_tensors
        system: System = ctx.system
        A, recipe = system.remade(tensors)
        if all(direction is None for direction in directions):
            return (None if db is None else system.inverse(A, recipe, db)), None

        def tangent_of(product: Callable[[LinearOperator], Tensor]) -> Tensor:
            return pushed_forward(
                lambda *new: product(system.remade(new)[0]),
                tensors,
                directions,
                type(system.A).__name__,
            )

        change = -tangent_of(lambda A: A @ x)
        dx = system.inverse(A, recipe, change if db is None else db + change)
        if not recipe.rectangular:
            return dx, None
        residual = b - A @ x
        turned = tangent_of(lambda A: A.H @ residual)
        above = system.adjoint_inverse(A, recipe, turned)
        damping = getattr(recipe, "damping", 0.0)
        if damping:
            return dx + (turned - A.H @ above) / damping**2, None
        dual = system.adjoint_inverse(A, recipe, x)
        beside = tangent_of(lambda A: A.H @ dual)
        beside = beside - system.inverse(A, recipe, A @ beside)
        return dx + system.inverse(A, recipe, above) + beside, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, x0: Any, b: Tensor, *tensors: Tensor) -> Any:
        system.batched = True
        size = info.batch_size
        b = _batch_first(b, in_dims[2], size)
        x0 = None if x0 is None else _batch_first(x0, in_dims[1], size)
        if all(dim is None for dim in in_dims[3:]):
            return _solve_as_columns(system, x0, b, tensors)
        batches = [_batch_first(t, dim, size) for t, dim in zip(tensors, in_dims[3:], strict=True)]
        found = [
            _Solve.apply(
                system.child(i),
                None if x0 is None else x0[i],
                b[i],
                *(batch[i] for batch in batches),
            )
            for i in range(size)
        ]
        values, residuals = zip(*found, strict=True)
        return (torch.stack(values), torch.stack(residuals)), (0, 0)


def _solve_as_columns(
    system: System, x0: Tensor | None, b: Tensor, tensors: Sequence[Tensor]
) -> Any:
    """A batch of right-hand sides is one block: ``[B, m, ...]`` becomes ``[m, B * ...]``."""
    size, rows, *rest = b.shape
    block = b.movedim(0, 1).reshape(rows, -1)
    start = None if x0 is None else x0.movedim(0, 1).reshape(x0.shape[1], -1)
    value, residual = _Solve.apply(system, start, block, *tensors)
    return (
        (value.reshape(value.shape[0], size, *rest), residual.reshape(size, *rest)),
        (1, 0),
    )


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _alive(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return torch._C._functorch.unwrap_if_dead(tensor)


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    if len(columns) == 1:
        return columns[0]
    return torch.cat([x.unsqueeze(1) if x.dim() == 1 else x for x in columns], dim=1)


def _operators(recipe: Recipe) -> Iterator[LinearOperator]:
    """The operators that a recipe holds: preconditioners."""
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if isinstance(value, LinearOperator):
            yield value
        elif isinstance(value, Recipe):
            yield from _operators(value)


def _renewed(recipe: Recipe, renew: Callable[[LinearOperator], LinearOperator]) -> Recipe:
    """The recipe with its operators renewed; itself where that changes none."""
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if isinstance(value, (LinearOperator, Recipe)):
            new = renew(value) if isinstance(value, LinearOperator) else _renewed(value, renew)
            if new is not value:
                changes[entry.name] = new
    return replace(recipe, **changes) if changes else recipe
