"""XDiag: every probe serves the sketch and, left out of it, the estimate of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.spectra.estimate import Estimate, of_samples
from woodbury.spectra.leave_one_out import Sketch, sketch, without_two
from woodbury.spectra.method import Method, multiply, real_if_hermitian, require_products

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["XDiag"]


@dataclass(frozen=True)
class XDiag(Method):
    r"""The diagonal of a sketch, and Hutchinson for the rest, with every probe left out in turn.

    $$ \operatorname{diag} A \approx \frac1k\sum_i \big[\operatorname{diag}(Q_{(i)} Q_{(i)}^H A) +
    \bar\omega_i \odot (I - Q_{(i)} Q_{(i)}^H) A\,\omega_i\big], $$

    where $Q_{(i)}$ is an orthonormal basis of $A\,\Omega$ without its column $i$ and the entries of
    the probes are signs (phases for a complex dtype). Unbiased. The standard error, entry by entry,
    is the one of :class:`XTrace`.

    Args:
        products: $m = 2k$, at least 4; half of them are with the adjoint.

    Raises:
        ArgumentError: ``products`` is less than 4.
        StructureError: the operator has no adjoint product.

    Cost: $2k$ products, memory of five blocks ``[n, k]``, $O(nk^2)$ multiplications.

    Source: Epperly, Tropp and Webber, "XTrace: making the most of every sample in stochastic trace
    estimation" (2024), section 2.5.

    Example:
        >>> import torch
        >>> from woodbury import LowRank
        >>> from woodbury.spectra import XDiag, diagonal
        >>> A = LowRank(torch.randn(300, 5).double())
        >>> found = diagonal(A, XDiag(products=20))  # exact: the rank is below the sketch
        >>> torch.allclose(found.value, A.diagonal()), bool(found.standard_error.max() < 1e-10)
        (True, True)
    """

    products: int = 60

    def __post_init__(self) -> None:
        require_products(self.products, 4, "XDiag")

    def _diagonal(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        n, k = A.shape[0], self.products // 2
        found = sketch(A, k, "sign", generator)
        Q, S = found.basis, found.left_out.to(found.basis)
        Z = multiply(A, Q, adjoint=True)
        rho = (found.left_out.conj() * found.R).sum(0).to(Q)
        QS, ZS = Q @ S, Z @ S
        samples = (Q * Z.conj()).sum(1, keepdim=True) - QS * ZS.conj()
        samples += found.probes.conj() * QS * rho
        samples = real_if_hermitian(samples.T, A)
        shared = real_if_hermitian(_shared(found, QS, ZS), A)
        spread = (samples - samples.mean(0)).abs().square().sum(0)
        shared = shared.real if shared.is_complex() else shared
        error = ((spread + shared.clamp_min(0)) / (k * (k - 1))).sqrt()
        return of_samples(
            samples,
            bias=torch.finfo(A.dtype).eps * n**0.5 * found.R.abs().amax().item(),
            products=k + Q.shape[1],
            method=self,
            error=error,
        )


def _shared(found: Sketch, QS: Tensor, ZS: Tensor) -> Tensor:
    r"""$\sum_{i \ne j} d_{ij} \odot d_{ji}$ of ``leave_one_out``, entry by entry: ``[n]``.

    With the unit vector $t_j$ that leaving out $j$ takes away beside $s_i$,
    $d_{ij} = Qt_j \odot \overline{Zt_j} - \bar\omega_i \odot Qt_j\,(t_j^H r_i)$.
    """
    S, R, k = found.left_out, found.R, QS.shape[1]
    total = torch.zeros_like(QS[:, 0])
    if not bool(S.any()):
        return total
    pairs = [without_two(S, i) for i in range(k)]

    def change(i: int, j: Tensor, c: Tensor, V: Tensor) -> Tensor:
        """``d_ij`` for all ``j``, ``[n, k]``: c and V hold t_j beside s_i."""
        q = QS[:, i : i + 1] * c[0] + QS[:, j] * c[1]
        z = ZS[:, i : i + 1] * c[0] + ZS[:, j] * c[1]
        inside = (V.mH @ R[:, i]).to(q)
        return q * z.conj() - found.probes[:, i : i + 1].conj() * q * inside

    for i in range(k - 1):
        others = torch.arange(i + 1, k)
        V, c = pairs[i]
        mine = change(i, others, c[:, others].to(QS), V[:, others])
        for j in others.tolist():
            V, c = pairs[j]
            one = torch.tensor([i])
            theirs = change(j, one, c[:, one].to(QS), V[:, one])[:, 0]
            total += 2 * mine[:, j - i - 1] * theirs
    return total
