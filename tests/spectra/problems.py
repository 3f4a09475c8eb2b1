"""Operators with known spectra, without structure to be seen, and coverage counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.solvers.systems import function, random, wide, with_spectrum
from torch import Tensor

from woodbury import LinearOperator
from woodbury.spectra import Estimate

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


def i(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=F64)


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "1/i^2": lambda n: i(n) ** -2,
    "1/i": lambda n: 1 / i(n),
    "flat": lambda n: 1 + i(n) / n,
    "exponential": lambda n: 0.8 ** i(n),
    "step": lambda n: torch.where(i(n) <= 20, 1.0, 1e-3).to(F64),
}


def hidden(
    spectrum: Tensor, *, dtype: torch.dtype = F64, seed: int = 0, tags: tuple[str, ...] = ()
) -> tuple[LinearOperator, Tensor]:
    """An operator with the eigenvalues given, known by its products only, and its matrix."""
    M = with_spectrum(spectrum, dtype=dtype, seed=seed)
    return function(M, {"hermitian", *tags}), wide(M)


def semidefinite(name: str, n: int, dtype: torch.dtype = F64) -> tuple[LinearOperator, Tensor]:
    return hidden(SPECTRA[name](n), dtype=dtype, tags=("positive_semidefinite",))


def general(n: int, dtype: torch.dtype = F64, seed: int = 3) -> tuple[LinearOperator, Tensor]:
    """Not symmetric, with singular values that decay."""
    M = random(n, n, dtype=dtype, seed=seed) / torch.arange(1, n + 1)
    M = M.to(dtype)
    return function(M, set()), wide(M)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coverage(estimate: Callable[[torch.Generator], Estimate], truth: Tensor, runs: int) -> float:
    """The share of 95 % intervals, over runs (and entries), that hold the truth."""
    inside = []
    for seed in range(runs):
        low, high = estimate(seeded(seed)).interval(0.95)
        inside.append(((low <= truth) & (truth <= high)).to(F64).mean())
    return float(torch.stack(inside).mean())
