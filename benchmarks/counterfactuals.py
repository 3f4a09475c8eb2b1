"""Remove the rows that scores name, train again, look at the loss: concrete, as kronfluence does.

UCI concrete with kronfluence's split, network (8-128-128-128-1) and training (SGD, 40 epochs, rate
0.03, weight decay 1e-5). For some test rows, the training rows that scores call most helpful are
removed and the model is trained again with the same seeds: a good method raises the loss of that
test row more. Prints the mean rise over test rows with a 95 % interval, for each method and for
random rows; kronfluence 1.0.1 (EK-FAC with its default damping) on the same model where installed.

    python benchmarks/counterfactuals.py --folder runs/counterfactuals
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from _attribution import PEERS, ROOT, data_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from woodbury import EKFAC, Influence, Objective
from woodbury.influence import Scores, rivals
from woodbury.influence.evaluation import counterfactual_removal


@dataclass
class Concrete:
    """Rows, model and training."""

    rows: int | None = None
    epochs: int = 40
    queries: int = 10
    data: tuple | None = field(default=None, repr=False)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.data is None:
            table = np.loadtxt(data_folder() / "uci/concrete.txt").astype(np.float32)
            order = np.random.RandomState(0).choice(len(table), len(table), replace=False)
            cut = int(np.round(0.9 * len(table)))
            train, test = table[order[:cut]], table[order[cut:]]
            mean, std = train.mean(0), train.std(0)
            parts = [torch.from_numpy((part - mean) / std) for part in (train, test)]
            x, y = parts[0][: self.rows, :-1], parts[0][: self.rows, -1:]
            asked = parts[1][: self.queries]
            self.data = x, y, asked[:, :-1], asked[:, -1:]
        return self.data

    def model(self) -> nn.Module:
        layers = [nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))

    def __call__(self, rows: Tensor, seed: int) -> nn.Module:
        x, y, _, _ = self.load()
        x, y = x[rows], y[rows]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            model = self.model()
            optimizer = torch.optim.SGD(
                model.parameters(), lr=0.03, weight_decay=1e-5, foreach=True
            )
            for _ in range(self.epochs):
                order = torch.randperm(len(x))[: len(x) // 32 * 32]
                for index in order.split(32):
                    optimizer.zero_grad()
                    nn.functional.mse_loss(model(x[index]), y[index]).backward()
                    optimizer.step()
        return model

    def losses(self, model: nn.Module) -> Tensor:
        _, _, x, y = self.load()
        return (model(x) - y).square().squeeze(1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where retrained measurements are kept")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--remove", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="few rows and epochs, no peer")
    options = parser.parse_args(arguments)
    task = Concrete(queries=options.queries)
    seeds = [0, 1]
    if options.small:
        task = Concrete(rows=96, epochs=2, queries=2)
        options.remove, options.processes, seeds = [8], 1, [0]
    folder = options.folder or Path(tempfile.mkdtemp())
    x, y, *asked = task.load()
    asked = tuple(asked)
    model = task(torch.arange(len(x)), 0)
    objective = Objective(model, "mse", (x, y))
    make = torch.Generator().manual_seed
    methods = {
        "EK-FAC": lambda: Influence(
            objective, matrix=EKFAC(objective, "sampled", generator=make(0))
        ).scores(asked),
        "Gauss-Newton, CG": lambda: Influence(objective).scores(asked),
        "Grad-Dot": lambda: rivals.grad_dot(objective, asked),
        "DataInf": lambda: rivals.data_inf(objective, asked),
    }
    if not options.small:
        methods["kronfluence EK-FAC"] = lambda: kronfluence(task, model)
    print(
        f"concrete, {len(x)} rows, {task.queries} test rows, {len(seeds)} seeds; rise of the loss "
        f"when so many helpful rows are removed: {options.remove}"
    )
    table: dict[str, float] = {}
    for name, method in methods.items():
        start = time.perf_counter()
        scores = method()
        seconds = time.perf_counter() - start
        if scores is None:
            continue
        found = counterfactual_removal(
            scores,
            task,
            task.losses,
            options.remove,
            draws=4,
            seeds=seeds,
            folder=folder / name.replace(" ", "-").replace(",", "").lower(),
            key=f"concrete {task.epochs} epochs",
            processes=options.processes,
        )
        if not table:
            print(f"{'random rows':24s}", *(f"{mean}   " for mean in found.mean_random))
        table[name] = found.mean_change[-1].value
        print(f"{name:24s}", *(f"{mean}   " for mean in found.mean_change), f"{seconds:.1f} s",
              flush=True)  # fmt: skip
    if "kronfluence EK-FAC" in table:
        ratio = table["EK-FAC"] / table["kronfluence EK-FAC"]
        print(f"EK-FAC of both, {options.remove[-1]} rows removed: ratio {ratio:.2f}")
    return table


def kronfluence(task: Concrete, model: nn.Module) -> Scores | None:
    """Pairwise scores of kronfluence, in the convention of Scores."""
    if not PEERS.exists():
        print(f"kronfluence is missing: no Python at {PEERS}; set WOODBURY_PEERS_PYTHON")
        return None
    x, y, xt, yt = task.load()
    with tempfile.TemporaryDirectory() as folder:
        vector = nn.utils.parameters_to_vector(model.parameters()).detach()
        given = {"x": x, "y": y, "xt": xt, "yt": yt, "vector": vector}
        save_file({k: v.contiguous() for k, v in given.items()}, Path(folder) / "given.safetensors")
        script = ROOT / "benchmarks/_kronfluence_regression.py"
        run = subprocess.run(
            [str(PEERS), str(script), folder], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            print(f"kronfluence failed: {run.stderr.strip()[-300:]}")
            return None
        # Its scores leave out the minus sign and 1/N.
        values = -load_file(Path(folder) / "scores.safetensors")["scores"].float() / len(x)
    return Scores(values, torch.arange(len(x)), support=-1)


if __name__ == "__main__":
    main()
