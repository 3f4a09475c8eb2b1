"""``root``, ``fixed_point``, ``minimize``: any solver, made differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, overload

from woodbury.implicit.condition import Condition, Kind
from woodbury.implicit.link import WarmStart
from woodbury.implicit.modes import Mode, mode_of
from woodbury.implicit.solver import ImplicitSolver
from woodbury.solvers import SolveReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["fixed_point", "minimize", "root"]

Decorator = Callable[[Callable[..., Any]], ImplicitSolver]


class Settings(TypedDict, total=False):
    """What ``root``, ``fixed_point`` and ``minimize`` have in common; said at :func:`root`.

    Defaults are those of :class:`ImplicitSolver`.
    """

    mode: str | Mode
    argnums: int | Sequence[int] | None
    has_aux: bool
    report: SolveReport | None
    warm: WarmStart | None
    strong_convexity: float | None
    stationary_rtol: float


def _make(
    function: Callable[..., Any],
    kind: Kind,
    symmetric: bool | None,
    solver: Callable[..., Any] | None,
    settings: Settings,
) -> ImplicitSolver | Decorator:
    unknown = sorted(set(settings) - set(Settings.__annotations__))
    if unknown:
        names = ", ".join(Settings.__annotations__)
        raise TypeError(f"there is no setting {unknown[0]!r}; there are {names}")
    chosen: dict[str, Any] = {"mode": "implicit", **settings}
    condition, how = Condition.of(function, kind, symmetric), mode_of(chosen.pop("mode"))

    def decorate(solver: Callable[..., Any]) -> ImplicitSolver:
        made = ImplicitSolver(condition, solver, how, **chosen)
        for name in ("__doc__", "__name__", "__module__"):
            if hasattr(solver, name):
                object.__setattr__(made, name, getattr(solver, name))
        return made

    return decorate if solver is None else decorate(solver)


@overload
def root(F: Callable[..., Any], solver: None = None, **settings: Any) -> Decorator: ...
@overload
def root(F: Callable[..., Any], solver: Callable[..., Any], **settings: Any) -> ImplicitSolver: ...
def root(  # type: ignore[misc]
    F: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    symmetric: bool | None = None,
    **settings: Unpack[Settings],
) -> ImplicitSolver | Decorator:
    r"""Differentiate the solution of $F(x, \theta) = 0$, whatever solver finds it.

    $\frac{\partial x}{\partial\theta} = -A^{-1} B$ with $A = \partial F/\partial x$ and
    $B = \partial F/\partial\theta$ at the solution. A backward pass solves $A^T\lambda = g$ once,
    for all arguments. Reverse and forward mode, to any order, and ``torch.func.vmap``, ``grad``,
    ``jacrev``, ``jacfwd`` and ``hessian`` compose with it; under ``vmap`` the solver is called for
    each sample.

    Args:
        F: ``F(x, *args)``, like ``x`` in structure and shapes; written in torch. What it closes
            over must not require gradients.
        solver: ``solver(x0, *args, **options)``: any code that returns a tensor or a pytree of
            tensors. It is called with tensors without gradients, once. Without it ``root(F)`` is a
            decorator.
        symmetric: whether $A$ is symmetric, so that symmetric recipes may be used. By default the
            flag ``F.symmetric`` if there is one, else not.
        **settings: what :func:`root`, :func:`fixed_point` and :func:`minimize` have in common:

            - ``mode``: ``"implicit"`` (default), ``"unrolled"``, ``"truncated"``, ``"one_step"``,
              ``"phantom"``, or one of :class:`Implicit`, :class:`Unrolled`, :class:`Truncated`,
              :class:`OneStep`, :class:`Phantom` with its settings.
            - ``argnums``: which of ``args`` are differentiated, counted from 0; the others are
              constants. All floating tensors in them by default.
            - ``has_aux``: the solver returns ``(solution, auxiliary output)``; the latter is handed
              through without derivatives.
            - ``report``: a :class:`~woodbury.solvers.SolveReport` that receives every linear solve.
            - ``warm``: a :class:`WarmStart` that keeps solutions of linear systems for the next.
            - ``strong_convexity``: $\mu$, for the bound $\|x - x^*\| \le \|F(x)\|/\mu$ in the
              warning about a solution that is not one.
            - ``stationary_rtol``: warn beyond this relative residual, by default 1e-3 (see
              :class:`Stationarity`).

    Returns:
        An :class:`ImplicitSolver`, called as ``solver`` is; without ``solver`` a decorator.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: the solver, one or two evaluations of ``F`` to check its solution; one linear solve per
    backward pass. Half precision and autocast: the condition is evaluated and the system solved in
    float32, the gradient cast back.

    Source: Blondel et al., "Efficient and modular implicit differentiation" (2022).

    Example:
        A solver of SciPy's, differentiated:

        >>> import torch
        >>> from scipy.optimize import brentq
        >>> from woodbury.implicit import root
        >>> @root(lambda x, t: x + torch.exp(x) - t)
        ... def omega(x0, t):
        ...     found = brentq(lambda x: x + torch.tensor(x).exp().item() - t.item(), -10, 10)
        ...     return torch.tensor(found, dtype=t.dtype)
        >>> t = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> omega(None, t).backward()
        >>> t.grad
        tensor(0.5000, dtype=torch.float64)
    """
    return _make(F, "root", symmetric, solver, settings)


@overload
def fixed_point(T: Callable[..., Any], solver: None = None, **settings: Any) -> Decorator: ...
@overload
def fixed_point(
    T: Callable[..., Any], solver: Callable[..., Any], **settings: Any
) -> ImplicitSolver: ...
def fixed_point(  # type: ignore[misc]
    T: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    *,
    symmetric: bool | None = None,
    **settings: Unpack[Settings],
) -> ImplicitSolver | Decorator:
    r"""Differentiate the solution of $x = T(x, \theta)$: :func:`root` of $F = x - T$.

    Args:
        T: ``T(x, *args)``, like ``x``; see :func:`root` for it and for everything else.
        solver: ``solver(x0, *args, **options)``.
        symmetric: whether $\partial T/\partial x$ is symmetric.
        **settings: see :func:`root`. The steps of ``"truncated"``, ``"one_step"`` and ``"phantom"``
            are those of ``T``; ``strong_convexity`` is $1 - q$ for a contraction with factor $q$;
            ``stationary_rtol`` is the part of $\|x\|$ that $\|T(x) - x\|$ may have.

    Returns:
        An :class:`ImplicitSolver`, or a decorator.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: as for :func:`root`.

    Source: Blondel et al. (2022), section 2.1; Bai, Kolter and Koltun, "Deep equilibrium models"
    (2019), theorem 1.

    Example:
        >>> import torch
        >>> from woodbury.implicit import fixed_point
        >>> @fixed_point(lambda x, t: (x + t / x) / 2)
        ... def heron(x0, t):
        ...     for _ in range(10):
        ...         x0 = (x0 + t / x0) / 2
        ...     return x0
        >>> one = torch.tensor(1.0)
        >>> torch.func.grad(heron, argnums=1)(one, torch.tensor(4.0))
        tensor(0.2500)
    """
    return _make(T, "fixed_point", symmetric, solver, settings)


@overload
def minimize(f: Callable[..., Any], solver: None = None, **settings: Any) -> Decorator: ...
@overload
def minimize(
    f: Callable[..., Any], solver: Callable[..., Any], **settings: Any
) -> ImplicitSolver: ...
def minimize(  # type: ignore[misc]
    f: Callable[..., Any],
    solver: Callable[..., Any] | None = None,
    **settings: Unpack[Settings],
) -> ImplicitSolver | Decorator:
    r"""Differentiate $\arg\min_x f(x, \theta)$: :func:`root` of $F = \nabla_x f$.

    $A$ is the Hessian, which is positive definite at a minimum that is one: :class:`Cholesky` or
    :class:`CG` solve with it and say so where it is not. A saddle point that is meant takes
    ``Implicit(Eigh())`` or ``Implicit(MINRES())``.

    Args:
        f: ``f(x, *args)``, a scalar, twice differentiable; see :func:`root` for everything else.
        solver: ``solver(x0, *args, **options)``.
        **settings: see :func:`root`; ``strong_convexity`` is that of $f$ in $x$,
            ``stationary_rtol`` of the gradient.

    Returns:
        An :class:`ImplicitSolver`, or a decorator.

    Raises:
        ArgumentError: a setting makes no sense.

    Cost: as for :func:`root`; a product is one with the Hessian.

    Source: Blondel et al. (2022), section 2.2.

    Example:
        >>> import torch
        >>> from woodbury.implicit import minimize
        >>> X = torch.eye(2, dtype=torch.float64)
        >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> loss = lambda w, decay: ((X @ w - y) ** 2).sum() + decay * (w**2).sum()
        >>> ridge = minimize(loss, lambda w0, decay: y / (1 + decay))
        >>> decay = torch.tensor(1.0, dtype=torch.float64)
        >>> torch.func.jacrev(lambda decay: ridge(None, decay))(decay)
        tensor([-0.2500, -0.5000], dtype=torch.float64)
    """
    return _make(f, "minimum", None, solver, settings)
