"""One penalty per feature by hypergradients, beside scikit-learn's cross-validated estimators.

For each data set: mean over --seeds random splits of the score on rows that neither saw (R^2; for
classes the accuracy and the mean of -log p), with the features as they are and with --noise columns
of Gaussian noise added, and the seconds of one fit. TunedRidge stands beside RidgeCV (both exact
leave-one-out), TunedLogisticRegression beside LogisticRegressionCV, TunedElasticNet beside
ElasticNetCV (five folds, both l1_ratio 0.5). Features are standardised for the peer, which gets a
grid of penalties as wide as ours. Data: uci of the data folder (WOODBURY_DATA, by default
../shared/data beside the repository) and what scikit-learn bundles.

    python benchmarks/tuned_penalties.py [--seeds 5] [--rows 300] [--noise 50] [--small]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV, RidgeCV
from sklearn.metrics import accuracy_score, log_loss, r2_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from woodbury.bilevel import TunedElasticNet, TunedLogisticRegression, TunedRidge

UCI = ("bostonHousing", "concrete", "energy", "wine-quality-red", "yacht")
BUNDLED = {
    "breast cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "iris": datasets.load_iris,
}


def regression(folder: Path, names: Any) -> dict[str, tuple[Any, Any]]:
    found = {"diabetes": datasets.load_diabetes(return_X_y=True)}
    for name in names:
        path = folder / f"{name}.txt"
        if not path.exists():
            print(f"no {path}; set WOODBURY_DATA")
            continue
        table = np.loadtxt(path)
        columns = 8 if name == "energy" else -1  # energy has two targets, the first is taken
        found[name] = table[:, :columns], table[:, columns]
    return found


def ours_and_peer(kind: str, rows: int, seed: int) -> tuple[Any, Any]:
    """Both estimators; grids and folds alike."""
    if kind == "ridge":
        grid = rows * np.logspace(-6, 3, 19)
        return TunedRidge(), make_pipeline(StandardScaler(), RidgeCV(grid))
    if kind == "elastic net":
        folds = KFold(5, shuffle=True, random_state=seed)
        peer = ElasticNetCV(l1_ratio=0.5, cv=folds, alphas=100, max_iter=100_000)
        return TunedElasticNet(cv=folds), make_pipeline(StandardScaler(), peer)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    peer = LogisticRegressionCV(
        Cs=1 / (rows * np.logspace(-6, 3, 19)),
        cv=folds,
        scoring="neg_log_loss",
        max_iter=1000,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )
    return TunedLogisticRegression(cv=folds), make_pipeline(StandardScaler(), peer)


def compare(kind: str, X: Any, y: Any, rows: int, noise: int, seeds: int) -> np.ndarray:
    """Seeds by (ours, peer) by (R^2 or accuracy, -log p, seconds)."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        wide = np.hstack([X, rng.normal(size=(len(X), noise))])
        order = rng.permutation(len(X))
        count = min(rows, 2 * len(X) // 3)
        train, test = order[:count], order[count:]
        line = []
        for model in ours_and_peer(kind, count, seed):
            start = time.perf_counter()
            model.fit(wide[train], y[train])
            seconds = time.perf_counter() - start
            loss = np.nan
            if kind == "logistic":
                loss = log_loss(y[test], model.predict_proba(wide[test]), labels=model.classes_)
            predicted = model.predict(wide[test])
            score = accuracy_score if kind == "logistic" else r2_score
            line.append((score(y[test], predicted), loss, seconds))
        found.append(line)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=300, help="training rows, at most")
    parser.add_argument("--noise", type=int, default=50, help="irrelevant columns added")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=["ridge", "elastic net", "logistic"])
    parser.add_argument("--small", action="store_true", help="one seed, one data set of each kind")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("WOODBURY_DATA", root / "../shared/data")) / "uci"
    names, seeds = (UCI, options.seeds) if not options.small else ((), 1)
    classes = BUNDLED if not options.small else {"wine": BUNDLED["wine"]}
    print(
        f"{'':11} {'data':<17} {'noise':>5}   {'ours':>7} {'peer':>7}   wins   "
        f"{'-log p':>7} {'peer':>7}   {'seconds':>8} {'peer':>7} {'ratio':>6}"
    )
    for kind in options.kinds:
        data = regression(folder, names)
        if kind == "logistic":
            data = {name: load(return_X_y=True) for name, load in classes.items()}
        for noise in (0, options.noise):
            for name, (X, y) in data.items():
                found = compare(kind, X, y, options.rows, noise, seeds)
                mean = found.mean(0)
                judged = found[..., 0] if kind != "logistic" else -found[..., 1]
                wins = int((judged[:, 0] > judged[:, 1]).sum())
                losses = "  ".join(f"{value:6.4f}" for value in mean[:, 1])
                print(
                    f"{kind:<11} {name:<17} {noise:5d}   {mean[0, 0]:7.4f} {mean[1, 0]:7.4f}   "
                    f"{wins}/{seeds}    {losses if kind == 'logistic' else '':>15}   "
                    f"{mean[0, 2]:8.3f} {mean[1, 2]:7.3f} {mean[0, 2] / mean[1, 2]:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
