"""Stochastic Lanczos quadrature: what the density, the log-determinant and others are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodbury.decompositions.lanczos_batch import (
    LanczosBatch,
    Reorthogonalization,
    lanczos_batch,
)
from woodbury.errors import ArgumentError
from woodbury.operators.dtypes import working_dtype
from woodbury.spectra.method import Method, Probes, draw_probes, multiply, require_probes, wide

if TYPE_CHECKING:
    from woodbury.operators.base import LinearOperator

__all__ = ["SLQ"]

# The matrix is formed where that takes no more products, up to this size.
_FORMED = 2000
_BASES_BYTES = 2**30

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class SLQ(Method):
    r"""$\operatorname{tr} f(A) \approx \frac{n}{p}\sum_j \sum_i w_{ji} f(\theta_{ji})$.

    ``steps`` Lanczos steps from each of ``probes`` random vectors, for all of them at once, give
    Gauss rules whose nodes $\theta_{ji}$ are Ritz values. A rule of $m$ steps is exact for
    polynomials of degree $2m - 1$. What is made of it states two errors: chance, from the spread
    over the probes, and the quadrature error as ``bias``.

    Args:
        probes: $p$, at least 2.
        steps: $m$, at least 1.
        reorthogonalize: ``"full"``, ``"selective"`` (against converged Ritz vectors) or ``"none"``
            (least memory; the nodes then hold copies of the same eigenvalue, with its weight
            shared among them); see :func:`~woodbury.decompositions.lanczos_batch`.
        kind: of the probes: ``"sign"``, ``"sphere"`` or ``"gaussian"`` (all of length $\sqrt n$).
        chunk: probes at a time; default as many as keep the bases within 1 GiB. It changes memory,
            not the result.

    Raises:
        ArgumentError: a number is too small or a name unknown.

    Cost: ``probes * steps`` products in ``steps`` blocks of ``chunk`` columns; memory of ``chunk *
    (steps + 3)`` vectors, or ``4 * chunk`` without reorthogonalisation. Operators no larger than
    2,000 and ``probes * steps`` are formed instead: ``n`` products, exact eigenvalues.

    Source: Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"
    (2017), algorithm 1; Lin, Saad and Yang, "Approximating spectral densities of large matrices"
    (2016), section 3.

    Example:
        >>> from woodbury.spectra import SLQ
        >>> SLQ(probes=10, steps=80)
        SLQ(probes=10, steps=80, reorthogonalize='full', kind='sign', chunk=None)
    """

    probes: int = 20
    steps: int = 50
    reorthogonalize: Reorthogonalization = "full"
    kind: Probes = "sign"
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("probes", self.probes, 2), ("steps", self.steps, 1)):
            if value < least:
                raise ArgumentError(f"{name} is {value}; it must be at least {least}")
        if self.chunk is not None and self.chunk < 1:
            raise ArgumentError(f"chunk is {self.chunk}; it must be at least 1")
        if self.reorthogonalize not in ("full", "selective", "none"):
            raise ArgumentError(
                f"reorthogonalize is {self.reorthogonalize!r}; it must be 'full', 'selective' or "
                "'none'"
            )
        require_probes(self.kind)

    def _spares(self, n: int) -> bool:
        return n > min(self.probes * self.steps, _FORMED)

    def run(
        self, A: LinearOperator, generator: torch.Generator, progress: Progress | None = None
    ) -> LanczosBatch:
        """The tridiagonal matrices of all probes, without their bases."""
        n = A.shape[0]
        starts = draw_probes(A, self.probes, self.kind, generator)
        width = self.chunk
        if width is None:
            vectors = 4 if self.reorthogonalize == "none" else self.steps + 3
            width = max(1, _BASES_BYTES // (n * vectors * starts.dtype.itemsize))
        parts = []
        for start in range(0, self.probes, width):

            def note(step: int, start: int = start) -> None:
                if progress is not None:
                    done = start * self.steps + step * min(width, self.probes - start)
                    progress(done, self.probes * self.steps)

            with torch.no_grad():
                part = lanczos_batch(
                    A,
                    self.steps,
                    starts[:, start : start + width],
                    reorthogonalize=self.reorthogonalize,
                    progress=note,
                )
            parts.append(part.without_bases())
        return parts[0] if len(parts) == 1 else _together(parts)


def eigenvalues_by_products(A: LinearOperator) -> Tensor:
    """All eigenvalues of a hermitian operator from ``n`` products, float64 on the CPU."""
    n = A.shape[0]
    M = wide(multiply(A, torch.eye(n, dtype=working_dtype(A.dtype), device=A.device)))
    return torch.linalg.eigvalsh((M + M.mH) / 2)


def _together(parts: list[LanczosBatch]) -> LanczosBatch:
    """Several runs as one; shorter ones are padded as a run pads its columns."""
    m = max(part.diagonal.shape[1] for part in parts)
    diagonal, off = [], []
    for part in parts:
        missing = m - part.diagonal.shape[1]
        diagonal.append(torch.cat([part.diagonal, part.diagonal[:, :1].repeat(1, missing)], 1))
        off.append(torch.nn.functional.pad(part.off_diagonal, (0, missing)))
    return LanczosBatch(
        diagonal=torch.cat(diagonal),
        off_diagonal=torch.cat(off),
        remainder=torch.cat([part.remainder for part in parts]),
        sizes=sum((part.sizes for part in parts), ()),
        norms=torch.cat([part.norms for part in parts]),
        bases=None,
        products=sum(part.products for part in parts),
    )


def means(nodes: Tensor, weights: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The value of every rule: ``[p]``. Nodes without weight do not count, whatever f is there."""
    return torch.where(weights > 0, f(nodes) * weights, 0).sum(1)


def tail(run: LanczosBatch, f: Callable[[Tensor], Tensor], now: Tensor) -> Tensor:
    r"""An estimate of how far every Gauss rule is from the integral: ``[p]``.

    Rules of $m$, $m - s$ and $m - 2s$ nodes differ by $d_1$ and $d_0$. An error that falls like
    $m^{-q}$ has $q$ in $d_1 / d_0$, and what is left of it is $d_1 / ((1 - s/m)^{-q} - 1)$. Errors
    for analytic $f$ fall faster in the end; before, and for the logarithm of badly conditioned
    operators always in practice, they fall like this.

    Args:
        run: the tridiagonal matrices.
        f: what is integrated.
        now: the values of the whole rules, ``[p]``.
    """
    m = run.diagonal.shape[1]
    exact = run.remainder == 0
    if m < 3:
        return torch.where(exact, 0.0, math.inf)
    s = max(1, m // 4)
    before, first = (means(*run.quadrature(m - j * s), f) for j in (1, 2))
    last, earlier = (now - before).abs(), (before - first).abs()
    ratio = last / earlier.clamp_min(torch.finfo(torch.float64).tiny)
    low, high = torch.full_like(ratio, 0.5), torch.full_like(ratio, 50.0)
    near, far = 1 / (1 - s / m), 1 / (1 - 2 * s / m)
    for _ in range(40):  # the ratio falls with q
        q = (low + high) / 2
        above = (near**q - 1) / (far**q - near**q) > ratio
        low, high = torch.where(above, q, low), torch.where(above, high, q)
    return torch.where(exact, 0.0, last / (near**low - 1))
