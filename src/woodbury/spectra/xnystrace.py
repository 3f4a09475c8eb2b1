"""XNysTrace: the leave-one-out trace of the Nystrom approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.errors import NotPositiveDefiniteError
from woodbury.spectra.estimate import Estimate, exactly, of_samples
from woodbury.spectra.leave_one_out import standard_error
from woodbury.spectra.method import (
    Method,
    draw_probes,
    multiply,
    require_products,
    require_tag,
    wide,
)

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["XNysTrace"]


@dataclass(frozen=True)
class XNysTrace(Method):
    r"""The trace of a Nystrom approximation, and of the rest, with every probe left out in turn.

    $$ \frac1m\sum_i \big[\operatorname{tr}\hat A_{(i)} + c_i\,\omega_i^H(A - \hat A_{(i)})
    \,\omega_i\big], $$

    where $\hat A_{(i)} = A\Omega_{(i)} (\Omega_{(i)}^H A\,\Omega_{(i)})^{+} (A\,\Omega_{(i)})^H$ is
    from all probes but $\omega_i$, and $c_i = (n - m + 1) / \|u_i\|^2$ with the part $u_i$ of
    $\omega_i$ that is orthogonal to the others. Every probe takes one product where
    :class:`XTrace` takes two, for positive semidefinite operators. Computed for $A + \nu I$ with
    $\nu$ of the size of rounding. The standard error is that of ``XTrace``.

    Args:
        products: $m$, at least 3.

    Raises:
        ArgumentError: ``products`` is less than 3.
        TagError: the operator is not tagged positive semidefinite.
        NotPositiveDefiniteError: the probes found negative curvature beyond rounding.

    Cost: ``products`` products, memory of three blocks ``[n, m]``, $4nm^2$ multiplications.

    Source: Epperly, Tropp and Webber, "XTrace: making the most of every sample in stochastic trace
    estimation" (2024), section 2.3 and, for the scaling, section 2.4.

    Example:
        >>> import torch
        >>> from woodbury import Dense
        >>> from woodbury.spectra import XNysTrace, trace
        >>> X = torch.randn(400, 400).double() / torch.arange(1, 401)
        >>> A = Dense(X.T @ X, tags={"positive_semidefinite"})
        >>> found = trace(A, XNysTrace(products=40))
        >>> abs(found.value - A.trace()) < 3 * found.standard_error < 0.01 * A.trace()
        tensor(True)
    """

    products: int = 60

    def __post_init__(self) -> None:
        require_products(self.products, 3, "XNysTrace")

    def _trace(self, A: LinearOperator, generator: torch.Generator) -> Estimate:
        require_tag(A, "positive_semidefinite", "XNysTrace")
        n, k, space = A.shape[0], self.products, A.space
        probes = draw_probes(A, k, "gaussian", generator)
        Y = multiply(A, probes)
        size = float(torch.linalg.vector_norm(wide(space.norm(Y))))
        noise = torch.finfo(A.dtype).eps * size
        if size == 0:
            return exactly(torch.zeros((), dtype=torch.float64), self, k)
        # All is done for A + shift * I, whose core has a Cholesky factor whatever the rank of A.
        shift = noise / n**0.5
        Y = Y.add_(probes, alpha=shift)
        _, R = orthonormalize(Y, space)
        H, N = wide(space.gram(probes, Y)), wide(space.gram(probes, probes))
        C, failed = torch.linalg.cholesky_ex((H + H.mH) / 2, upper=True)
        if int(failed):
            low = float(torch.linalg.eigvalsh((H + H.mH) / 2)[0]) / n
            raise NotPositiveDefiniteError(
                f"omega^H A omega / omega^H omega = {low:.3g} was found for a combination of the "
                "probes: A is not positive semidefinite; use XTrace"
            )
        inverse = torch.linalg.solve_triangular(C, torch.eye(k, dtype=C.dtype), upper=True)
        core, gram = inverse @ inverse.mH, torch.linalg.inv(N)
        B = torch.linalg.solve_triangular(C, wide(R), upper=True, left=False)
        total = B.abs().square().sum()
        G = B @ inverse.mH  # A omega times the core, up to an orthonormal basis
        M = G.mH @ G
        k1, m1, n1 = (torch.diagonal(T).real for T in (core, M, gram))
        samples = total - m1 / k1 + (n - k + 1) * n1 / k1 - shift * n
        # Leaving two probes out: the inverses of 2 x 2 blocks, for all pairs at once. pairs[j, i]
        # is the estimate with probe i from the sketch without both.
        det = torch.outer(k1, k1) - core.abs().square()
        cross = 2 * (core * M.conj()).real
        kept = total - (torch.outer(k1, m1) + torch.outer(m1, k1) - cross) / det
        missed = (torch.outer(n1, n1) - gram.abs().square()) / n1.unsqueeze(1)
        rest = (n - k + 2) * missed * (k1.unsqueeze(1) / det)
        pairs = kept + rest - shift * n
        return of_samples(
            samples,
            bias=n**0.5 * noise,
            products=k,
            method=self,
            error=standard_error(samples, pairs),
        )
