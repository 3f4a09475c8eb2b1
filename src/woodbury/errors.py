"""Every exception woodbury raises for a foreseeable mistake or failure.

All derive from :class:`WoodburyError` and from the closest built-in exception, so that
``except ValueError`` keeps working. Messages give the values that were wrong and say what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from woodbury.solvers.functions import MatrixFunction
    from woodbury.solvers.solution import Solution
    from woodbury.spectra.eigenpairs import Eigenpairs

__all__ = [
    "ArgumentError",
    "BudgetError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "EigenError",
    "FunctionError",
    "GradientError",
    "NonDeterministicError",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "RankError",
    "ShapeError",
    "SingularError",
    "SolveError",
    "StructureError",
    "TagError",
    "WoodburyError",
]


class WoodburyError(Exception):
    """Base of every exception raised by woodbury on purpose."""


class ArgumentError(WoodburyError, ValueError):
    """An argument has a value outside the range that makes sense for it."""


class ShapeError(WoodburyError, ValueError):
    """Two shapes that should agree do not."""


class DtypeError(WoodburyError, TypeError):
    """A dtype is missing, mixed or unsupported; nothing is promoted silently."""


class DeviceError(WoodburyError, ValueError):
    """Tensors that should live on one device do not."""


class TagError(WoodburyError, ValueError):
    """An operator's tags are unknown, contradict its structure, or do not meet a method's need."""


class RankError(WoodburyError, ValueError):
    """A requested rank is not between 1 and the size of the matrix."""


class NonFiniteError(WoodburyError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class NotPositiveDefiniteError(WoodburyError, ArithmeticError):
    """A matrix that a method needs positive definite is not."""


class SingularError(WoodburyError, ArithmeticError):
    """A matrix that has to be inverted is singular to working precision."""


class StructureError(WoodburyError, NotImplementedError):
    """The operator has no structural form of what was asked (inverse, log-determinant, ...)."""


class GradientError(WoodburyError, RuntimeError):
    """A tensor that must carry (or must not need) a gradient does not (or does)."""


class NonDeterministicError(WoodburyError, RuntimeError):
    """Two evaluations of the same objective on the same data differ."""


class DataError(WoodburyError, ValueError):
    """The data (a batch, a table, a column, a file) cannot be used as it is."""


class BudgetError(WoodburyError, MemoryError):
    """A stated budget of memory or products is too small for the work asked for."""


class SolveError(WoodburyError, ArithmeticError):
    """A linear solve did not reach its tolerance; ``solution`` holds the best iterate.

    Raised by :func:`woodbury.solve` when ``throw=True``. Pass ``throw=False`` to receive the
    solution with its status instead.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


class EigenError(WoodburyError, ArithmeticError):
    """Eigenpairs did not reach their tolerance; ``eigenpairs`` holds the best ones found.

    Raised by :func:`woodbury.spectra.eigenpairs` when ``throw=True``. Pass ``throw=False`` to
    receive them with their statuses instead.
    """

    def __init__(self, message: str, eigenpairs: Eigenpairs) -> None:
        super().__init__(message)
        self.eigenpairs = eigenpairs


class FunctionError(WoodburyError, ArithmeticError):
    """A function of a matrix did not reach its tolerance; ``result`` holds the best value.

    Raised by :func:`woodbury.solvers.matrix_function` when ``throw=True``.
    """

    def __init__(self, message: str, result: MatrixFunction) -> None:
        super().__init__(message)
        self.result = result
