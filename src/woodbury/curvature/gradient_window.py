"""A window of gradients as a matrix with an inverse (M-FAC)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DtypeError, ShapeError
from woodbury.operators import LinearOperator
from woodbury.operators.dtypes import precise
from woodbury.operators.factorization import require_finite
from woodbury.operators.identity import multiple_of_identity

if TYPE_CHECKING:
    from woodbury.curvature.gradient_rows import RowKind
    from woodbury.curvature.objective import Objective
    from woodbury.spaces import Space

__all__ = ["GradientWindow", "WindowInverse"]

# Gradients in single precision are made double in pieces of so many bytes.
_PIECE_BYTES = 64 * 2**20


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


class WindowInverse(LinearOperator):
    r"""$F^{-1}$ of a :class:`GradientWindow`; made by its ``inverse()``.

    Attributes:
        window: $F$.

    Args:
        window: $F$; factorised here.

    Example:
        >>> import torch
        >>> from woodbury import GradientWindow
        >>> inverse = GradientWindow(torch.ones(1, 3), damping=1.0).inverse()
        >>> inverse.entries(torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([ 0.7500, -0.2500])
    """

    def __init__(self, window: GradientWindow) -> None:
        super().__init__(
            window.shape,
            dtype=window.dtype,
            device=window.device,
            tags={"positive_definite"},
            space=window.space,
        )
        self.window = window
        require_finite(window.gradients, "the window of gradients")
        G = window.gradient_stack()
        # Of the two matrices with the same nonzero spectrum, the smaller one is factorised.
        self.formed = G.shape[2] < G.shape[1]
        small = _gram(G.mT if self.formed else G)
        shift = window.divisor * window.damping
        small = small + shift * torch.eye(small.shape[1], dtype=small.dtype, device=small.device)
        self._factor = torch.linalg.cholesky(small)

    def _matmat(self, X: Tensor) -> Tensor:
        window = self.window
        stacked = window.stack(X)
        if self.formed:
            solved = torch.cholesky_solve(precise(stacked), self._factor) * window.divisor
            return window.unstack(solved.to(self.dtype))
        G = window.gradient_stack()
        inner = torch.cholesky_solve(precise(torch.bmm(G, stacked)), self._factor).to(self.dtype)
        return (X - window.unstack(torch.bmm(G.mT, inner))) / window.damping

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        r"""The entries $(F^{-1})_{k_j l_j}$ for index pairs.

        Args:
            rows: $k$, integers ``[q]``.
            columns: $l$, integers ``[q]``.

        Returns:
            ``[q]``, in the dtype of the operator; 0 where the two are in different blocks.

        Raises:
            ShapeError: the indices are not two lists of integers of one length within ``0 .. n-1``.

        Cost: $2 m^2$ multiplications each (the smaller of ``m`` and ``B``).
        """
        rows, columns = checked_pairs(rows, columns, self.shape[0], self.device)
        window, width = self.window, max(self.window.width, 1)
        block, other = rows // width, columns // width
        same = (rows == columns).to(self._factor.dtype)
        if self.formed:
            left = torch.nn.functional.one_hot(rows % width, width).to(self._factor.dtype)
            right = torch.nn.functional.one_hot(columns % width, width).to(self._factor.dtype)
        else:
            G = window.gradients
            left, right = precise(G[:, rows].mT), precise(G[:, columns].mT)
        factor = self._factor[block]
        sides = torch.stack([left, right], dim=2)
        whitened = torch.linalg.solve_triangular(factor, sides, upper=False)
        product = (whitened[:, :, 0] * whitened[:, :, 1]).sum(1)
        values = product * window.divisor if self.formed else (same - product) / window.damping
        return torch.where(block == other, values, torch.zeros_like(values)).to(self.dtype)

    def _diagonal(self) -> Tensor:
        window = self.window
        if self.formed:
            inverses = torch.cholesky_inverse(self._factor)
            values = inverses.diagonal(dim1=1, dim2=2).reshape(-1)[: self.shape[0]]
            return (values * window.divisor).to(self.dtype)
        G = window.gradient_stack()
        pieces = []
        step = max(1, _PIECE_BYTES // (8 * G.shape[0] * G.shape[1]))
        for start in range(0, G.shape[2], step):
            part = precise(G[:, :, start : start + step])
            whitened = torch.linalg.solve_triangular(self._factor, part, upper=False)
            pieces.append(1 - whitened.square().sum(1))
        values = torch.cat(pieces, dim=1).reshape(-1)[: self.shape[0]]
        return (values / window.damping).to(self.dtype)

    def logdet_of_window(self) -> Tensor:
        r"""$\log\det F$ by the determinant lemma."""
        window = self.window
        total = 2 * self._factor.diagonal(dim1=1, dim2=2).log().sum()
        blocks, size = self._factor.shape[:2]
        total = total - blocks * size * math.log(window.divisor)
        padded = blocks * max(window.width, 1)
        # What was factorised has a damping for every row of it; F has one for every parameter.
        outside = window.shape[0] - (padded if self.formed else 0)
        if not self.formed:
            total = total - blocks * size * math.log(window.damping)
        return (total + outside * math.log(window.damping)).to(self.dtype)

    def _logdet(self) -> Tensor:
        return -self.logdet_of_window()

    def _inverse(self) -> LinearOperator:
        return self.window


def _number(value: object) -> float | None:
    """A real number; of a tensor none, because that may carry a gradient."""
    return float(value) if isinstance(value, int | float) else None


def check_damping(damping: float) -> None:
    """Raise unless it is positive and finite."""
    if not 0 < damping < math.inf:
        raise ArgumentError(
            f"damping is {damping}; it must be positive and finite, or there is no inverse"
        )


def _gram(G: Tensor) -> Tensor:
    """``G G^T`` of a stack ``[blocks, m, B]`` in float64, a piece of its columns at a time."""
    if G.dtype == torch.float64:
        return torch.bmm(G, G.mT)
    step = max(1, _PIECE_BYTES // (8 * G.shape[0] * max(1, G.shape[1])))
    total = None
    for start in range(0, max(G.shape[2], 1), step):
        part = precise(G[:, :, start : start + step])
        product = torch.bmm(part, part.mT)
        total = product if total is None else total + product
    assert total is not None  # there is at least one piece
    return total


def checked_pairs(
    rows: Tensor, columns: Tensor, n: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.as_tensor(index, device=device) for index in (rows, columns))
    for index in (rows, columns):
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ShapeError(
                f"an index has shape {tuple(index.shape)} and dtype {index.dtype}; expected "
                "integers [q]"
            )
    if len(rows) != len(columns):
        raise ShapeError(f"{len(rows)} rows and {len(columns)} columns; they are pairs")
    if len(rows) and (
        min(int(rows.min()), int(columns.min())) < 0
        or max(int(rows.max()), int(columns.max())) >= n
    ):
        raise ShapeError(f"indices run outside of 0 .. {n - 1}")
    return rows.long(), columns.long()
