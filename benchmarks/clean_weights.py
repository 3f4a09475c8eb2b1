"""Wrong labels found by learned weights of examples and learned labels, beside ``woodbury clean``.

The first 5,000 rows of MNIST with 20 and 30 % uniform flips, a linear model, and 500 further rows
whose labels are trusted. The weights (``ExampleWeights``) or the labels (``LabelCorrection``) are
moved by hypergradients of the loss on the trusted rows while the model trains. A row is suspected
by how small its weight is, or how improbable the label given. Beside them: how improbable a
logistic regression of the trusted rows alone finds the label given, and the error probabilities of
``woodbury clean``, which is given no trusted row. Area under the ROC curve (AUROC), average
precision (AP), accuracy on 10,000 test images of the model in the end, seconds; means over seeds.

    python benchmarks/clean_weights.py [--seeds 3] [--epochs 60] [--small]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from woodbury.apps.clean import engine
from woodbury.bilevel import ExampleWeights, HyperLearner, Indexed, LabelCorrection

ROOT = Path(__file__).resolve().parents[1]
RATE, BATCH = 0.5, 500
Rows = tuple[Tensor, Tensor]


def rows(small: bool) -> tuple[Rows, Rows, Rows]:
    """Training, trusted and test rows with their true labels."""
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data"))
    if not small and (folder / "mnist.npz").is_file():
        found = np.load(folder / "mnist.npz")
        x, y = found["x_train"][:5500].reshape(5500, -1), found["y_train"][:5500]
        v, z = found["x_test"].reshape(10000, -1), found["y_test"]
        cuts, scale = (5000, 5500), 255
    else:
        from sklearn.datasets import load_digits

        if not small:
            print("the digits of scikit-learn in place of MNIST: set WOODBURY_DATA")
        digits = load_digits()
        x, v, y, z = digits.data[:1100], digits.data[1100:], digits.target[:1100], None
        z, cuts, scale = digits.target[1100:], (1000, 1100), 16
    inputs, labels = torch.from_numpy(x).float() / scale, torch.from_numpy(y).long()
    first, last = cuts
    return (
        (inputs[:first], labels[:first]),
        (inputs[first:last], labels[first:last]),
        (torch.from_numpy(v).float() / scale, torch.from_numpy(z).long()),
    )


def flipped(y: Tensor, share: float, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    wrong = torch.from_numpy(random.random(len(y)) < share)
    shift = torch.from_numpy(random.integers(1, 10, len(y)))
    return torch.where(wrong, (y + shift) % 10, y)


def trained(
    x: Tensor, given: Tensor, trusted: Rows | None, hyper: Any, rate: float, epochs: int, seed: int
) -> nn.Module:
    """A linear model; with ``hyper`` learned on the trusted rows where there is one."""
    torch.manual_seed(seed)
    model = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        Indexed(TensorDataset(x, given)), batch_size=BATCH, shuffle=True, generator=generator
    )
    learner = None
    if hyper is not None:
        learner = HyperLearner(
            model,
            "cross_entropy",
            hyper,
            optimizer=optimizer,
            hyper_optimizer=partial(torch.optim.Adam, lr=rate),
            on_failure="ignore",  # where the series diverges at this rate, the sum before counts
        )
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            if learner is None:
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            else:
                loss = learner.loss(batch)
            loss.backward()
            optimizer.step()
            if learner is not None:
                learner.step(trusted)
    return model


def probability_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).softmax(1).gather(1, labels[:, None]).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="digits, 20 epochs, one seed, 20 %")
    options = parser.parse_args()
    epochs, seeds = (20, 1) if options.small else (options.epochs, options.seeds)
    (x, y), trusted, (v, z) = rows(options.small)
    print(f"{len(x)} rows, {len(trusted[0])} trusted, {epochs} epochs, means of {seeds} seeds")
    print(f"{'flips':6} {'method':28} {'AUROC':>7} {'AP':>7} {'test accuracy':>14} {'seconds':>8}")
    for share in (0.2,) if options.small else (0.2, 0.3):
        found: dict[str, list[list[float]]] = {}
        for seed in range(seeds):
            given = flipped(y, share, seed)
            wrong = (given != y).numpy()

            def note(
                name: str,
                job: Callable[[], tuple[Any, nn.Module | None]],
                wrong: Any = wrong,
                found: dict[str, list[list[float]]] = found,
            ) -> None:
                start = time.perf_counter()
                suspicion, model = job()
                seconds = time.perf_counter() - start
                accuracy = np.nan
                if model is not None:
                    with torch.no_grad():
                        accuracy = (model(v).argmax(1) == z).float().mean().item()
                scores = [np.nan, np.nan]
                if suspicion is not None:
                    suspicion = np.asarray(suspicion)
                    scores = [
                        roc_auc_score(wrong, suspicion),
                        average_precision_score(wrong, suspicion),
                    ]
                found.setdefault(name, []).append([*scores, accuracy, seconds])

            def weights(given: Tensor = given, seed: int = seed) -> tuple[Any, nn.Module]:
                hyper = ExampleWeights(len(x))
                model = trained(x, given, trusted, hyper, 0.1, epochs, seed)
                return -hyper.weights(), model

            def labels(given: Tensor = given, seed: int = seed) -> tuple[Any, nn.Module]:
                hyper = LabelCorrection(given, 10)
                model = trained(x, given, trusted, hyper, 0.1, epochs, seed)
                return 1 - hyper.probabilities().gather(1, given[:, None]).squeeze(1), model

            def alone(given: Tensor = given, seed: int = seed) -> tuple[Any, nn.Module]:
                model = trained(*trusted, None, None, 0.0, 4 * epochs, seed)
                return 1 - probability_of(model, x, given), model

            def nothing(given: Tensor = given, seed: int = seed) -> tuple[Any, nn.Module]:
                model = trained(x, given, None, None, 0.0, epochs, seed)
                return 1 - probability_of(model, x, given), model

            def clean(
                kind: str, given: Tensor = given, seed: int = seed
            ) -> tuple[Any, nn.Module | None]:
                result = engine.run(
                    x.numpy(),
                    given.numpy(),
                    task="classification",
                    n_classes=10,
                    model=kind,
                    seed=seed,
                )
                return result.error_probability, None

            note("weights of examples", weights)
            note("learned labels", labels)
            note("model of the trusted rows", alone)
            note("model of all rows", nothing)
            note("woodbury clean, linear", partial(clean, "linear"))
            note("woodbury clean, auto", partial(clean, "auto"))
        for name, values in found.items():
            area, precision, accuracy, seconds = np.mean(values, axis=0)
            shown = " " * 14 if np.isnan(accuracy) else f"{accuracy:14.3f}"
            print(
                f"{share:6.0%} {name:28} {area:7.4f} {precision:7.4f} {shown} {seconds:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
