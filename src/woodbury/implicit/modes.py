"""How a solution is differentiated: one argument, any of these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from woodbury.errors import ArgumentError
from woodbury.solvers import Recipe

if TYPE_CHECKING:
    from woodbury.solvers.solve import OnFailure

__all__ = ["Implicit", "Mode", "OneStep", "Phantom", "Truncated", "Unrolled", "mode_of"]


@dataclass(frozen=True)
class Mode:
    """How a solution is differentiated; the base of the five that there are.

    Example:
        >>> from woodbury.implicit import Implicit, Mode
        >>> isinstance(Implicit(), Mode)
        True
    """


@dataclass(frozen=True)
class Implicit(Mode):
    r"""By the implicit function theorem: $\partial x / \partial\theta = -A^{-1} B$.

    With $A = \partial F/\partial x$ and $B = \partial F/\partial\theta$ at the solution, a backward
    pass solves $A^T \lambda = g$ once and returns $-B^T \lambda$ for all arguments; a tangent
    solves $A \dot x = -B \dot\theta$. Exact at a solution, to any order; memory does not grow with
    the steps of the solver.

    Args:
        recipe: how to solve with the Jacobian. By default, up to 256 unknowns a factorisation
            (:class:`~woodbury.Cholesky` for minima, :class:`~woodbury.Eigh` for symmetric
            conditions, :class:`~woodbury.solvers.LU`), beyond :class:`~woodbury.CG`,
            :class:`~woodbury.MINRES`, :class:`~woodbury.GMRES`.
        on_failure: what a failed solve does: ``"raise"``, ``"warn"``, give ``"nan"``, or
            ``"ignore"``.

    Raises:
        ArgumentError: ``on_failure`` is unknown, or ``recipe`` is no recipe.

    Cost: one solve per backward pass or tangent.

    Source: Blondel et al., "Efficient and modular implicit differentiation" (2022), equation 2.

    Example:
        >>> from woodbury import CG
        >>> from woodbury.implicit import Implicit
        >>> Implicit(CG(rtol=1e-8)).on_failure
        'raise'
    """

    recipe: Recipe | None = None
    on_failure: OnFailure = "raise"

    def __post_init__(self) -> None:
        from woodbury.solvers.solve import OnFailure

        if self.on_failure not in get_args(OnFailure):
            raise ArgumentError(
                f"on_failure is {self.on_failure!r}; it must be one of {list(get_args(OnFailure))}"
            )
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise ArgumentError(
                f"recipe is {type(self.recipe).__name__}; give a recipe such as CG(rtol=1e-8)"
            )


@dataclass(frozen=True)
class Unrolled(Mode):
    """By automatic differentiation of the solver itself, which must be written in torch.

    Exact for the iterate that is returned, not for the solution; memory grows with the steps.

    Cost: that of backpropagation through every step of the solver.

    Source: Griewank and Walther, "Evaluating derivatives" (2nd ed.), chapter 15.

    Example:
        >>> from woodbury.implicit import Unrolled
        >>> Unrolled()
        Unrolled()
    """


@dataclass(frozen=True)
class Steps(Mode):
    r"""Base of the modes that differentiate a few steps $z \leftarrow z - c\, F(z, \theta)$.

    The steps start at the solution, which does not move; its value stays what the solver returned.
    """

    @property
    def count(self) -> int:
        """How many steps."""
        raise NotImplementedError

    @property
    def length(self) -> float | None:
        """``c``, or ``None`` where it is to be found."""
        raise NotImplementedError


def _check_step(step: float | None) -> None:
    if step is not None and not 0 < step < math.inf:
        raise ArgumentError(f"step is {step}; it must be positive, or None")


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps is {steps!r}; at least one step is differentiated")


@dataclass(frozen=True)
class Truncated(Steps):
    r"""By differentiating ``steps`` steps of the fixed-point map, from the solution held fixed.

    With $M = I - c A$ it is $\sum_{j < K} M^j$ in the place of $(cA)^{-1}$: the Neumann series with
    as many terms. The error falls as $\|M\|^K$.

    Args:
        steps: $K$.
        step: $c$ in $z - c\,F(z, \theta)$. Default 1 for a fixed point, where that is $T$;
            $1/\lambda_{max}$ (10 Lanczos products) for symmetric conditions; needed for others.

    Raises:
        ArgumentError: a value that makes no sense.

    Cost: ``steps`` evaluations of the condition and their backward pass.

    Source: Shaban, Cheng, Hatch and Boots, "Truncated back-propagation for bilevel optimization"
    (2019); Lorraine, Vicol and Duvenaud (2020), theorem 1.

    Example:
        >>> from woodbury.implicit import Truncated
        >>> Truncated(steps=20).count
        20
    """

    steps: int = 10
    step: float | None = None

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        _check_step(self.step)

    @property
    def count(self) -> int:
        """``steps``."""
        return self.steps

    @property
    def length(self) -> float | None:
        """``step``."""
        return self.step


@dataclass(frozen=True)
class OneStep(Steps):
    r"""By differentiating one step of the fixed-point map: $\partial T/\partial\theta$.

    The error is of the order of the contraction factor: right for Newton's map, whose factor is 0
    at the solution, crude for gradient descent.

    Args:
        step: as for :class:`Truncated`.

    Raises:
        ArgumentError: ``step`` is not positive.

    Cost: one evaluation of the condition and its backward pass; no solve.

    Source: Bolte, Pauwels and Vaiter, "One-step differentiation of iterative algorithms" (2023).

    Example:
        >>> from woodbury.implicit import OneStep
        >>> OneStep().count
        1
    """

    step: float | None = None

    def __post_init__(self) -> None:
        _check_step(self.step)

    @property
    def count(self) -> int:
        """One."""
        return 1

    @property
    def length(self) -> float | None:
        """``step``."""
        return self.step


@dataclass(frozen=True)
class Phantom(Steps):
    r"""By differentiating a few damped steps, $z \leftarrow (1 - d) z + d\,T(z, \theta)$.

    Args:
        steps: how many.
        damping: $d$ in $(0, 1]$; 1 is :class:`Truncated`.
        step: of the undamped map, as for :class:`Truncated`.

    Raises:
        ArgumentError: a value that makes no sense.

    Cost: as for :class:`Truncated`.

    Source: Geng, Zhang, Bai, Wang and Lin, "On training implicit models" (2021), equation 10.

    Example:
        >>> from woodbury.implicit import Phantom
        >>> Phantom(steps=5, damping=0.5)
        Phantom(steps=5, damping=0.5, step=None)
    """

    steps: int = 5
    damping: float = 0.5
    step: float | None = None

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        _check_step(self.step)
        if not 0 < self.damping <= 1:
            raise ArgumentError(f"damping is {self.damping}; it must be in (0, 1]")

    @property
    def count(self) -> int:
        """``steps``."""
        return self.steps

    @property
    def length(self) -> float | None:
        """``step``."""
        return self.step


_BY_NAME: dict[str, type[Mode]] = {
    "implicit": Implicit,
    "unrolled": Unrolled,
    "truncated": Truncated,
    "one_step": OneStep,
    "phantom": Phantom,
}


def mode_of(mode: str | Mode) -> Mode:
    """The mode of a name, with its defaults; a mode is itself.

    Raises:
        ArgumentError: there is no such mode.
    """
    if isinstance(mode, Mode):
        return mode
    if mode not in _BY_NAME:
        raise ArgumentError(
            f"mode is {mode!r}; it must be one of {list(_BY_NAME)}, or one of the classes of the "
            "same names with their settings, for example Truncated(steps=20)"
        )
    return _BY_NAME[mode]()
