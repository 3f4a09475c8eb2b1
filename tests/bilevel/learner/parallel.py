"""One process of the training that ``test_distributed.py`` starts; a program, not a test.

    python parallel.py RANK PROCESSES STORE OUTPUT RECIPE

With one process there is no process group: the training of the joined batch.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from woodbury import CG, Neumann
from woodbury.bilevel import ExampleWeights, HyperLearner, LearningRates, WeightDecay

ROWS, STEPS = 16, 6
# Validation rows of the first of two processes: means are over rows, not over processes.
CUT = 7


def main(rank: int, processes: int, store: str, output: str, recipe: str) -> None:
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=gen, dtype=torch.float64)
    y = torch.randint(0, 2, (ROWS,), generator=gen)
    v = torch.randn(10, 3, generator=gen, dtype=torch.float64)
    z = torch.randint(0, 2, (10,), generator=gen)
    torch.manual_seed(1)
    inside = model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    rows, valid = torch.arange(ROWS), torch.arange(10)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
        )
        model = nn.parallel.DistributedDataParallel(inside)
        rows = rows[rank::processes]
        valid = valid[:CUT] if rank == 0 else valid[CUT:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    decay = WeightDecay(model, 1.0)  # enough for a positive definite Hessian
    weights = ExampleWeights(ROWS).double()
    with torch.no_grad():  # started apart, the first process's values count
        weights.logits.add_(rank)
    rates = LearningRates(optimizer).double()
    learner = HyperLearner(
        model,
        "cross_entropy",
        [decay, weights, rates],
        optimizer=optimizer,
        recipe=CG(rtol=1e-10) if recipe == "cg" else Neumann(2),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.05),
        on_failure="raise",
    )
    reports = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        learner.loss((x[rows], y[rows], rows)).backward()
        optimizer.step()
        reports.append(learner.step((v[valid], z[valid])).certificate())
    numbers = {name: p.detach() for name, p in learner.hypers["WeightDecay"].named_parameters()}
    numbers |= {"weights": weights.logits, "rates": rates.log_rates}
    numbers |= {f"model.{name}": p.detach() for name, p in inside.named_parameters()}
    try:  # an empty batch in one process must not leave the other waiting
        learner.step((v[:0], z[:0]) if rank == 0 else (v, z))
        error = ""
    except ValueError as found:
        error = str(found)
    try:
        learner.step((v * float("nan") if rank == 0 else v, z))
        nan = ""
    except ArithmeticError as found:
        nan = str(found)
    torch.save({"numbers": numbers, "reports": reports, "error": error, "nan": nan}, output)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
