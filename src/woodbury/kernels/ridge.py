"""Kernel ridge regression with row weights and closed-form leave-one-out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, BudgetError, NonFiniteError, RankError, ShapeError
from woodbury.kernels.exact import ExactFit, Gram
from woodbury.kernels.features import FeatureFit, NystromFeatures
from woodbury.kernels.rbf import RBF
from woodbury.operators import Kernel

__all__ = ["KernelRidge", "KernelRidgeFit", "KernelRidgeState"]

# Square matrices of float64 that exact fits hold at once.
EXACT_MATRICES = 4


@dataclass(frozen=True)
class KernelRidge:
    r"""Kernel ridge regression with row weights and closed-form leave-one-out.

    It minimises $\sum_i w_i \|y_i - f(x_i)\|^2 + \lambda \|f\|_k^2$. With
    $G = K + \lambda W^{-1}$ and $\alpha = G^{-1} Y$, the prediction of each row by the fit that did
    not see it is closed form,

    $$f_{-i}(x_i) = y_i - \alpha_i / [G^{-1}]_{ii}.$$

    With ``landmarks``, $K$ is replaced by its Nystrom approximation $\Phi \Phi^T$ on as many rows
    drawn at random, and never formed: $\beta = (\Phi^T W \Phi + \lambda I)^{-1} \Phi^T W Y$, with
    leave-one-out by the leverage $h_i = w_i \phi_i^T A^{-1} \phi_i$:
    $f_{-i}(x_i) = (f(x_i) - h_i y_i) / (1 - h_i)$, exact for the approximation.

    Args:
        kernel: :class:`RBF`.
        penalty: $\lambda > 0$.
        landmarks: how many; None for the exact fit.
        budget_bytes: most memory of the fit besides the data.

    Raises:
        ArgumentError: ``penalty`` is not positive.
        RankError: ``landmarks`` is not positive.
        BudgetError: at :meth:`prepare`, what is needed at least is more than ``budget_bytes``.

    Cost: exact $n^3$ multiplications in float64 and memory of four matrices ``[n, n]``;
    Nystrom $2 n m^2$ a fit in the dtype of the points, $2 n m^2$ more for leave-one-out, and memory
    of ``[n, m]`` where the budget holds it, of a block of rows otherwise.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), 5.12, for the
    exact leave-one-out; Williams and Seeger, "Using the Nystrom method to speed up kernel machines"
    (2000). The weighted form is derived here.

    Example:
        >>> import torch
        >>> from woodbury.kernels import RBF, KernelRidge
        >>> x = torch.linspace(0, 6, 30).double()[:, None]
        >>> fit = KernelRidge(RBF(1.0), penalty=1e-3).fit(x, torch.sin(x))
        >>> bool((fit.leave_one_out() - torch.sin(x)).abs().max() < 0.05)
        True
    """

    kernel: RBF
    penalty: float
    landmarks: int | None = None
    budget_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        if not 0 < self.penalty < float("inf"):
            raise ArgumentError(f"penalty is {self.penalty}; it must be positive")
        if self.landmarks is not None and self.landmarks < 1:
            raise RankError(f"landmarks is {self.landmarks}; it must be at least 1")

    def prepare(self, X: Tensor, *, generator: torch.Generator | None = None) -> KernelRidgeState:
        """What fits with the same points, kernel and landmarks share.

        Args:
            X: points ``[n, d]``.
            generator: draws the landmarks; the same ones every time if not given.

        Returns:
            A state to hand to :meth:`fit`.

        Raises:
            ShapeError: ``X`` is not a matrix, or has fewer rows than ``landmarks``.
            NonFiniteError: ``X`` holds NaN or infinity.
            BudgetError: the budget is too small; the message says what it would take.
        """
        _check_points(X)
        n = X.shape[0]
        if self.landmarks is None:
            self._require(EXACT_MATRICES * n * n * 8, f"an exact fit of {n} rows", "landmarks")
            return KernelRidgeState(Gram.of(X, self.kernel), None)
        if self.landmarks > n:
            raise RankError(f"landmarks is {self.landmarks}, X has {n} rows")
        fixed = EXACT_MATRICES * self.landmarks**2 * 8
        self._require(fixed, f"a fit with {self.landmarks} landmarks", "fewer landmarks")
        if generator is None:
            generator = torch.Generator(X.device).manual_seed(0)
        chosen = torch.randperm(n, generator=generator, device=X.device)[: self.landmarks]
        spare = self.budget_bytes - fixed
        block = max(3 * self.landmarks * 8 * 64, min(64 * 2**20, spare // 4))
        features = NystromFeatures(
            X, self.kernel, chosen.sort().values, keep_bytes=spare // 2, block_bytes=block
        )
        return KernelRidgeState(None, features)

    def fit(
        self,
        X: Tensor,
        Y: Tensor,
        weights: Tensor | None = None,
        *,
        state: KernelRidgeState | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> KernelRidgeFit:
        """Fit.

        Args:
            X: points ``[n, d]``.
            Y: targets ``[n, C]``.
            weights: $w$, ``[n]``, not negative (0 counts as 1e-8); 1 if not given.
            state: from :meth:`prepare` for the same points and kernel.
            generator: draws the landmarks where ``state`` is not given.
            progress: called with the fraction done; Nystrom only.

        Returns:
            A :class:`KernelRidgeFit`.

        Raises:
            ShapeError: sizes do not agree.
            NonFiniteError: targets or weights hold NaN or infinity.
            ArgumentError: a weight is negative.
        """
        state = self.prepare(X, generator=generator) if state is None else state
        n = X.shape[0]
        if Y.dim() != 2 or Y.shape[0] != n:
            raise ShapeError(f"targets have shape {tuple(Y.shape)}; expected ({n}, C)")
        w = torch.ones(n, dtype=torch.float64, device=X.device) if weights is None else weights
        if w.shape != (n,):
            raise ShapeError(f"weights have shape {tuple(w.shape)}; expected ({n},)")
        for name, tensor in (("targets", Y), ("weights", w)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{name} hold NaN or infinity")
        if n and w.min() < 0:
            raise ArgumentError(f"a weight is {w.min().item():.3g}; weights must not be negative")
        if state.gram is not None:
            return KernelRidgeFit(self, ExactFit.of(state.gram, Y, w, self.penalty))
        assert state.features is not None
        fit = FeatureFit.of(state.features, Y, w, self.penalty, progress)
        return KernelRidgeFit(self, fit)

    def _require(self, need: int, what: str, remedy: str) -> None:
        if need > self.budget_bytes:
            raise BudgetError(
                f"{what} takes {need / 2**20:.0f} MiB and the budget is "
                f"{self.budget_bytes / 2**20:.0f} MiB; use {remedy} or raise the budget"
            )


@dataclass(frozen=True, eq=False)
class KernelRidgeState:
    """What refits share: the kernel matrix, or landmarks and the features they give.

    Example:
        >>> import torch
        >>> from woodbury.kernels import RBF, KernelRidge
        >>> x = torch.linspace(0, 6, 30).double()[:, None]
        >>> ridge = KernelRidge(RBF(1.0), penalty=1e-3)
        >>> state = ridge.prepare(x)  # the kernel is evaluated here, once
        >>> fits = [ridge.fit(x, y, state=state) for y in (torch.sin(x), torch.cos(x))]
    """

    gram: Gram | None
    features: NystromFeatures | None


@dataclass(frozen=True, eq=False)
class KernelRidgeFit:
    """A fitted :class:`KernelRidge`.

    Attributes:
        ridge: the settings it was fitted with.
        fit: the numbers, exact or by Nystrom features.

    Example:
        >>> import torch
        >>> from woodbury.kernels import RBF, KernelRidge
        >>> x = torch.linspace(0, 6, 30).double()[:, None]
        >>> fit = KernelRidge(RBF(1.0), penalty=1e-3).fit(x, torch.sin(x))
        >>> fit.predict(torch.tensor([[1.5]]).double()).round(decimals=2)
        tensor([[1.]], dtype=torch.float64)
        >>> fit.certificate()["relative_residual"] < 1e-10
        True
    """

    ridge: KernelRidge
    fit: ExactFit | FeatureFit

    def leave_one_out(self) -> Tensor:
        """Predictions of each row by the fit without it, ``[n, C]``, float64."""
        return self.fit.leave_one_out()

    def predict(self, X: Tensor) -> Tensor:
        """Predictions at ``[b, d]``, ``[b, C]``; the kernel is evaluated in blocks."""
        _check_points(X)
        points, weights = self._expansion()
        return Kernel(X.to(points.dtype), points, kernel=self.ridge.kernel) @ weights

    def _expansion(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.fit, ExactFit):
            return self.fit.gram.points, self.fit.coefficients
        features = self.fit.features
        assert isinstance(features, NystromFeatures)
        return features.landmarks.double(), features.whitener @ self.fit.coefficients

    def weight_hypergradient(self, slope: Tensor) -> Tensor:
        r"""$dF/dw_j$ of an outer loss $F = \sum_i \phi_i(f_{-i}(x_i))$ of the held-out predictions.

        Closed form, through the same inverse; a row's weight does not enter its own held-out
        prediction.

        Args:
            slope: $\phi_i'$ at :meth:`leave_one_out`, ``[n, C]``.

        Returns:
            ``[n]``, float64.

        Cost: $n^2 C$ multiplications exact; two passes of $n m^2$ by Nystrom.
        """
        return self.fit.weight_hypergradient(slope)

    @property
    def relative_variance(self) -> Tensor:
        """Variance of ``y_i - f_-i(x_i)`` over that of the noise (weight 1), ``[n]``."""
        return self.fit.relative_variance

    def certificate(self) -> dict[str, float | int | str | bool]:
        """What inverse was used and how well it solves, in numbers and words."""
        common: dict[str, float | int | str | bool] = {
            "penalty": self.ridge.penalty,
            "lengthscale": self.ridge.kernel.lengthscale,
            "effective_dimension": self.fit.leverage.sum().item(),
            "relative_residual": self.fit.residual(),
        }
        if isinstance(self.fit, ExactFit):
            return {"method": "exact Cholesky", "size": len(self.fit.weights), **common}
        features = self.fit.features
        assert isinstance(features, NystromFeatures)
        common["features_kept_in_memory"] = features.kept
        return {"method": "Nystrom", "size": features.rows, "rank": features.width, **common}


def _check_points(X: Tensor) -> None:
    if X.dim() != 2 or 0 in X.shape:
        raise ShapeError(f"X has shape {tuple(X.shape)}; expected [n, d] with n, d > 0")
    if not bool(torch.isfinite(X).all()):
        raise NonFiniteError("X holds NaN or infinity")
