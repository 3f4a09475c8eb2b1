"""Sensitivity of a packing of soft discs to their diameter: implicit, unrolled, finite differences.

The check of Blondel et al. (2022, section 4.4): 128 discs in a periodic square, half of diameter 1
and half of diameter theta = 0.6, with the energy sum_{i<j} (1 - r / s_ij)^2 / 2 over pairs nearer
than s_ij, the mean of their diameters. The areas of all discs are 1.0 and 0.9 of that of the
square, the second near the point (0.84) where they no longer jam. FIRE minimises from random
positions until no force exceeds 1e-10; sought is dx / dtheta at the minimum.

Reference: the pseudo-inverse of the dense Hessian in float64. Its null space holds the two
translations and two directions for each disc that touches nobody; errors are measured across it.
implicit: implicit_jvp with four recipes, which meet the singular, consistent system as it is.
unrolled: forward mode through every step of FIRE. central difference: minimised again from x at
theta +- 1e-6 by FIRE and NewtonCG. Contacts that open or close in between make it wrong, and are
counted.

    python benchmarks/molecular_dynamics.py [--seeds 20] [--particles 128] [--figure PATH]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woodbury import CG, GMRES, MINRES, BiCGSTAB
from woodbury.implicit import NewtonCG, implicit_jvp
from woodbury.solvers import SolveReport

THETA = 0.6
FORCE = 1e-10
STEP = 1e-6  # of the finite difference
RTOL = 1e-8
RECIPES = {
    "BiCGSTAB": BiCGSTAB(rtol=RTOL),
    "GMRES": GMRES(rtol=RTOL, restart=100),
    "MINRES": MINRES(rtol=RTOL),
    "CG": CG(rtol=RTOL),
}


class Discs:
    """Half of them of diameter theta, half of diameter 1, in a periodic square."""

    def __init__(self, count: int, packing: float) -> None:
        self.count = count
        area = count // 2 * THETA**2 + count - count // 2
        self.side = (torch.pi / 4 * area / packing) ** 0.5
        self.small = torch.arange(count) < count // 2

    def overlaps(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1 - r / s where positive, else 0; directions; s. ``x [..., N, 2]``, ``theta [...]``."""
        diameters = 1 + self.small.to(x.dtype) * (theta.unsqueeze(-1) - 1)
        s = (diameters.unsqueeze(-1) + diameters.unsqueeze(-2)) / 2
        d = x.unsqueeze(-2) - x.unsqueeze(-3)
        d = d - self.side * torch.round(d.detach() / self.side)
        eye = torch.eye(self.count, dtype=x.dtype)
        r = ((d * d).sum(-1) + eye).sqrt()
        gap = torch.relu(1 - r / s) * (1 - eye)
        return gap, d / r.unsqueeze(-1), s

    def energy(self, x: Tensor, theta: Tensor) -> Tensor:
        """Of one configuration, or of each of a batch."""
        gap = self.overlaps(x, theta)[0]
        return 0.25 * (gap * gap).sum((-2, -1))  # each pair is there twice

    def force(self, x: Tensor, theta: Tensor) -> Tensor:
        """Minus the gradient in closed form, which forward mode differentiates once."""
        gap, direction, s = self.overlaps(x, theta)
        return ((gap / s).unsqueeze(-1) * direction).sum(-2)

    def contacts(self, x: Tensor, theta: Tensor) -> Tensor:
        """Which pairs touch."""
        return self.overlaps(x, theta)[0] > 0


def fire(discs: Discs, x: Tensor, theta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """FIRE (Bitzek et al. 2006), every configuration at its own pace; steps taken by each.

    Written without branches on values, so that forward mode goes through.
    """
    shape = (*x.shape[:-2], 1, 1)
    v, F = torch.zeros_like(x), discs.force(x, theta)
    dt, mix = x.new_full(shape, 0.1), x.new_full(shape, 0.1)
    uphill_ago = torch.zeros(shape)
    taken = torch.zeros(shape)
    for _ in range(steps):
        running = F.detach().abs().amax((-2, -1), keepdim=True) > FORCE
        if not bool(running.any()):
            break
        taken = taken + running
        new = x + dt * v + dt**2 / 2 * F
        new_F = discs.force(new, theta)
        new_v = v + dt / 2 * (F + new_F)
        # Forces may be zero to the last bit; the norm has no derivative there.
        speed = ((new_v**2).sum((-2, -1), keepdim=True) + 1e-300).sqrt()
        pull = ((new_F**2).sum((-2, -1), keepdim=True) + 1e-300).sqrt()
        downhill = (new_F * new_v).sum((-2, -1), keepdim=True).detach() > 0
        mixed = new_v + mix * (speed / pull * new_F - new_v)
        uphill_ago = torch.where(downhill, uphill_ago + 1, 0)
        free = downhill & (uphill_ago > 5)
        grown = torch.where(free, (1.1 * dt).clamp_max(0.4), dt)
        new_dt = torch.where(downhill, grown, dt / 2)
        new_mix = torch.where(free, 0.99 * mix, torch.where(downhill, mix, 0.1))
        new_v = torch.where(downhill, mixed, 0.0)
        x, F, v = (torch.where(running, a, b) for a, b in ((new, x), (new_F, F), (new_v, v)))
        dt, mix = torch.where(running, new_dt, dt), torch.where(running, new_mix, mix)
    return x, taken.flatten()


def unrolled(
    discs: Discs, start: Tensor, theta: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The minima, the tangent of all steps of FIRE in theta, and the steps."""
    moved = torch.ones_like(theta)
    x, dx, taken = torch.func.jvp(
        lambda t: fire(discs, start, t, steps), (theta,), (moved,), has_aux=True
    )
    return x, dx, taken


def polished(discs: Discs, x: Tensor, theta: Tensor, steps: int) -> Tensor:
    """A minimum near ``x`` to the last digits."""
    near, _ = fire(discs, x, theta, steps)
    newton = NewtonCG(tol=1e-15, max_steps=30, batched=True)
    found = newton.run(discs.energy, near, theta, throw=False)
    better = found.residual < torch.linalg.vector_norm(discs.force(near, theta), dim=(-2, -1))
    return torch.where(better[:, None, None], found.value, near)


def reference(discs: Discs, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, float]:
    """dx / dtheta by the dense Hessian, its eigenvectors, the condition across the null space."""

    def slope(flat: Tensor, theta: Tensor) -> Tensor:
        return -discs.force(flat.reshape(x.shape), theta).reshape(-1)

    flat = x.reshape(-1)
    H = torch.func.jacrev(slope)(flat, theta)
    mixed = torch.func.jacrev(slope, argnums=1)(flat, theta)
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    stiff = values > 1e-9 * values[-1]
    V = vectors[:, stiff]
    dx = -V @ ((V.T @ mixed) / values[stiff])
    return dx.reshape(x.shape), V, (values[-1] / values[stiff][0]).item()


def error(row: dict[str, Any], name: str) -> float:
    """Of the derivative of that name, across the null space, relative."""
    off = row["stiff"].T @ (row[name] - row["exact"]).reshape(-1)
    return (torch.linalg.vector_norm(off) / torch.linalg.vector_norm(row["exact"])).item()


def measure(discs: Discs, seeds: int, steps: int) -> list[dict[str, Any]]:
    """One row for each seed."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(seeds, discs.count, 2, generator=generator, dtype=torch.float64)
    start = start * discs.side
    theta = torch.full((seeds,), THETA, dtype=torch.float64)
    began = time.perf_counter()
    _, taken = fire(discs, start, theta, steps)
    solving = time.perf_counter() - began
    began = time.perf_counter()
    minima, tangents, _ = unrolled(discs, start, theta, steps)
    unrolling = time.perf_counter() - began - solving
    x = polished(discs, minima, theta, steps)
    up, down = (polished(discs, x, theta + h, steps) for h in (STEP, -STEP))
    differences = (up - down) / (2 * STEP)
    rows = []
    for i in range(seeds):
        at = theta[i]
        exact, stiff, condition = reference(discs, x[i], at)
        row: dict[str, Any] = {
            "x": x[i],
            "exact": exact,
            "stiff": stiff,
            "null": len(stiff) - stiff.shape[1],
            "condition": condition,
            "steps": int(taken[i]),
            "solving": solving / seeds,
            "unrolled": tangents[i],
            "unrolled seconds": unrolling / seeds,
            "difference": differences[i],
            "same contacts": bool(
                torch.equal(discs.contacts(up[i], at + STEP), discs.contacts(down[i], at - STEP))
            ),
        }
        for name, recipe in RECIPES.items():
            report = SolveReport()
            began = time.perf_counter()
            found = implicit_jvp(
                discs.energy,
                x[i],
                (at,),
                torch.ones_like(at),
                argnums=0,
                kind="minimum",
                recipe=recipe,
                report=report,
            )
            row[name] = found
            row[f"{name} seconds"] = time.perf_counter() - began
            row[f"{name} products"] = report.products
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    def median(values: list[float]) -> float:
        return torch.tensor(values, dtype=torch.float64).median().item()

    finite = [row["unrolled"].isfinite().all().item() for row in rows]
    print(
        f"FIRE: {median([row['steps'] for row in rows]):.0f} steps, "
        f"{median([row['solving'] for row in rows]):.2f} s per seed; null space of dimension "
        f"{min(row['null'] for row in rows)} to {max(row['null'] for row in rows)}, condition "
        f"beyond it {median([row['condition'] for row in rows]):.1e}\n"
    )
    print(
        f"{'dx / dtheta by':<20} {'finite':>7} {'within 1 %':>11} {'median error':>13} "
        f"{'largest':>9} {'seconds':>8} {'products':>9}"
    )
    names = [*RECIPES, "unrolled", "difference"]
    for name in names:
        errors = [error(row, name) for row in rows]
        good = sum(e < 0.01 for e in errors)
        ok = sum(row[name].isfinite().all().item() for row in rows)
        largest = max((e for e in errors if e == e), default=float("nan"))
        seconds = [row.get(f"{name} seconds") for row in rows]
        products = [row.get(f"{name} products") for row in rows]
        label = f"implicit, {name}" if name in RECIPES else name
        print(
            f"{label:<20} {ok:>3}/{len(rows):<3} {good:>7}/{len(rows):<3} {median(errors):13.1e} "
            f"{largest:9.1e} "
            + (f"{median(seconds):8.3f} " if seconds[0] is not None else f"{'':>9}")
            + (f"{median(products):9.0f}" if products[0] is not None else "")
        )
    same = [row for row in rows if row["same contacts"]]
    worst = max((error(row, "difference") for row in same), default=float("nan"))
    print(
        f"\ncontacts are the same on both sides of the difference for {len(same)} of {len(rows)} "
        f"seeds; there it is off by {worst:.1e} at most"
    )
    ratios = [
        (row["unrolled"].abs().sum() / row["exact"].abs().sum()).item()
        for row, ok in zip(rows, finite, strict=True)
        if ok
    ]
    if ratios:
        print(
            f"sum |dx|, unrolled over exact where finite: median {median(ratios):.1e}, "
            f"{min(ratios):.1e} to {max(ratios):.1e}"
        )


def figure(path: Path, discs: Discs, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import EllipseCollection

    sums = {
        name: torch.stack([row[name].abs().sum() for row in rows])
        for name in ("exact", "MINRES", "unrolled", "difference")
    }
    pictures, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    shown = sums["unrolled"].clone()
    shown[~shown.isfinite()] = 1e30
    left.loglog(sums["exact"], shown.clamp_max(1e30), "x", color="C3", label="unrolled FIRE")
    left.loglog(sums["exact"], sums["difference"], "s", mfc="none", color="C7", label="difference")
    left.loglog(sums["exact"], sums["MINRES"], "o", ms=4, color="C0", label="implicit, MINRES")
    ends = [sums["exact"].min() / 1.5, sums["exact"].max() * 1.5]
    left.plot(ends, ends, color="k", lw=0.6)
    left.set_xlabel(r"$\sum|\partial x/\partial\theta|$ by the dense Hessian")
    left.set_ylabel("found")
    left.legend()
    row = rows[0]
    count, L = discs.count, discs.side
    at = row["x"].remainder(L)
    diameters = torch.where(discs.small, THETA, 1.0)
    right.add_collection(
        EllipseCollection(
            diameters.numpy(),
            diameters.numpy(),
            torch.zeros(count).numpy(),
            units="xy",
            offsets=at.numpy(),
            transOffset=right.transData,
            facecolors="none",
            edgecolors="0.6",
        )
    )
    dx = row["MINRES"]
    right.quiver(at[:, 0], at[:, 1], dx[:, 0], dx[:, 1], color="C0", angles="xy")
    right.set_xlim(0, L)
    right.set_ylim(0, L)
    right.set_aspect("equal")
    right.set_title(r"$\partial x/\partial\theta$, implicit")
    pictures.tight_layout()
    pictures.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--particles", type=int, default=128)
    parser.add_argument("--packing", type=float, nargs="*", default=[1.0, 0.9])
    parser.add_argument("--steps", type=int, default=10000, help="limit of FIRE")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    for packing in options.packing:
        discs = Discs(options.particles, packing)
        rows = measure(discs, options.seeds, options.steps)
        print(f"\n{options.particles} discs, packing fraction {packing:g}, {options.seeds} seeds")
        table(rows)
        if options.figure is not None and packing == options.packing[0]:
            figure(options.figure, discs, rows)


if __name__ == "__main__":
    main()
