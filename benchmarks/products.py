"""Products with the Hessian, Gauss-Newton and Fisher matrices, relative to one gradient.

A ReLU network 784-512-512-10 (669,706 parameters), cross-entropy, 2,048 rows. Prints, for woodbury
and for curvlinops, the time of one product over the time of one gradient of the same loss, timed in
turns; beside it floating-point operations, which do not depend on what else the machine does, and
below peak memory.

    python benchmarks/products.py [--threads 2] [--repeats 20] [--clock wall|cpu]

curvlinops is run by the interpreter in WOODBURY_PEERS_PYTHON, by default .venv-peers/bin/python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"hessian": 1.7, "gauss-newton": 1.2, "fisher": 1.2}
COLUMNS = 8


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = [784, 512, 512, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.rand(2048, 784), torch.randint(0, 10, (2048,))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)


def ours(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    from woodbury import Fisher, GaussNewton, Hessian, Objective

    objective = Objective(model, "cross_entropy", (x, y))
    n = objective.space.dim
    vector, block = torch.randn(n), torch.randn(n, COLUMNS)
    vectors = [column.clone() for column in block.unbind(1)]
    kept = {
        "hessian": Hessian(objective),
        "gauss-newton": GaussNewton(objective),
        "fisher": Fisher(objective),
        "fisher sampled": Fisher(objective, "sampled"),
        "fisher empirical": Fisher(objective, "empirical"),
    }
    off = {
        "hessian": Hessian(objective, cache="off"),
        "gauss-newton": GaussNewton(objective, cache="off"),
        "fisher sampled": Fisher(objective, "sampled", cache="off"),
        "fisher empirical": Fisher(objective, "empirical", cache="off"),
    }
    jobs: dict[str, Callable[[], object]] = {}
    for name, operator in kept.items():
        jobs[f"{name}, kept"] = lambda a=operator: a @ vector
        jobs[f"{name}, {COLUMNS} alone"] = lambda a=operator: [a @ v for v in vectors]
        jobs[f"{name}, block of {COLUMNS}"] = lambda a=operator: a @ block
    for name, operator in off.items():
        jobs[f"{name}, streaming"] = lambda a=operator: a @ vector
    return jobs


def peer(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    import curvlinops as c

    criterion, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    operators = {
        "hessian": c.HessianLinearOperator,
        "gauss-newton": c.GGNLinearOperator,
        "fisher sampled": c.FisherMCLinearOperator,
        "fisher empirical": c.EFLinearOperator,
    }
    vector = torch.randn(sum(p.numel() for p in parameters))
    jobs: dict[str, Callable[[], object]] = {}
    for name, kind in operators.items():
        operator = kind(model, criterion, parameters, [(x, y)], check_deterministic=False)
        jobs[f"{name}, curvlinops"] = lambda a=operator: a @ vector
    return jobs


def width(name: str) -> int:
    """Columns that a job multiplies by."""
    return COLUMNS if str(COLUMNS) in name else 1


def timed(
    jobs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Ratio of minima, and median of ratios, of each job and the gradient before it."""
    model, x, y = network()
    one = gradient(model, x, y)

    def seconds(job: Callable[[], object]) -> float:
        start = clock()
        job()
        return clock() - start

    for job in [one, *jobs.values()]:  # graphs and signals are made here, and are not timed
        job()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            pairs[name].append((seconds(job), seconds(one)))
    base = min(b for times in pairs.values() for _, b in times)
    ratios = {}
    for name, times in pairs.items():
        columns = width(name)
        least, middle = min(a for a, _ in times) / base, median(a / b for a, b in times)
        ratios[name] = [least / columns, middle / columns]
    return ratios


def operations(job: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def memory(make: Callable[[], object]) -> int:
    from tests.curvature.peak import PeakMemory

    with PeakMemory() as peak:
        make()
    return peak.bytes


def of_peer(arguments: argparse.Namespace) -> dict[str, list[float]]:
    default = str(ROOT / ".venv-peers/bin/python")
    python = os.environ.get("WOODBURY_PEERS_PYTHON", default)
    if not Path(python).exists():
        print(f"no curvlinops: there is no interpreter at {python}")
        return {}
    command = [python, __file__, "--peer", f"--threads={arguments.threads}"]
    command += [f"--repeats={arguments.repeats}", f"--clock={arguments.clock}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(f"no curvlinops: {run.stderr.strip().splitlines()[-1]}")
        return {}
    return json.loads(run.stdout.splitlines()[-1])


def report_peaks() -> None:
    from woodbury import GaussNewton, Hessian, Objective

    model, x, y = network()
    objective = Objective(model, "cross_entropy", (x, y))
    vector = torch.randn(objective.space.dim)
    base = memory(gradient(model, x, y))
    print(
        f"\npeak memory over that of a gradient ({base / 2**20:.1f} MiB), parameters and data aside"
    )
    for name, kind in (("hessian", Hessian), ("gauss-newton", GaussNewton)):
        operator = kind(objective)
        first = memory(lambda a=operator: (a @ vector, a @ vector))
        off = kind(objective, cache="off")
        streaming = memory(lambda a=off: a @ vector)
        target = "  (target 3)" if name == "hessian" else ""
        print(f"  {name:14} kept {first / base:5.2f}{target}   streaming {streaming / base:5.2f}")
        print(f"    {operator.cache_report()}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: time of this process, for a machine that is busy; use it with --threads 1",
    )
    parser.add_argument("--peer", action="store_true", help="time curvlinops, print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    model, x, y = network()
    if arguments.peer:
        print(json.dumps(timed(peer(model, x, y), arguments.repeats, clock)))
        return
    jobs = ours(model, x, y)
    ratios = timed(jobs, arguments.repeats, clock)
    ratios |= of_peer(arguments)
    base = operations(gradient(model, x, y))
    print(f"time of one product over one gradient, {arguments.threads} threads, per column")
    print(f"{'':40} {'minimum':>8} {'median':>8} {'FLOPs':>8} {'target':>8}")
    for name in sorted(ratios):
        least, middle = ratios[name]
        columns = width(name)
        flops = f"{operations(jobs[name]) / base / columns:8.2f}" if name in jobs else " " * 8
        matrix = name.split(",")[0]
        target = f"{TARGETS[matrix]:8.1f}" if matrix in TARGETS and "kept" in name else ""
        if "block" in name:
            alone = ratios[f"{matrix}, {COLUMNS} alone"]
            parts = [f"{mine / its:.2f}" for mine, its in zip(ratios[name], alone, strict=True)]
            target = f"over alone: {', '.join(parts)}"
        print(f"{name:40} {least:8.2f} {middle:8.2f} {flops} {target}")
    report_peaks()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    main()
