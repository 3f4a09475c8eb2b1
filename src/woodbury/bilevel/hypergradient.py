"""The hypergradient by the implicit function theorem, for any recipe of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Hessian, Objective
from woodbury.curvature.batches import Batches
from woodbury.errors import GradientError, NonFiniteError
from woodbury.operators import LinearOperator
from woodbury.solvers import CG, Recipe, Solution, solve
from woodbury.spaces import Space

__all__ = ["Hypergradient", "hypergradient"]

Tensors = Tensor | Mapping[str, Tensor]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Hypergradient:
    r"""A hypergradient and what is known about its error.

    Attributes:
        value: $dF/d\lambda$, in the structure (tensor or mapping) of ``hyper``.
        direct: the part $\partial f/\partial\lambda$.
        outer_value: $f(w, \lambda)$.
        stationarity: $\|\nabla_w g\|$; zero where the inner problem is solved.
        outer_error: $\langle q, \nabla_w g\rangle$ with $q = H^{-1}\nabla_w f$: to first order how
            far $f(w)$ is from $f(w^*)$ because the inner problem is not solved. It costs nothing.
        solution: the linear solve $H q = \nabla_w f$, with its status and true residual.

    Example:
        >>> import torch
        >>> from woodbury import CG, hypergradient
        >>> inner = lambda w, a: 0.5 * (w - a).square().sum()
        >>> outer = lambda w, a: w.sum()
        >>> result = hypergradient(inner, outer, torch.tensor([0.9]), torch.ones(1), CG())
        >>> result.value
        tensor([1.])
        >>> round(result.outer_error, 3)  # w is 0.9, not 1: the outer loss is off by that
        -0.1
        >>> result.certificate()["solve_status"]
        'the true residual is within the tolerance'
    """

    value: Tensors
    direct: Tensors
    outer_value: float
    stationarity: float
    outer_error: float
    solution: Solution

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the value: plain numbers and sentences."""
        residual = torch.as_tensor(self.solution.residual).max().item()
        return {
            "inner_stationarity": self.stationarity,
            "outer_error_from_inner": self.outer_error,
            "solve_residual": residual,
            "solve_status": self.solution.status.value,
            "products": self.solution.products,
        }


def hypergradient(
    inner: Loss,
    outer: Loss,
    params: Tensors,
    hyper: Tensors,
    recipe: Recipe | None = None,
    *,
    inner_data: Iterable[Any] | None = None,
    outer_data: Iterable[Any] | None = None,
    state: Any = None,
    x0: Tensor | None = None,
    throw: bool = True,
    cache: int | str | None = "auto",
) -> Hypergradient:
    r"""Gradient of $F(\lambda) = f(w^*(\lambda), \lambda)$ through the inner solution $w^*$.

    With $w^*(\lambda) = \arg\min_w g(w, \lambda)$, ``inner`` being $g$ and ``outer`` $f$,

    $$\frac{dF}{d\lambda} = \frac{\partial f}{\partial\lambda}
      - \frac{\partial^2 g}{\partial\lambda\,\partial w} H^{-1} \frac{\partial f}{\partial w},
      \qquad H = \frac{\partial^2 g}{\partial w^2},$$

    everything taken at ``params``, which should (nearly) minimise ``inner``; how nearly is reported
    as ``stationarity`` and ``outer_error``. Any recipe gives the inverse: ``CG()`` to a tolerance,
    ``Neumann(terms=K)`` (the truncated series of Lorraine et al.), ``Nystrom(rank=k, damping=rho)``
    (Hataya and Yamada), ``Cholesky()`` for small problems.

    Args:
        inner: ``inner(params, hyper, batch)``, the mean inner loss of a batch, a scalar; called
            without ``batch`` where ``inner_data`` is ``None``.
        outer: ``outer(params, hyper, batch)``, the same for the outer loss and ``outer_data``.
        params: the inner solution: a tensor, or a mapping from name to tensor (for a module,
            ``dict(model.named_parameters())`` with ``torch.func.functional_call`` in the losses).
        hyper: hyperparameters: a tensor or a mapping, of any number of entries.
        recipe: how to solve with the Hessian. Default ``CG()``.
        inner_data: re-iterable of batches; means are weighted by the number of rows of each batch.
        outer_data: likewise for the outer loss.
        state: what ``recipe.prepare`` returned for an earlier, nearby Hessian (a Nystrom sketch):
            reused instead of made again.
        x0: warm start ``[n]`` of the linear solve, for instance the last ``solution.value``.
        throw: raise if the solve fails (default); otherwise the status says so in the result.
        cache: memory for the linearisation of the inner loss; see :class:`woodbury.Hessian`.

    Returns:
        A :class:`Hypergradient`: value, certificate and the linear solve.

    Raises:
        GradientError: a hyperparameter enters neither loss, or the inner loss does not depend on a
            parameter.
        NonFiniteError: a loss or its gradient is NaN or infinite.
        SolveError: the solve did not converge and ``throw`` is true.

    Cost: two gradients, one mixed second derivative (about two gradients) and the products of the
    solve; memory of a few vectors of ``params`` and ``hyper`` besides the linearisation.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
    Differentiation" (AISTATS 2020), equations 2 and 3; the exact form is the implicit function
    theorem.

    Example:
        One weight decay for each of two weights, differentiated in closed form:

        >>> import torch
        >>> from woodbury import Cholesky, hypergradient
        >>> b = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> log_decay = torch.zeros(2, dtype=torch.float64)
        >>> def inner(w, log_decay):
        ...     return 0.5 * (w**2).sum() + 0.5 * (log_decay.exp() * w**2).sum() - (b * w).sum()
        >>> def outer(w, log_decay):
        ...     return 0.5 * (w**2).sum()
        >>> w_star = b / (1 + log_decay.exp())
        >>> result = hypergradient(inner, outer, w_star, log_decay, Cholesky())
        >>> result.value
        tensor([-0.1250, -0.5000], dtype=torch.float64)
        >>> result.stationarity
        0.0
    """
    problem = BilevelProblem(inner, outer, params, hyper, inner_data, outer_data)
    hessian = Hessian(problem.inner_objective(), cache=cache)
    return problem.hypergradient(hessian, recipe, state=state, x0=x0, throw=throw)


class BilevelProblem:
    """Both losses at one point, with named tensors and batch weights resolved."""

    def __init__(
        self,
        inner: Loss,
        outer: Loss,
        params: Tensors,
        hyper: Tensors,
        inner_data: Iterable[Any] | None,
        outer_data: Iterable[Any] | None,
    ) -> None:
        self.inner, self.outer = inner, outer
        self.params, self.params_named = _named(params, "params")
        self.hyper, self.hyper_named = _named(hyper, "hyper")
        self.space = Space.of(self.params)
        self.inner_data = inner_data
        self.data = {
            "inner": _batches(inner_data, self.space),
            "outer": _batches(outer_data, self.space),
        }

    def call(self, loss: Loss, which: str, params: Any, hyper: Any, batch: Any) -> Tensor:
        """``loss`` on one batch, as a checked scalar."""
        p = params if self.params_named else params[""]
        h = hyper if self.hyper_named else hyper[""]
        value = loss(p, h) if batch is None else loss(p, h, batch)
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise GradientError(
                f"the {which} loss returned {shape}; it must return a scalar tensor"
            )
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"the {which} loss is {value.item()}; check params, hyper and data for NaN"
            )
        return value

    def inner_objective(self) -> Objective:
        """The inner loss as an objective of ``params`` at fixed ``hyper``."""
        data = self.data["inner"]

        def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
            given = None if data is None else batch
            return self.call(self.inner, "inner", params, self.hyper, given)

        rows = [torch.zeros(1)] if data is None else self.inner_data
        return Objective.functional(loss, self.params, rows)

    def batches(self, which: str) -> Iterator[tuple[Any, float]]:
        """The batches of a loss with their share of the rows."""
        data = self.data[which]
        if data is None:
            yield None, 1.0
            return
        total = data.num_examples
        for batch in data.passes(f"{which} loss"):
            yield batch.data, batch.size / total

    def given_params(self) -> Tensors:
        """The parameters in the structure the losses take."""
        return self.params if self.params_named else self.params[""]

    def mean(self, which: str, params: Any, hyper: Any) -> Tensor:
        """The mean loss over its data as a differentiable scalar."""
        loss = self.inner if which == "inner" else self.outer
        parts = [self.call(loss, which, params, hyper, b) * s for b, s in self.batches(which)]
        return torch.stack(parts).sum()

    def outer_value(self) -> float:
        """The outer loss at this point."""
        with torch.no_grad():
            return self.mean("outer", self.params, self.hyper).item()

    def gradients(self, which: str) -> tuple[float, Tensor, dict[str, Tensor | None]]:
        """Mean loss, its gradient in params (flat) and in hyper (by name, ``None`` if unused)."""
        loss = self.inner if which == "inner" else self.outer
        params, hyper = _leaves(self.params), _leaves(self.hyper)
        inputs = [*params.values(), *hyper.values()]
        value = 0.0
        sums: list[Tensor | None] = [None] * len(inputs)
        for batch, share in self.batches(which):
            result = self.call(loss, which, params, hyper, batch)
            value += result.item() * share
            if not result.requires_grad:
                continue
            parts = torch.autograd.grad(result, inputs, allow_unused=True)
            sums = [_add_scaled(s, part, share) for s, part in zip(sums, parts, strict=True)]
        of_params = dict(zip(params, sums[: len(params)], strict=True))
        filled = {
            name: torch.zeros_like(params[name]) if part is None else part
            for name, part in of_params.items()
        }
        if which == "inner":
            unused = [name for name, part in of_params.items() if part is None]
            if unused:
                raise GradientError(
                    f"the inner loss does not depend on the parameters {unused}: its Hessian is "
                    "singular there; leave them out of params"
                )
        return value, self.space.flatten(filled), dict(zip(hyper, sums[len(params) :], strict=True))

    def mixed(self, q: Tensor) -> dict[str, Tensor | None]:
        r"""$\partial_\lambda \langle \nabla_w g, q\rangle$ by name, ``None`` where it is unused."""
        direction = [part.contiguous() for part in self.space.unflatten(q).values()]
        sums: list[Tensor | None] = [None] * len(self.hyper)
        for batch, share in self.batches("inner"):
            params, hyper = _leaves(self.params), _leaves(self.hyper)
            result = self.call(self.inner, "inner", params, hyper, batch)
            gradient = torch.autograd.grad(result, list(params.values()), create_graph=True)
            pairs = [(g, d) for g, d in zip(gradient, direction, strict=True) if g.requires_grad]
            if not pairs:
                continue
            parts = torch.autograd.grad(
                [g for g, _ in pairs],
                list(hyper.values()),
                [d for _, d in pairs],
                allow_unused=True,
            )
            sums = [_add_scaled(s, part, share) for s, part in zip(sums, parts, strict=True)]
        return dict(zip(self.hyper, sums, strict=True))

    def hypergradient(
        self,
        hessian: LinearOperator,
        recipe: Recipe | None,
        *,
        state: Any = None,
        x0: Tensor | None = None,
        throw: bool = True,
    ) -> Hypergradient:
        """The implicit hypergradient with ``hessian`` standing for the inner curvature."""
        outer_value, outer_gradient, direct = self.gradients("outer")
        _, inner_gradient, _ = self.gradients("inner")
        for which, vector in (("outer", outer_gradient), ("inner", inner_gradient)):
            if not torch.isfinite(vector).all():
                bad = int((~torch.isfinite(vector)).sum())
                raise NonFiniteError(
                    f"{bad} of {vector.numel()} entries of the {which} gradient are NaN or infinite"
                )
        solution = solve(
            hessian,
            outer_gradient,
            CG() if recipe is None else recipe,
            x0=x0,
            state=state,
            throw=throw,
        )
        indirect = self.mixed(solution.value)
        unused = [name for name in self.hyper if direct[name] is None and indirect[name] is None]
        if unused:
            names = ", ".join(repr(name) for name in unused) if self.hyper_named else "hyper"
            raise GradientError(
                f"{names}: neither loss depends on it; use the hyper given to the losses as their "
                "second argument, not a tensor from outside"
            )
        filled = {k: _or_zeros(direct[k], self.hyper[k]) for k in self.hyper}
        value = {k: filled[k] - _or_zeros(indirect[k], self.hyper[k]) for k in self.hyper}
        return Hypergradient(
            value=value if self.hyper_named else value[""],
            direct=filled if self.hyper_named else filled[""],
            outer_value=outer_value,
            stationarity=self.space.norm(inner_gradient).item(),
            outer_error=self.space.inner(solution.value, inner_gradient).item(),
            solution=solution,
        )


def _named(tensors: Tensors, what: str) -> tuple[dict[str, Tensor], bool]:
    named = not isinstance(tensors, Tensor)
    mapping = dict(tensors) if isinstance(tensors, Mapping) else {"": tensors}
    if not mapping:
        raise GradientError(f"{what} is empty; give at least one tensor")
    for name, tensor in mapping.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise GradientError(f"{what}[{name!r}] is {kind}; a floating tensor is needed")
    return {name: tensor.detach() for name, tensor in mapping.items()}, named


def _batches(data: Iterable[Any] | None, space: Space) -> Batches | None:
    if data is None:
        return None
    device = torch.device("cpu") if space.device is None else space.device
    batches = Batches(data, device)
    _ = batches.num_examples  # refuses empty data before any work
    return batches


def _leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _add_scaled(total: Tensor | None, part: Tensor | None, weight: float) -> Tensor | None:
    if part is None:
        return total
    return part * weight if total is None else total.add_(part, alpha=weight)


def _or_zeros(part: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if part is None else part
