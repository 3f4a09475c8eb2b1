"""The Jacobian of a condition at a solution, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from woodbury.errors import GradientError, WoodburyError
from woodbury.implicit.condition import FlatCondition
from woodbury.operators import LinearOperator
from woodbury.operators.parts import transforms_active

__all__ = ["ConditionJacobian"]


class ConditionJacobian(LinearOperator):
    r"""$A = \partial F(x, \theta) / \partial x$, made of $x$ and the tensors $\theta$.

    The condition is linearised once: products differentiate its graph again, one backward pass
    each ($A^T u$), or the graph of that ($A v$).

    Args:
        flat: the condition.
        x: flat solution ``[n]``.
        tensors: the tensors among the arguments.
    """

    _made_of = ("x", "tensors")
    _forgets = ("_linear",)

    def __init__(self, flat: FlatCondition, x: Tensor, tensors: Sequence[Tensor]) -> None:
        n = x.shape[0]
        super().__init__((n, n), dtype=x.dtype, device=x.device, tags=flat.condition.tags)
        self.flat = flat
        self.x = x
        self.tensors = tuple(tensors)
        self._linear: _Linear | None = None

    def residual(self, x: Tensor) -> Tensor:
        """``F`` at another point ``[n]``."""
        return self.flat(x, self.tensors)

    def _matmat(self, X: Tensor) -> Tensor:
        if "symmetric" in self.tags:
            return self._product(X, adjoint=True)
        return self._product(X, adjoint=False)

    def _matvec(self, x: Tensor) -> Tensor:
        if self._linear is None or torch.is_grad_enabled() or transforms_active():
            return super()._matvec(x)
        # What an iteration does most of the time, without the layers above.
        return self._linear.product("symmetric" in self.tags)(x.clone())

    def _rmatmat(self, Y: Tensor) -> Tensor:
        return self._product(Y, adjoint=True)

    def _product(self, X: Tensor, *, adjoint: bool) -> Tensor:
        try:
            if torch._C._are_functorch_transforms_active():
                return _columns(self._transformed(adjoint), X, batched=True)
            parts = (X, self.x, *self.tensors)
            if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
                return _columns(_Linear(self, further=True).product(adjoint), X, batched=False)
            if self._linear is None:
                self._linear = _Linear(self, further=False)
            return self._linear.block(X, adjoint)
        except WoodburyError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if "modified by an inplace operation" in str(error):
                raise
            raise GradientError(
                f"{self.flat.condition.name} cannot be differentiated with respect to the solution "
                f"({type(error).__name__}: {error})"
            ) from error

    def _transformed(self, adjoint: bool) -> Callable[[Tensor], Tensor]:
        pull = torch.func.vjp(self.residual, self.x)[1]
        if adjoint:
            return lambda u: pull(u)[0]
        # The pullback is linear, and its own pullback is the tangent: no forward mode to nest.
        push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(self.x))[1]
        return lambda v: push(v)[0]


class _Linear:
    """``F`` linearised at one point by a graph that is differentiated once per product."""

    def __init__(self, A: ConditionJacobian, *, further: bool) -> None:
        self.further = further
        with torch.enable_grad():
            keep = further and A.x.requires_grad
            self.x = A.x.view_as(A.x) if keep else A.x.detach().requires_grad_()
            tensors = A.tensors if further else [t.detach() for t in A.tensors]
            self.value = A.flat(self.x, tensors)
        self.name = A.flat.condition.name
        self._dummy: Tensor | None = None
        self._pulled: Tensor | None = None

    def product(self, adjoint: bool) -> Callable[[Tensor], Tensor]:
        """One column times ``A^T`` or ``A``."""
        if not self.value.requires_grad:
            return torch.zeros_like  # F does not depend on x
        return self.pull if adjoint else self.push

    def block(self, X: Tensor, adjoint: bool) -> Tensor:
        """A block ``[n, k]`` times ``A^T`` or ``A``; the columns at once where torch can."""
        return _columns(self.product(adjoint), X, batched=False, grads=self._batched(adjoint))

    def pull(self, u: Tensor) -> Tensor:
        """``A^T u``."""
        return self._grad(self.value, self.x, u)

    def push(self, v: Tensor) -> Tensor:
        """``A v``."""
        pulled, dummy = self._transposed()
        return self._grad(pulled, dummy, v)

    def _transposed(self) -> tuple[Tensor, Tensor]:
        if self._pulled is None or self._dummy is None:
            with torch.enable_grad():
                self._dummy = torch.zeros_like(self.value, requires_grad=True)
                (found,) = torch.autograd.grad(
                    self.value, self.x, self._dummy, create_graph=True, allow_unused=True
                )
                self._pulled = self._dummy * 0 if found is None else found
        return self._pulled, self._dummy

    def _grad(self, of: Tensor, at: Tensor, along: Tensor, **how: Any) -> Tensor:
        (found,) = torch.autograd.grad(
            of,
            at,
            along,
            retain_graph=True,
            create_graph=self.further,
            allow_unused=True,
            **how,
        )
        return torch.zeros_like(along) if found is None else found

    def _batched(self, adjoint: bool) -> Callable[[Tensor], Tensor] | None:
        if not self.value.requires_grad:
            return None

        def rows(Y: Tensor) -> Tensor:
            of, at = (self.value, self.x) if adjoint else self._transposed()
            return self._grad(of, at, Y, is_grads_batched=True)

        return rows


def _columns(
    product: Callable[[Tensor], Tensor],
    X: Tensor,
    *,
    batched: bool,
    grads: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``product`` for each column of ``X [n, k]``."""
    if X.shape[1] == 1:
        # Where A is the identity the result may be the argument itself; operators hand back
        # memory of their own.
        return product(X[:, 0].clone()).unsqueeze(1)
    if batched:
        return torch.vmap(product, in_dims=1, out_dims=1)(X)
    if grads is not None:
        try:
            return grads(X.mT.contiguous()).mT
        except RuntimeError:
            pass  # an operation of F has no batching rule: column by column
    return torch.stack([product(x) for x in X.unbind(1)], dim=1)
