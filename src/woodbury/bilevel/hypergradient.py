"""The hypergradient by the implicit function theorem, for any recipe of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from woodbury.bilevel.estimate import Hypergradient, implicit_hypergradient
from woodbury.bilevel.parts import Tensors
from woodbury.bilevel.problem import Bilevel, Loss
from woodbury.implicit.modes import Implicit
from woodbury.solvers import Recipe

__all__ = ["Hypergradient", "hypergradient"]


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
    stationary_rtol: float | None = 1e-3,
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
        stationary_rtol: warn where $\|\nabla_w g\|$ exceeds this part of $\|H w\|$, with the
            distance from the minimiser to first order; ``None`` for a point that is not meant to
            be one.

    Returns:
        A :class:`Hypergradient`: value, certificate and the linear solve.

    Raises:
        GradientError: a hyperparameter enters neither loss, the inner loss does not depend on a
            parameter, or the outer loss on none.
        NonFiniteError: a loss or its gradient is NaN or infinite.
        SolveError: the solve did not converge and ``throw`` is true.

    Warns:
        StationarityWarning: the inner problem is not solved at ``params``.

    Cost: two gradients, one product for the check, one mixed second derivative (about two
    gradients) and the products of the solve; memory of a few vectors of ``params`` and ``hyper``
    besides the linearisation.

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
    problem = Bilevel(inner, outer, params, hyper, inner_data=inner_data, outer_data=outer_data)
    return implicit_hypergradient(
        problem,
        Implicit(recipe, on_failure="raise" if throw else "ignore"),
        cache=cache,
        x0=x0,
        prepared=state,
        stationary_rtol=stationary_rtol,
    )
