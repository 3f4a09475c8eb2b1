"""Mehrotra's interior-point method for batches of convex quadratic programs, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Problem", "follow", "interior_point"]

Solver = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_RIDGE = 1e-11  # of the factorised matrix, taken out again by refinement
_CERTIFICATE = 1e-8  # how well a proof of infeasibility must hold


def interior_point(
    P: Tensor,
    q: Tensor,
    A: Tensor,
    b: Tensor,
    G: Tensor,
    h: Tensor,
    *,
    tol: float,
    max_steps: int,
    barrier: float = 0.0,
) -> tuple[Tensor, int]:
    """``[..., n + p + m + 3]``: ``z``, multipliers, status, residual, margin; and the steps taken.

    The status is 0 (optimal), 1 (infeasible), 2 (unbounded) or 3 (not reached). With a ``barrier``
    it ends on the central path, where every slack times its multiplier is that.
    """
    batch, n, p, m = q.shape[:-1], q.shape[-1], b.shape[-1], h.shape[-1]
    count = batch.numel()
    P, A, G = (M.reshape(count, *M.shape[-2:]) for M in (P, A, G))
    q, b, h = (v.reshape(count, v.shape[-1]) for v in (q, b, h))
    found, steps = follow(Problem(P, q, A, b, G, h, barrier), tol, max_steps)
    return found.reshape(*batch, n + p + m + 3), steps


def follow(problem: Problem, tol: float, max_steps: int) -> tuple[Tensor, int]:
    """What :func:`interior_point` finds, as rows, and its steps."""
    q, h = problem.q, problem.h
    z, nu, s, lam = problem.start()
    best = [z, nu, lam]
    status = torch.full((len(q),), 3, device=q.device)
    least = torch.full((len(q),), torch.inf, dtype=q.dtype, device=q.device)
    steps = 0
    for step in range(max_steps + 1):
        residual, proofs = problem.judge(z, nu, s, lam)
        better = (status == 3) & (residual < least)
        least = torch.where(better, residual, least)
        best = [
            torch.where(better.unsqueeze(-1), new, old)
            for new, old in zip((z, nu, lam), best, strict=True)
        ]
        status = torch.where((status == 3) & (least <= tol), 0, status)
        for code, proof in enumerate(proofs, 1):
            status = torch.where((status == 3) & proof, code, status)
        running = status == 3
        if step == max_steps or not bool(running.any()):
            break
        moved = problem.step(z, nu, s, lam)
        fine = running & torch.stack([torch.isfinite(t).all(-1) for t in moved]).all(0)
        if not bool(fine.any()):
            break
        z, nu, s, lam = (
            torch.where(fine.unsqueeze(-1), new, old)
            for new, old in zip(moved, (z, nu, s, lam), strict=True)
        )
        steps = step + 1
    z, nu, lam = best
    slack = h - problem.G_times(z)
    margin = torch.full_like(least, torch.inf)
    if problem.m:
        margin = torch.maximum(lam, slack).amin(-1)
    report = torch.stack([status.to(q.dtype), least, margin], -1)
    return torch.cat([z, nu, lam, report], -1), steps


class Problem:
    """The data of a batch, and what one step of the method does with it."""

    def __init__(
        self, P: Tensor, q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, barrier: float
    ) -> None:
        self.barrier = barrier
        self.P, self.q, self.A, self.b, self.G, self.h = P, q, A, b, G, h
        self.n, self.p, self.m = q.shape[-1], b.shape[-1], h.shape[-1]

    def P_times(self, z: Tensor) -> Tensor:
        """``P z``."""
        return _times(self.P, z)

    def A_times(self, z: Tensor, *, transposed: bool = False) -> Tensor:
        """``A z``, or ``A^T z``."""
        return _times(self.A.mT if transposed else self.A, z)

    def G_times(self, z: Tensor, *, transposed: bool = False) -> Tensor:
        """``G z``, or ``G^T z``."""
        return _times(self.G.mT if transposed else self.G, z)

    def start(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The minimum with the inequalities as a penalty, moved inside."""
        z, nu, _ = self.factorised(torch.ones_like(self.h))(-self.q, self.b, self.h)
        slack = self.h - self.G_times(z)
        if not self.m:
            return z, nu, slack, slack
        low = (-slack).amax(-1, keepdim=True)
        s = torch.where(low < 0, slack, slack + low + 1).clamp_min(1e-2)
        high = slack.amax(-1, keepdim=True)
        lam = torch.where(high < 0, -slack, -slack + high + 1).clamp_min(1e-2)
        return z, nu, s, lam

    def judge(
        self, z: Tensor, nu: Tensor, s: Tensor, lam: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The largest relative violation, and whether infeasibility or unboundedness is proved."""
        Pz, Az, Gz = self.P_times(z), self.A_times(z), self.G_times(z)
        An, Gl = self.A_times(nu, transposed=True), self.G_times(lam, transposed=True)
        dual = _size(Pz + self.q + An + Gl) / (1 + _largest(Pz, self.q, An, Gl))
        equal = _size(Az - self.b) / (1 + _largest(Az, self.b))
        over = _size((Gz - self.h).clamp_min(0)) / (1 + _largest(Gz, self.h))
        objective = (z * Pz).sum(-1) / 2 + (self.q * z).sum(-1)
        against = (self.b * nu).sum(-1) + (self.h * lam).sum(-1)
        gap = ((z * Pz).sum(-1) + (self.q * z).sum(-1) + against).abs() / (1 + objective.abs())
        if self.barrier:
            over = _size(Gz + s - self.h) / (1 + _largest(Gz, self.h))
            gap = _size(s * lam / self.barrier - 1)
        residual = torch.stack([dual, equal, over, gap]).amax(0)
        # Farkas: A'nu + G'lam = 0 with b'nu + h'lam < 0 (lam > 0 by construction).
        empty = (against < 0) & (_size(An + Gl) <= _CERTIFICATE * -against)
        falls = -(self.q * z).sum(-1)
        flat = torch.stack([_size(Pz), _size(Az), _size(Gz.clamp_min(0))]).amax(0)
        endless = (falls > 0) & (flat <= _CERTIFICATE * falls)
        return residual, (empty, endless)

    def step(self, z: Tensor, nu: Tensor, s: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        """A predictor, a corrector, and as far along it as slacks stay positive."""
        dual = self.P_times(z) + self.q
        dual = dual + self.A_times(nu, transposed=True) + self.G_times(lam, transposed=True)
        equal = self.A_times(z) - self.b
        over = self.G_times(z) + s - self.h
        solve = self.factorised(lam / s)

        def direction(product: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            dz, dnu, dlam = solve(-dual, -equal, product / lam - over)
            return dz, dnu, -over - self.G_times(dz), dlam

        if not self.m:
            dz, dnu, _, _ = direction(s)
            return z + dz, nu + dnu, s, lam
        mu = (s * lam).mean(-1, keepdim=True)
        _, _, ds, dlam = direction(s * lam)
        length = torch.minimum(_room(s, ds), _room(lam, dlam))
        ahead = ((s + length * ds) * (lam + length * dlam)).mean(-1, keepdim=True)
        centre = ((ahead / mu).clamp(0, 1) ** 3 * mu).clamp_min(self.barrier)
        # Near the end of a path that stops at the barrier plain Newton steps end on it.
        near = mu <= 10 * self.barrier
        product = torch.where(near, s * lam - self.barrier, s * lam + ds * dlam - centre)
        dz, dnu, ds, dlam = direction(product)
        length = torch.minimum(_room(s, ds), _room(lam, dlam))
        length = (0.995 * length).clamp(max=1)
        return z + length * dz, nu + length * dnu, s + length * ds, lam + length * dlam

    def factorised(self, weights: Tensor) -> Solver:
        """A solver of ``[[P, A', G'], [A, 0, 0], [G, 0, -1/W]]``.

        By ``[[P + G' W G, A'], [A, 0]]``, refined against the matrix without ridge.
        """
        top = self.P + self.G.mT @ (weights.unsqueeze(-1) * self.G)
        corner = self.q.new_zeros(len(self.q), self.p, self.p)
        K = torch.cat([torch.cat([top, self.A.mT], -1), torch.cat([self.A, corner], -1)], -2)
        ridge = _RIDGE * (1 + self.P.abs().amax((-1, -2))).unsqueeze(-1)
        sign = torch.cat([torch.ones(self.n), -torch.ones(self.p)]).to(K)
        factors = torch.linalg.lu_factor_ex(K + torch.diag_embed(ridge * sign))[:2]

        def solve(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first = first + _times(self.G.mT, weights * third)
            right = torch.cat([first, second], -1).unsqueeze(-1)
            x = torch.linalg.lu_solve(*factors, right)
            for _ in range(3):
                x = x + torch.linalg.lu_solve(*factors, right - K @ x)
            one, two = x.squeeze(-1).split([self.n, self.p], -1)
            return one, two, weights * (_times(self.G, one) - third)

        return solve


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _size(v: Tensor) -> Tensor:
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])


def _largest(*vectors: Tensor) -> Tensor:
    return torch.stack([_size(v) for v in vectors]).amax(0)


def _room(v: Tensor, dv: Tensor) -> Tensor:
    """How far along ``dv`` the entries of ``v`` stay positive, at most 1."""
    ratio = torch.where(dv < 0, -v / torch.where(dv < 0, dv, -1), torch.inf)
    return ratio.amin(-1, keepdim=True).clamp(max=1)
