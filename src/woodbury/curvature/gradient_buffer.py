"""A moving window of gradients, as the M-FAC optimizer keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from woodbury.curvature.gradient_window import GradientWindow, check_damping
from woodbury.errors import ArgumentError, NonFiniteError, ShapeError
from woodbury.operators.dtypes import precise

__all__ = ["GradientBuffer"]

_PIECE_BYTES = 64 * 2**20


class GradientBuffer:
    r"""The last $m$ gradients in a ring, and products with $F^{-1}$ at every moment.

    $F = \lambda I + \frac1m \sum_j g_j g_j^T$ over the slots of the ring, with the fixed divisor
    $m$: slots that were never filled hold zeros and count. A new gradient replaces the oldest one,
    and of the Gram matrix $S = G G^T$ (float64) one row and column. Then

    - ``"cholesky"``: $F^{-1}x = \frac1\lambda (x - G^T (m\lambda I + S)^{-1} G x)$ with one
      Cholesky factor of size $m$ for each new window;
    - ``"coefficients"``: the algorithm of the paper. $D_{ij} = g_i^T F_{i-1}^{-1} g_j$ ($j \ge i$)
      is the upper factor of $m I + S/\lambda$ without pivoting, less $m$ on the diagonal;
      $F_{i-1}^{-1} g_i = \sum_{k \le i} B_{ik} g_k$ with
      $B_{ii} = \frac1\lambda$ and
      $B_{i,1:i-1} = -(D_{1:i-1,i} / t_{1:i-1})^T B_{1:i-1,1:i-1}$, $t_i = m + D_{ii}$; rows of $D$
      and $B$ before the replaced slot are kept, but for one column of $D$. The same to rounding,
      and slower on a CPU: it is here as the reference.

    A buffer changes with every :meth:`insert`; :meth:`operator` gives a window that does not.

    Args:
        size: $m$.
        dim: $n$, entries of a gradient.
        damping: $\lambda > 0$.
        dtype: of the gradients.
        device: of the gradients.

    Raises:
        ArgumentError: ``size`` or ``dim`` is less than 1, or ``damping`` is not positive.

    Cost: memory for $m n$ numbers; an insertion $m n$ multiplications, a product $2 m n + m^2$ and,
    after an insertion, $m^3 / 3$ once.

    Source: Frantar, Kurtic and Alistarh, "M-FAC" (2021), section 3.2.

    Example:
        >>> import torch
        >>> from woodbury import GradientBuffer
        >>> buffer = GradientBuffer(size=2, dim=3, damping=1.0)
        >>> for gradient in torch.eye(3):
        ...     buffer.insert(gradient)
        >>> buffer.solve(torch.ones(3))  # the first has left: 1 / (1 + 1/2) in the others
        tensor([1.0000, 0.6667, 0.6667])
    """

    def __init__(
        self,
        size: int,
        dim: int,
        damping: float,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if size < 1 or dim < 1:
            raise ArgumentError(f"size is {size} and dim {dim}; both must be at least 1")
        check_damping(damping)
        self.gradients = torch.zeros(size, dim, dtype=dtype, device=device)
        self.damping = float(damping)
        self.inserted = 0
        wide = precise(self.gradients[:0]).dtype
        self._gram = torch.zeros(size, size, dtype=wide, device=self.gradients.device)
        self._factor: Tensor | None = None
        self._coefficients = _Coefficients(self._gram, self.damping)

    @property
    def size(self) -> int:
        """$m$."""
        return len(self.gradients)

    @property
    def slot(self) -> int:
        """Where the next gradient goes."""
        return self.inserted % self.size

    def insert(self, gradient: Tensor) -> None:
        """Put a gradient ``[n]`` in the place of the oldest one.

        Raises:
            ShapeError: it is not ``[n]``.
            NonFiniteError: it holds NaN or infinity; the window is unchanged.
        """
        if gradient.shape != self.gradients.shape[1:]:
            raise ShapeError(
                f"the gradient has shape {tuple(gradient.shape)}, expected "
                f"[{self.gradients.shape[1]}]"
            )
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"gradient {self.inserted} holds NaN or infinity; the window keeps what it has: "
                "skip this step, or lower the learning rate"
            )
        slot = self.slot
        self.gradients[slot] = gradient.detach()
        row = self._inner(self.gradients[slot])
        self._gram[slot] = row
        self._gram[:, slot] = row
        self._factor = None
        self._coefficients.replaced(slot)
        self.inserted += 1

    def solve(
        self, x: Tensor, *, method: Literal["cholesky", "coefficients"] = "cholesky"
    ) -> Tensor:
        """``F^-1 x`` for ``[n]`` or ``[n, k]``.

        Raises:
            ShapeError: ``x`` has another size.
            ArgumentError: ``method`` is unknown.
        """
        if x.dim() not in (1, 2) or len(x) != self.gradients.shape[1]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}, expected [{self.gradients.shape[1]}] or "
                f"[{self.gradients.shape[1]}, k]"
            )
        if method not in ("cholesky", "coefficients"):
            raise ArgumentError(f"method is {method!r}; use 'cholesky' or 'coefficients'")
        X = x.unsqueeze(1) if x.dim() == 1 else x
        inner = precise(self.gradients @ X)
        if method == "cholesky":
            weights = torch.cholesky_solve(inner, self._cholesky()) / self.damping
        else:
            weights = self._coefficients.weights(inner)
        result = X / self.damping - self.gradients.mT @ weights.to(X.dtype)
        return result.squeeze(1) if x.dim() == 1 else result

    def operator(self) -> GradientWindow:
        """The window of this moment as an operator, which later insertions do not change."""
        return GradientWindow(self.gradients.clone(), self.damping)

    def state(self) -> dict[str, Tensor]:
        """Tensors from which :meth:`load` continues with the same results.

        They are copies; write them with ``safetensors``.
        """
        inserted = torch.tensor(self.inserted)
        return {"gradients": self.gradients.clone(), "inserted": inserted}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` gave.

        Raises:
            ShapeError: the window of the state has another size.
        """
        if state["gradients"].shape != self.gradients.shape:
            raise ShapeError(
                f"the state holds {tuple(state['gradients'].shape)} gradients, this window "
                f"{tuple(self.gradients.shape)}"
            )
        self.gradients.copy_(state["gradients"])
        self.inserted = int(state["inserted"])
        for slot in range(self.size):
            self._gram[slot] = self._inner(self.gradients[slot])
        self._gram.copy_((self._gram + self._gram.mT) / 2)
        self._factor = None
        self._coefficients.replaced(0)

    def _inner(self, gradient: Tensor) -> Tensor:
        """``G g`` in float64, a piece of the parameters at a time."""
        G = self.gradients
        step = max(1, _PIECE_BYTES // (8 * len(G)))
        total = torch.zeros(len(G), dtype=self._gram.dtype, device=G.device)
        for start in range(0, G.shape[1], step):
            part = precise(G[:, start : start + step])
            total += part @ precise(gradient[start : start + step])
        return total

    def _cholesky(self) -> Tensor:
        if self._factor is None:
            shift = self.size * self.damping
            eye = torch.eye(self.size, dtype=self._gram.dtype, device=self._gram.device)
            self._factor = torch.linalg.cholesky(self._gram + shift * eye)
        return self._factor


class _Coefficients:
    """The matrices D and B of the paper, kept up to date with a Gram matrix."""

    def __init__(self, gram: Tensor, damping: float) -> None:
        m = len(gram)
        self.gram, self.damping = gram, damping
        # D + m I is this; of a window of zeros it is m I.
        self.upper = torch.eye(m, dtype=gram.dtype, device=gram.device) * m
        self.B = torch.eye(m, dtype=gram.dtype, device=gram.device) / damping
        self._stale: list[int] = []

    def replaced(self, slot: int) -> None:
        """The gradient at ``slot`` is another one."""
        self._stale.append(slot)

    def weights(self, inner: Tensor) -> Tensor:
        r"""The weights ``[m, k]`` of the gradients in $\lambda^{-1} x - F^{-1} x$, from ``G x``."""
        self._update()
        m = len(self.gram)
        t = self.upper.diagonal()
        c = inner / self.damping
        for i in range(1, m):
            c[i:] -= self.upper[i - 1, i:, None] * (c[i - 1] / t[i - 1])
        return self.B.mT @ (c / t[:, None])

    def _update(self) -> None:
        if not self._stale:
            return
        m, first = len(self.gram), min(self._stale)
        A = self.gram / self.damping
        A.diagonal().add_(m)
        for j in sorted(set(self._stale)):  # columns above the first changed row
            for i in range(first):
                U = self.upper
                taken = (U[:i, i] * U[:i, j] / U.diagonal()[:i]).sum()
                U[i, j] = A[i, j] - taken
        for i in range(first, m):
            U = self.upper
            weights = U[:i, i] / U.diagonal()[:i]
            U[i, i:] = A[i, i:] - weights @ U[:i, i:]
            U[i, :i] = 0
            self.B[i] = 0
            self.B[i, i] = 1 / self.damping
            if i:
                self.B[i, :i] = -weights @ self.B[:i, :i]
        self._stale = []
