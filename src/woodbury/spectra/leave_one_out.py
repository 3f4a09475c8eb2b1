r"""What XTrace and XDiag share: a sketch of the range, with one probe or two left out of it.

The leave-one-out estimates $t_i$ share their sketch, so they are correlated, and their spread alone
says too little about their mean $\bar t$: by a factor of 1.3 to 3 on decaying spectra. But given
the other probes, $t_i$ is unbiased, and that gives the correlation away. Let $t_{i|j}$ be the
estimate of probe $i$ from the sketch without $i$ and $j$, which takes no further products, and
$d_{ij} = t_i - t_{i|j}$. Given all probes but $i$ and $j$, the estimates $t_{i|j}$ and $t_{j|i}$
are independent with the right mean, and $d_{ij}$ has mean zero over $\omega_i$ whatever
$\omega_j$ is. Of the covariance of $t_i$ and $t_j$ therefore remains

$$ C = E[d_{ij} d_{ji}], \qquad
\operatorname{Var}\bar t = \frac{\operatorname{Var} t_i - C}{k} + C, $$

where the spread of the $t_i$ estimates $\operatorname{Var} t_i - C$ without bias, and the mean of
$d_{ij} d_{ji}$ over all pairs estimates $C$ without bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.decompositions.orthonormal import orthonormalize
from woodbury.operators.base import LinearOperator
from woodbury.spectra.method import Probes, draw_probes, multiply, wide

__all__ = ["Sketch", "sketch", "standard_error", "without_two"]


@dataclass(frozen=True, eq=False)
class Sketch:
    r"""$A\,\Omega = Q R$, and unit vectors $s_i$ with $Q_{(i)} Q_{(i)}^H = Q (I - s_i s_i^H) Q^H$.

    $Q_{(i)}$ is an orthonormal basis of the range of $A\,\Omega$ without its column $i$: the
    $s_i$ are orthogonal to all columns of $R$ but one.

    Attributes:
        probes: $\Omega$, ``[n, k]``.
        products: $A\,\Omega$, ``[n, k]``.
        basis: $Q$, ``[n, r]``.
        R: ``[r, k]``, double precision on the CPU.
        left_out: the $s_i$ as columns ``[r, k]``; zero where ``r`` is less than ``k``.
        size: the norm of $A\,\Omega$.
    """

    probes: Tensor
    products: Tensor
    basis: Tensor
    R: Tensor
    left_out: Tensor
    size: float


def sketch(A: LinearOperator, k: int, kind: Probes, generator: torch.Generator) -> Sketch:
    """Draw ``k`` probes, multiply, factorise."""
    probes = draw_probes(A, k, kind, generator)
    Y = multiply(A, probes)
    Q, _ = orthonormalize(Y, A.space)
    R = wide(A.space.gram(Q, Y))
    size = float(torch.linalg.vector_norm(R))
    if len(R) < k:  # a space of its own drops directions that are zero to rounding
        return Sketch(probes, Y, Q, R, torch.zeros_like(R), size)
    # Where A has rank below k, R is singular to rounding and the s_i, which only have to be
    # orthogonal to what is not rounding, are any directions in which there is nothing else.
    U, values, Vh = torch.linalg.svd(R)
    least = torch.finfo(torch.float64).eps * size + torch.finfo(torch.float64).tiny
    S = U @ (Vh / values.clamp_min(least).unsqueeze(1))  # R^-H
    return Sketch(probes, Y, Q, R, S / torch.linalg.vector_norm(S, dim=0), size)


def without_two(S: Tensor, i: int) -> tuple[Tensor, Tensor]:
    r"""Unit vectors $t_j$ so that $s_i$ and $t_j$ span what leaving out $i$ and $j$ takes away.

    Args:
        S: the $s_i$ as columns ``[r, k]``.
        i: which one all are made orthogonal to.

    Returns:
        The $t_j$ as columns, and their coefficients: $t_j = (S c)_j$ with ``c`` of shape
        ``[2, k]``: those of $s_i$ and of $s_j$. Zero where there is nothing beside $s_i$.
    """
    s = S[:, i : i + 1]
    overlap = (s.mH @ S)[0]
    T = S - s * overlap
    again = (s.mH @ T)[0]
    T = T - s * again
    norm = torch.linalg.vector_norm(T, dim=0)
    scale = torch.where(norm > 1e-12, 1 / norm, 0)
    return T * scale, torch.stack([-(overlap + again) * scale, scale.to(S.dtype)])


def standard_error(samples: Tensor, pairs: Tensor) -> Tensor:
    r"""The standard error of the mean of leave-one-out estimates; see the top of this module.

    Args:
        samples: $t_i$, ``[k]``.
        pairs: $t_{i|j}$ in row ``j`` and column ``i``, ``[k, k]``; the diagonal is not looked at.
    """
    k = len(samples)
    changes = (samples - pairs).fill_diagonal_(0)
    shared = (changes * changes.mH).sum().real / (k * (k - 1))
    spread = (samples - samples.mean()).abs().square().sum() / (k * (k - 1))
    return (spread + shared.clamp_min(0)).sqrt()
