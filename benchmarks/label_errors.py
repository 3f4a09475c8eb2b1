"""Label errors found by ``woodbury clean`` beside cleanlab, on the same rows with the same flips.

Prints, for digits and the first 5,000 rows of MNIST: average precision (AP) and expected
calibration error (ECE) of the error probabilities and seconds, all with nothing given but the rows;
then cleanlab's AP and seconds with cross-validation of the same model (5 folds), whose settings it
is given. Seconds are the least over seeds. The peer runs in an environment of its own, named by
``WOODBURY_PEERS_PYTHON`` (default ``.venv-peers/bin/python``); without it its columns stay empty.

    python benchmarks/label_errors.py --seeds 5 --models auto linear
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from woodbury.apps.clean import engine
from woodbury.apps.clean.metrics import calibration

ROOT = Path(__file__).resolve().parent.parent
CONFUSED = {4: 9, 9: 4, 3: 5, 7: 1}

# The peer's recipe: self-confidence of probabilities from five folds of the same model, from
# scikit-learn. Logistic regression is given the best of three penalties (the first is the default),
# kernel ridge the length scale, penalty and temperature that woodbury found; neither search is
# counted in the peer's time.
PEER = """
import json, sys, time
import numpy as np
from cleanlab.rank import get_label_quality_scores
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

class Kernel(ClassifierMixin, BaseEstimator):
    def __init__(self, gamma=1.0, alpha=1.0, scale=1.0):
        self.gamma, self.alpha, self.scale = gamma, alpha, scale
    def fit(self, X, y):
        self.classes_ = np.unique(y)
        hot = (y[:, None] == self.classes_) - 1 / len(self.classes_)
        self.ridge_ = KernelRidge(alpha=self.alpha, kernel="rbf", gamma=self.gamma).fit(X, hot)
        return self
    def predict_proba(self, X):
        z = self.scale * self.ridge_.predict(X)
        p = np.exp(z - z.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)
    def predict(self, X):
        return self.classes_[self.predict_proba(X).argmax(1)]

data = np.load(sys.argv[1])
X, y, settings = data["X"], data["y"], json.loads(sys.argv[2])
if settings:
    tried = [("tuned", Kernel(**settings))]
else:
    tried = [(f"C={C:g}", LogisticRegression(C=C, max_iter=1000)) for C in (1.0, 0.1, 0.01)]
for name, estimator in tried:
    start = time.perf_counter()
    P = cross_val_predict(estimator, X, y, cv=5, method="predict_proba")
    score = get_label_quality_scores(y, P, method="self_confidence")
    seconds = time.perf_counter() - start
    print(json.dumps({"name": name, "seconds": seconds, "score": score.tolist()}))
"""


def flipped(y: np.ndarray, kind: str, seed: int, classes: int = 10) -> np.ndarray:
    """Labels of which some are wrong: ``uniform20``, ``uniform40``, ``pair25`` or ``class25``."""
    random = np.random.default_rng(seed)
    given = y.copy()
    if kind.startswith("uniform"):
        wrong = random.random(len(y)) < int(kind[-2:]) / 100
        given[wrong] = (y[wrong] + random.integers(1, classes, wrong.sum())) % classes
    elif kind == "pair25":
        wrong = random.random(len(y)) < 0.25
        given[wrong] = (y[wrong] + 1) % classes
    elif kind == "class25":
        wrong = (random.random(len(y)) < 0.25) & np.isin(y, list(CONFUSED))
        given[wrong] = [CONFUSED[label] for label in y[wrong]]
    else:
        raise SystemExit(f"unknown kind of flips {kind!r}")
    return given


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows scaled to [0, 1], and true labels."""
    if name == "digits":
        digits = load_digits()
        return digits.data.astype(np.float32) / 16, digits.target.astype(int)
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data"))
    if not (folder / "mnist.npz").is_file():
        raise SystemExit(f"no mnist.npz in {folder}; set WOODBURY_DATA to the data folder")
    mnist = np.load(folder / "mnist.npz")
    rows = mnist["x_train"][:5000].reshape(5000, -1)
    return rows.astype(np.float32) / 255, mnist["y_train"][:5000].astype(int)


def settings_of(X: np.ndarray, certificate: dict) -> dict:
    """Of the kernel model in the unit of ``X``, for the peer; empty for a linear model."""
    if certificate["model"] != "kernel":
        return {}
    variance = X.astype(float).var(axis=0).sum()  # which the engine scales to 1
    return {
        "gamma": 0.5 / (certificate["lengthscale"] ** 2 * variance),
        "alpha": certificate["penalty"],
        "scale": certificate["noise"]["logit_scale"],
    }


def peer(X: np.ndarray, given: np.ndarray, settings: dict) -> list[dict]:
    """Cleanlab's scores for each of its settings; empty where it is not installed."""
    python = Path(os.environ.get("WOODBURY_PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))
    if not python.exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", X=X, y=given)
        done = subprocess.run(
            [str(python), "-W", "ignore", "-c", PEER, f"{folder}/data.npz", json.dumps(settings)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        print("  the peer failed:", done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return []
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["digits", "mnist5k"])
    parser.add_argument(
        "--kinds", nargs="+", default=["uniform20", "pair25", "class25", "uniform40"]
    )
    parser.add_argument("--models", nargs="+", default=["auto", "linear"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peer-seeds", type=int, default=1, help="seeds that the peer is run on")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # the peer's, in its own process
    print(
        f"mean of {chosen.seeds} seeds ({chosen.peer_seeds} for the peer), {chosen.threads} threads"
    )
    print("data     flips      model    AP    ECE    least s | cleanlab: model, AP, least s, ratio")
    for name in chosen.data:
        X, truth = table(name)
        for kind in chosen.kinds:
            for model in chosen.models:
                print(
                    line(name, kind, model, X, truth, chosen.seeds, chosen.peer_seeds), flush=True
                )


def line(
    name: str, kind: str, model: str, X: np.ndarray, truth: np.ndarray, seeds: int, peer_seeds: int
) -> str:
    """One line of the table: ours, and the peer's settings on the same flips."""
    ours, theirs = [], {}
    for seed in range(seeds):
        given = flipped(truth, kind, seed)
        wrong = given != truth
        start = time.perf_counter()
        found = engine.run(X, given, task="classification", n_classes=10, model=model, seed=seed)
        seconds = time.perf_counter() - start
        error = found.error_probability
        ours.append([average_precision_score(wrong, error), calibration(error, wrong)[0], seconds])
        if seed < peer_seeds:
            for entry in peer(X, given, settings_of(X, found.certificate)):
                value = average_precision_score(wrong, -np.array(entry["score"]))
                theirs.setdefault(entry["name"], []).append([value, entry["seconds"]])
    precision, ece, seconds = np.mean(ours, axis=0)
    seconds = min(row[2] for row in ours)
    text = f"{name:8} {kind:10} {model:7} {precision:.4f} {ece:.4f} {seconds:6.1f} |"
    if not theirs:
        return text + " no peer"
    for which, rows in theirs.items():
        value, slow = np.mean(rows, axis=0)[0], min(row[1] for row in rows)
        text += f" {which} {value:.4f} {slow:5.1f} s ({slow / seconds:.1f}x)"
    return text


if __name__ == "__main__":
    main()
