"""A window of gradients as a matrix with an inverse (M-FAC)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.curvature.window_inverse import WindowInverse
from woodbury.errors import ArgumentError, DtypeError, ShapeError
from woodbury.operators import LinearOperator
from woodbury.operators.identity import multiple_of_identity

if TYPE_CHECKING:
    from woodbury.curvature.gradient_rows import RowKind
    from woodbury.curvature.objective import Objective
    from woodbury.spaces import Space

__all__ = ["GradientWindow"]


class GradientWindow(LinearOperator):
    r"""$F = \lambda I + \frac1m \sum_{i=1}^m g_i g_i^T$, or its diagonal blocks.

    The empirical Fisher matrix of a window of gradients, damped. By the Woodbury identity, with the
    gradients as rows of $G$,

    $$ F^{-1} x = \tfrac1\lambda \bigl(x - G^T (m\lambda I + G G^T)^{-1} G x\bigr), $$

    so one Cholesky factor of size $m$ serves every product with the inverse. With ``block`` the
    parameters are cut into consecutive blocks of that size (the last may be smaller), each block
    has a matrix of its own and everything outside of them is zero; blocks smaller than the window
    are formed and factorised as they are. Small matrices are formed and factorised in float64
    whatever the dtype.

    ``inverse()`` (and so ``solve``) has beside products the diagonal and any entries
    (:meth:`WindowInverse.entries`).

    Args:
        gradients: $G$, ``[m, n]``, real, one gradient a row; kept, not copied (a copy is made where
            ``n`` is no multiple of ``block``).
        damping: $\lambda > 0$.
        divisor: what the sum is divided by; default $m$, the number of rows, whether or not rows
            are zero.
        block: size of the diagonal blocks; default one block of all.
        space: :class:`~woodbury.Space` of its vectors.

    Raises:
        ShapeError: ``gradients`` is not ``[m, n]`` with at least one row.
        DtypeError: the gradients are complex or integers.
        ArgumentError: ``damping`` or ``divisor`` is not positive and finite, or ``block`` is less
            than 1.
        NonFiniteError: at the first use of the inverse: a gradient holds NaN or infinity.

    Cost: a product is $2 m n$ multiplications a column. The inverse takes $m^2 n$ once, $m^3$ for
    the factor, and $2 m n + m^2$ a column; its diagonal $m^2 n$; an entry $2 m^2$. With blocks of
    size $B$ in all memory $n \min(m, B)$ for the factors. The inverse of $F$ loses about
    $\log_{10} (\|F\| / \lambda)$ digits of the dtype.

    Source: Frantar, Kurtic and Alistarh, "M-FAC: Efficient matrix-free approximations of
    second-order information" (2021). The paper's recursion is :class:`WindowRecursion`, its moving
    window :class:`GradientBuffer`; blocks are those of Singh and Alistarh, "WoodFisher" (2020).

    Example:
        >>> import torch
        >>> from woodbury import GradientWindow
        >>> F = GradientWindow(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]), damping=0.5)
        >>> F.to_dense()
        tensor([[1.0000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.0000, 0.0000, 2.5000]])
        >>> F.inverse().diagonal()
        tensor([1.3333, 1.3333, 0.4000])
    """

    _made_of = ("gradients",)
    _forgets: ClassVar[tuple[str, ...]] = ("_inverted",)

    def __init__(
        self,
        gradients: Tensor,
        damping: float,
        *,
        divisor: float | None = None,
        block: int | None = None,
        space: Space | None = None,
    ) -> None:
        if gradients.dim() != 2 or gradients.shape[0] < 1:
            raise ShapeError(
                f"gradients have shape {tuple(gradients.shape)}, expected [m, n] with m >= 1"
            )
        if not gradients.dtype.is_floating_point:
            raise DtypeError(f"gradients are {gradients.dtype}; a window is of real numbers")
        rows, n = gradients.shape
        check_damping(damping)
        divisor = float(rows if divisor is None else divisor)
        if not 0 < divisor < math.inf:
            raise ArgumentError(f"divisor is {divisor}; it must be positive and finite")
        if block is not None and block < 1:
            raise ArgumentError(f"block is {block}; a block has at least one parameter")
        tags = {"positive_definite"}
        super().__init__(
            (n, n), dtype=gradients.dtype, device=gradients.device, tags=tags, space=space
        )
        self.gradients = gradients
        self.damping = float(damping)
        self.divisor = divisor
        self.block = None if block is None or block >= n else int(block)
        self._inverted: WindowInverse | None = None

    @classmethod
    def from_objective(
        cls,
        objective: Objective,
        damping: float,
        *,
        size: int | None = None,
        rows: RowKind = "example",
        samples: int = 1,
        block: int | None = None,
        generator: torch.Generator | None = None,
    ) -> GradientWindow:
        r"""The window of an objective's gradients, with its regulariser.

        With ``rows="example"`` row $i$ is $\sqrt{w_i}\,\nabla\ell_i$, and over all examples
        $F = \lambda I + \frac1N \sum_i w_i \nabla\ell_i \nabla\ell_i^T + l_2 I$, which is
        ``Fisher(objective, "empirical") + damping * Identity(n)``. With ``"sampled"`` the labels
        are drawn from the model: Monte-Carlo columns of the Gauss-Newton matrix (for a likelihood
        the same as the Fisher matrix), ``samples`` for each example. With ``"batch"`` rows are the
        mean gradients of the batches, as the paper has it for the optimizer.

        Args:
            objective: at its parameters of this moment. Its ``l2`` is added to the damping.
            damping: $\lambda \ge 0$; $\lambda + l_2$ must be positive.
            size: how many examples (batches) are drawn, without replacement; default all. The
                divisor is the number of those drawn.
            rows: ``"example"``, ``"batch"`` or ``"sampled"``.
            samples: labels drawn per example, for ``"sampled"``.
            block: as for the class.
            generator: draws examples and labels; the same ones every time if not given.

        Returns:
            The window; it holds $m n$ numbers, $m$ = examples times samples.

        Raises:
            ArgumentError: an argument is out of range, a weight is negative, or ``l2`` is a vector
                and not a number.
            DataError: a loss that is a scalar per batch (but for ``"batch"``), or a shuffling
                loader.
            StructureError: ``"sampled"`` with a criterion that is no likelihood.

        Cost: about one gradient of the objective for rows per example, ``samples`` for sampled.

        Example:
            >>> import torch
            >>> from woodbury import GradientWindow, Objective
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.ones_(model.weight)
            >>> objective = Objective(model, "mse", (x, torch.zeros(2, 1)))
            >>> GradientWindow.from_objective(objective, 1.0).to_dense()  # 1 + (2^2 + 18^2) / 2
            tensor([[165.]])
        """
        from woodbury.curvature.gradient_rows import gradient_rows

        if isinstance(objective.l2, Tensor):
            raise ArgumentError(
                "l2 of the objective is a vector, and a window has one damping for all: give the "
                "objective a number, or add woodbury.Diagonal(l2) to a window of l2=0"
            )
        if not (damping >= 0 and damping + objective.l2 > 0):
            raise ArgumentError(
                f"damping is {damping} and l2 of the objective {objective.l2}; damping must be "
                ">= 0 and their sum positive, or there is no inverse"
            )
        gradients, divisor = gradient_rows(
            objective, rows, size=size, samples=samples, generator=generator
        )
        total = float(damping) + objective.l2
        return cls(gradients, total, divisor=divisor, block=block, space=objective.space)

    # ------------------------------------------------------------------ layout

    @property
    def width(self) -> int:
        """The size of a block, ``n`` where there are none."""
        return self.shape[0] if self.block is None else self.block

    @property
    def padding(self) -> int:
        """How many zeros complete the last block."""
        return -self.shape[0] % max(self.width, 1)

    def stack(self, X: Tensor) -> Tensor:
        """``[n, k]`` as ``[blocks, B, k]``, a view where the last block is whole."""
        padded = torch.nn.functional.pad(X, (0, 0, 0, self.padding)) if self.padding else X
        return padded.reshape(-1, max(self.width, 1), X.shape[1])

    def unstack(self, X: Tensor) -> Tensor:
        """The inverse of :meth:`stack`."""
        return X.reshape(-1, X.shape[2])[: self.shape[0]]

    def gradient_stack(self) -> Tensor:
        """The gradients as ``[blocks, m, B]``, a view where the last block is whole."""
        G = self.gradients
        padded = torch.nn.functional.pad(G, (0, self.padding)) if self.padding else G
        return padded.reshape(len(G), -1, max(self.width, 1)).transpose(0, 1)

    # ---------------------------------------------------------------- products

    def _matmat(self, X: Tensor) -> Tensor:
        G, stacked = self.gradient_stack(), self.stack(X)
        inner = torch.bmm(G, stacked) / self.divisor
        return self.unstack(torch.bmm(G.mT, inner)) + self.damping * X

    def _diagonal(self) -> Tensor:
        return self.gradients.square().sum(0) / self.divisor + self.damping

    def _trace(self) -> Tensor:
        return self.gradients.square().sum() / self.divisor + self.damping * self.shape[0]

    def _logdet(self) -> Tensor:
        inverse = self._inverse()
        return inverse.logdet_of_window()

    def _inverse(self) -> WindowInverse:
        if self.gradients.requires_grad:  # a graph that was kept would be of another pass
            return WindowInverse(self)
        if self._inverted is None:
            self._inverted = WindowInverse(self)
        return self._inverted

    def _with(self, damping: float, divisor: float) -> GradientWindow:
        return GradientWindow(
            self.gradients, damping, divisor=divisor, block=self.block, space=self.space
        )

    def _scale(self, factor: complex | Tensor) -> LinearOperator | None:
        number = _number(factor)
        if number is None or not number > 0:
            return None
        return self._with(number * self.damping, self.divisor / number)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        shift = _number(multiple_of_identity(other))
        if shift is None or not self.damping + shift > 0:
            return None
        return self._with(self.damping + shift, self.divisor)


def _number(value: object) -> float | None:
    """A real number; of a tensor none, because that may carry a gradient."""
    return float(value) if isinstance(value, int | float) else None


def check_damping(damping: float) -> None:
    """Raise unless it is positive and finite."""
    if not 0 < damping < math.inf:
        raise ArgumentError(
            f"damping is {damping}; it must be positive and finite, or there is no inverse"
        )
