"""A deep equilibrium layer: the fixed point of a module."""

from __future__ import annotations

from typing import Any

import torch

from woodbury.errors import ArgumentError
from woodbury.implicit.anderson import Anderson
from woodbury.implicit.iteration import InnerSolver
from woodbury.implicit.modes import Mode, mode_of

__all__ = ["DeepEquilibrium"]


class DeepEquilibrium(torch.nn.Module):
    r"""The layer $z = T_w(z, u)$: a module repeated until nothing changes, in constant memory.

    The solver runs without a graph; a backward pass solves $(I - \partial T/\partial z)^T\lambda =
    g$ once, for the inputs and all parameters of the module together.

    Args:
        step: module $T$, called ``step(z, *inputs)``; it returns what is like ``z``. It must be
            deterministic: no dropout, no batch norm in training mode.
        solver: of fixed points: :class:`Anderson`, :class:`Broyden`.
        mode: how it is differentiated, by name or with its settings:
            ``Implicit(GMRES(rtol=1e-3))`` for speed, ``"phantom"`` without a solve.
        throw: raise where the solver does not reach its tolerance; otherwise warn where the result
            is no fixed point.

    Raises:
        ArgumentError: ``step`` is no module, or ``solver`` does not solve fixed points.

    Cost: the evaluations of the solver; memory of one evaluation; one solve per backward pass.

    Source: Bai, Kolter and Koltun, "Deep equilibrium models" (2019).

    Example:
        >>> import torch
        >>> from woodbury.implicit import DeepEquilibrium
        >>> class Step(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 3)
        ...
        ...     def forward(self, z, u):
        ...         return 0.5 * torch.tanh(self.linear(z)) + u
        >>> layer, u = DeepEquilibrium(Step()), torch.ones(2, 3)
        >>> z = layer(torch.zeros(2, 3), u)
        >>> z.sum().backward()
        >>> layer.step.linear.weight.grad.shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        step: torch.nn.Module,
        solver: InnerSolver | None = None,
        *,
        mode: str | Mode = "implicit",
        throw: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(step, torch.nn.Module):
            raise ArgumentError(
                f"step is {type(step).__name__}; a function goes to fixed_point, a layer takes a "
                "module"
            )
        solver = Anderson(tol=1e-5) if solver is None else solver
        if (
            not isinstance(solver, InnerSolver)
            or solver.condition(lambda z: z).kind != "fixed_point"
        ):
            raise ArgumentError(
                f"{type(solver).__name__} does not solve fixed points; use Anderson or Broyden"
            )
        self.step = step
        self.solver = solver
        self.mode = mode_of(mode)
        self.throw = throw

    def forward(self, z0: Any, *inputs: Any) -> Any:
        """The fixed point.

        Args:
            z0: start, like the solution; zeros are usual.
            *inputs: what the module takes beside it.
        """

        def T(z: Any, parameters: dict[str, torch.Tensor], *inputs: Any) -> Any:
            return torch.func.functional_call(self.step, parameters, (z, *inputs))

        solve = self.solver.differentiable(T, mode=self.mode, throw=self.throw)
        return solve(z0, dict(self.step.named_parameters()), *inputs)
