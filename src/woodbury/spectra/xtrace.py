"""XTrace: every probe serves the sketch and, left out of it, the estimate of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.spectra.estimate import Estimate, of_samples
from woodbury.spectra.leave_one_out import sketch, standard_error, without_two
from woodbury.spectra.method import Method, multiply, real_if_hermitian, require_products, wide

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["XTrace"]


@dataclass(frozen=True)
class XTrace(Method):
    r"""$\frac1k\sum_i \big[\operatorname{tr}(Q_{(i)}^H A Q_{(i)}) + c_i\,u_i^H A\,u_i\big]$.

    $Q_{(i)}$ is an orthonormal basis of $A\,\Omega$ without its column $i$, $u_i$ the part of the
    probe $\omega_i$ orthogonal to it, and $c_i = (n - k + 1) / \|u_i\|^2$, which takes the chance
    out of its length. Unbiased, and invariant under permutations of the probes. On spectra that
    decay its error falls as fast as they do, that of :class:`Hutchinson` like $k^{-1/2}$.

    The standard error counts the correlation of the leave-one-out estimates, which is estimated
    without bias by leaving two probes out (derived in ``spectra/leave_one_out.py``); their spread
    alone, used elsewhere, is too small by a factor of 1.3 to 3 on decaying spectra.

    Args:
        products: $m = 2k$, at least 4.

    Raises:
        ArgumentError: ``products`` is less than 4.

    Cost: $2k$ products, memory of four blocks ``[n, k]``, $4nk^2 + O(k^4)$ multiplications.

    Source: Epperly, Tropp and Webber, "XTrace: making the most of every sample in stochastic trace
    estimation" (2024), section 2.1 and, for the scaling, section 2.4.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.spectra import Hutchinson, XTrace, trace
        >>> values = 1 / torch.arange(1, 501).double() ** 2
        >>> Q, _ = torch.linalg.qr(torch.randn(500, 500).double())
        >>> A = Dense((Q * values) @ Q.T)
        >>> error, other = (trace(A, method).standard_error for method in (XTrace(), Hutchinson()))
        >>> bool(other > 10 * error)
        True
    """

    products: int = 60

    def __post_init__(self) -> None:
        require_products(self.products, 4, "XTrace")

    def _trace(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        n, k = A.shape[0], self.products // 2
        found = sketch(A, k, "gaussian", generator)
        Q, R, S = found.basis, found.R, found.left_out
        Z = multiply(A, Q)
        H = wide(A.space.gram(Q, Z))
        W = wide(A.space.gram(Q, found.probes))  # Q^H Omega
        T = wide(A.space.gram(Z, found.probes))  # Q^H A^H Omega
        HS, norms = H @ S, wide(A.space.norm(found.probes)).square()
        forms = wide(A.space.inner(found.probes, found.products))  # omega^H A omega

        def estimates(i: int, X: Tensor, HX: Tensor, kept: Tensor, missing: Tensor) -> Tensor:
            """Of the part ``u = omega_i - Q x`` for columns ``x``, and of what was sketched."""
            r, t = R[:, i : i + 1], T[:, i : i + 1]
            rest = forms[i] + (X.conj() * (HX - r) - t.conj() * X).sum(0)
            missed = norms[i] - X.abs().square().sum(0)
            return kept + (n - Q.shape[1] + missing) / missed * rest

        samples = torch.empty(k, dtype=H.dtype)
        pairs = torch.empty(k, k, dtype=H.dtype)
        for i in range(k):
            s, Hs, w = S[:, i : i + 1], HS[:, i : i + 1], W[:, i : i + 1]
            inside = s.mH @ w
            x, Hx = w - s * inside, H @ w - Hs * inside
            kept = torch.trace(H) - (s.conj() * Hs).sum()
            alone = s.abs().square().sum()  # 1, or 0 where nothing is lost without this probe
            samples[i] = estimates(i, x, Hx, kept, alone)[0]
            # The same where another probe is left out beside this one, for every other.
            V, c = without_two(S, i)
            HV, inside = Hs * c[0] + HS * c[1], (V.mH @ w).T
            both = alone + V.abs().square().sum(0)
            kept = kept - (V.conj() * HV).sum(0)
            pairs[:, i] = estimates(i, x - V * inside, Hx - HV * inside, kept, both)
        samples, pairs = real_if_hermitian(samples, A), real_if_hermitian(pairs, A)
        return of_samples(
            samples,
            bias=torch.finfo(A.dtype).eps * n**0.5 * found.size,
            products=k + Q.shape[1],
            method=self,
            error=standard_error(samples, pairs),
        )
