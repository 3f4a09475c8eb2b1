"""Wrong labels by self-influence and by leave-one-out, beside the rivals and cleanlab.

Digits (1,797 rows) and the first 5,000 rows of MNIST, 10 % of the labels flipped, a linear model
and a network with 64 hidden units. Each method gives every row a suspicion; prints average
precision with a 95 % interval over rows, area under the ROC curve, and seconds (without the fit of
the model, but with the further fits and the solves that a method needs). cleanlab 2.9.0 gets the
probabilities of five folds of the same model with the same settings, and runs in the environment
named by ``WOODBURY_PEERS_PYTHON``. Of a network, leave-one-out and the exact inverse are those of
the last layer; it is also left out of five fits from other starts, which is as many as five folds.

    python benchmarks/mislabeled.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _attribution import PEERS, mnist
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from woodbury import EKFAC, Cholesky, Influence, Objective, leave_one_out
from woodbury.apps.clean import engine
from woodbury.influence import rivals
from woodbury.influence.evaluation import flip_labels, label_margin, mislabel_detection

CLEANLAB = """
import sys
from cleanlab.rank import get_label_quality_scores
from safetensors.numpy import load_file, save_file
given = load_file(sys.argv[1])
found = {
    method: get_label_quality_scores(given["labels"], given["probabilities"], method=method)
    for method in ("self_confidence", "normalized_margin")
}
save_file(found, sys.argv[2])
"""


def fitted(x: Tensor, y: Tensor, hidden: int, l2: float, steps: int, seed: int = 0) -> nn.Module:
    """The model at (about) the minimum of the penalised loss, by L-BFGS."""
    torch.manual_seed(seed)
    if hidden:
        model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 10))
    else:
        model = nn.Sequential(nn.Linear(x.shape[1], 10))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = nn.functional.cross_entropy(model(x), y)
        total = fit + 0.5 * l2 * sum(p.square().sum() for p in model.parameters())
        total.backward()
        return total

    optimizer.step(loss)
    return model.eval()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few rows of digits, no peer")
    options = parser.parse_args(arguments)
    digits = load_digits()
    data = {"digits": (torch.as_tensor(digits.data).float() / 16, torch.as_tensor(digits.target))}
    if options.small:
        data = {"digits": tuple(part[:150] for part in data["digits"])}
    else:
        x, y, _, _ = mnist(5000, 1)
        data["MNIST 5,000"] = x, y
    table: dict[str, float] = {}
    for name, (x, y) in data.items():
        noisy, wrong = flip_labels(y, 0.1, classes=10)
        for hidden in (0, 64):
            kind = "network" if hidden else "linear"
            l2, steps = (1e-3, 40) if hidden else (1e-2, 60)
            model = fitted(x, noisy, hidden, l2, steps)
            print(f"{name}, {kind}, l2 = {l2:g}, 10 % of {len(y)} labels wrong")
            for method, (suspicion, seconds) in suspicions(
                x, noisy, model, hidden, l2, steps, small=options.small
            ).items():
                found = mislabel_detection(suspicion, wrong, resamples=300)
                table[f"{name} {kind} {method}"] = found.average_precision.value
                print(
                    f"  {method:34s} AP {found.average_precision}   AUROC {found.auroc.value:.3f}"
                    f"   {seconds:6.1f} s",
                    flush=True,
                )
    return table


def suspicions(
    x: Tensor, y: Tensor, model: nn.Module, hidden: int, l2: float, steps: int, *, small: bool
) -> dict[str, tuple[Tensor, float]]:
    objective = Objective(model, "cross_entropy", (x, y), l2=l2)
    top = last_layer(objective, model, x, y, l2)
    make = torch.Generator().manual_seed
    found: dict[str, tuple[Tensor, float]] = {}

    def add(names: str | tuple[str, ...], function) -> None:
        """One suspicion, or several of one computation."""
        start = time.perf_counter()
        values = function()
        seconds = time.perf_counter() - start
        if isinstance(names, str):
            names, values = (names,), (values,)
        found.update({n: (v, seconds) for n, v in zip(names, values, strict=True) if v is not None})

    def left_out() -> tuple[Tensor, Tensor]:
        result = leave_one_out(top, Cholesky())
        return result.losses, label_margin(result.predictions, y)

    def of_five() -> Tensor:
        logits = []
        for seed in range(5):
            with torch.enable_grad():
                other = fitted(x, y, hidden, l2, steps, seed)
            last = last_layer(Objective(other, "cross_entropy", (x, y), l2=l2), other, x, y, l2)
            logits.append(leave_one_out(last, Cholesky()).predictions)
        return label_margin(torch.stack(logits), y)

    ekfac = {"matrix": lambda o: EKFAC(o, "sampled", generator=make(0)), "damping": 0.0}
    add("self-influence, EK-FAC", lambda: -Influence(objective, **ekfac).self_influence().values)
    # Of a network the curvature of the last layer, which is formed: features are as they are.
    where = "" if not hidden else " (last layer)"
    add(
        f"self-influence, exact{where}",
        lambda: -Influence(top, recipe=Cholesky(), damping=0.0).self_influence().values,
    )
    add((f"leave-one-out loss{where}", f"leave-one-out margin{where}"), left_out)
    if hidden and not small:
        add("leave-one-out margin, five fits", of_five)
    add("loss", objective.per_example_losses)
    add("margin of the fit", lambda: label_margin(model(x), y))
    add("self products of gradients", lambda: square_norms(objective))
    if not small:
        add("TRAK's doubt 1 - p", lambda: 1 - torch.exp(-objective.per_example_losses()))
        add("representer points, own", lambda: representer_own(top))
        names = ("cleanlab, self-confidence, 5 folds", "cleanlab, margin, 5 folds")
        add(names, lambda: cleanlab(x, y, hidden, l2, steps))
        for kind in ("linear", "auto"):
            add(f"woodbury clean, {kind}", lambda kind=kind: clean(x, y, kind))
    return found


def last_layer(objective: Objective, model: nn.Module, x: Tensor, y: Tensor, l2: float):
    """The objective of the parameters of the last layer."""
    last = list(objective.space.sizes)[-2:]
    return Objective(model, "cross_entropy", (x, y), params=last, l2=l2)


def clean(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """The probabilities of an error of ``woodbury clean``, which fits models of its own."""
    found = engine.run(
        x.numpy(), y.numpy(), task="classification", n_classes=10, model=kind, seed=0
    )
    return torch.as_tensor(found.error_probability)


def square_norms(objective: Objective) -> Tensor:
    """Grad-Dot, and TracIn with one checkpoint, of a row with itself."""
    pieces = [(i, g.square().sum(1)) for i, g in objective.per_example_gradients()]
    return objective.in_order(pieces)


def representer_own(top: Objective) -> Tensor:
    """What a row contributes to its own loss: -RPS of a row with itself."""
    return -rivals.representer_points(top, fit=False).values.diagonal()


def cleanlab(
    x: Tensor, y: Tensor, hidden: int, l2: float, steps: int
) -> tuple[Tensor | None, Tensor | None]:
    """One minus cleanlab's two label qualities from five folds of the same model."""
    if not PEERS.exists():
        print(f"  cleanlab is missing: no Python at {PEERS}; set WOODBURY_PEERS_PYTHON")
        return None, None
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    probabilities = torch.zeros(len(x), 10)
    for fold in order.chunk(5):
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[fold] = False
        with torch.enable_grad():
            model = fitted(x[kept], y[kept], hidden, l2, steps)
        with torch.no_grad():
            probabilities[fold] = model(x[fold]).softmax(1)
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "given", Path(folder) / "answer"
        save_file({"labels": y, "probabilities": probabilities}, given)
        run = subprocess.run(
            [str(PEERS), "-c", CLEANLAB, str(given), str(answer)],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            print(f"  cleanlab failed: {run.stderr.strip()[-300:]}", file=sys.stderr)
            return None, None
        quality = load_file(answer)
        return 1 - quality["self_confidence"], 1 - quality["normalized_margin"]


if __name__ == "__main__":
    main()
