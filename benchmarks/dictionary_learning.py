"""Task-driven dictionary learning on breast cancer: does the label help the dictionary?

The experiment of Mairal, Bach and Ponce (2012) as Blondel et al. (2022, section 4.3) run it, on the
breast cancer data of scikit-learn (569 rows, 30 features) in the place of theirs; only the order of
the methods can be compared. The codes of standardised rows are
c = argmin 1/2 |x - c D|^2 + r (|c|_1 + e/2 |c|^2), D with rows of length 1, r = 0.5, e = 0.1, 10
atoms. Four methods: logistic regression with an l1 and with an l2 penalty on the features, with an
l2 penalty on codes of an unsupervised dictionary (which minimises the objective of the codes
itself), and task-driven: from there on, dictionary and classifier minimise the logistic loss on the
codes together, the dictionary by the implicit derivative of the codes. Penalties by five-fold
cross-validation within the training rows; that of the codes is chosen without supervision of the
dictionary and kept.

Printed: area under the ROC curve in percent, mean over folds, with the 95 % interval of the mean,
and of the difference from task-driven, when four fifths of the rows train and when one fifth does:
t distribution, with the correction of Nadeau and Bengio (2003) for training sets that overlap,
which the fifths do not within a repetition.

    python benchmarks/dictionary_learning.py [--repeats 2] [--steps 100] [--figure PATH]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from woodbury import GMRES
from woodbury.implicit import AcceleratedProximalGradient, Implicit, prox_l1

ATOMS, PENALTY, ELASTIC = 10, 0.5, 0.1
FOLDS = 5
RATE = 0.02  # of Adam
METHODS = ("l1 logistic", "l2 logistic", "dictionary, then l2", "task-driven")


def smooth(codes: Tensor, theta: tuple[Tensor, Tensor]) -> Tensor:
    """Of each row of the batch, all but the l1 norm."""
    X, D = theta
    ridge = 0.5 * PENALTY * ELASTIC * (codes**2).sum(-1)
    return 0.5 * ((X - codes @ normalize(D)) ** 2).sum(-1) + ridge


SOLVER = AcceleratedProximalGradient(tol=1e-6, max_steps=2000, batched=True, prox=prox_l1, step=0.5)
encode = SOLVER.differentiable(
    smooth, mode=Implicit(GMRES(rtol=1e-5, restart=60)), argnums=0, throw=False
)
PENALTY_TENSOR = torch.tensor(PENALTY, dtype=torch.float64)


def codes_of(X: Tensor, D: Tensor, start: Tensor | None = None) -> Tensor:
    x0 = X.new_zeros(len(X), len(D)) if start is None else start
    found: Tensor = encode(x0, (X, D), PENALTY_TENSOR)
    return found


def unsupervised(X: Tensor, steps: int) -> Tensor:
    """A dictionary that reconstructs, from the first right singular vectors."""
    D = torch.linalg.svd(X, full_matrices=False)[2][:ATOMS].clone().requires_grad_()
    optimizer = torch.optim.Adam([D], RATE)
    codes = None
    for _ in range(steps):
        with torch.no_grad():
            codes = codes_of(X, D, codes)
        # The codes minimise the same objective: by the envelope theorem they do not matter.
        optimizer.zero_grad()
        smooth(codes, (X, D)).mean().backward()
        optimizer.step()
    return D.detach()


def logistic(penalty: str) -> Any:
    from sklearn.linear_model import LogisticRegressionCV

    return LogisticRegressionCV(
        Cs=np.logspace(-3, 2, 8),
        cv=5,
        solver="liblinear",
        scoring="roc_auc",
        max_iter=5000,
        random_state=0,
        **penalised(penalty),
    )


def penalised(penalty: str) -> dict[str, Any]:
    """The name of the penalty has changed with scikit-learn 1.8."""
    import sklearn

    if tuple(int(part) for part in sklearn.__version__.split(".")[:2]) < (1, 8):
        return {"penalty": penalty}
    return {"l1_ratios": (1.0 if penalty == "l1" else 0.0,), "use_legacy_attributes": False}


def task_driven(
    X: Tensor, y: Tensor, D: Tensor, model: Any, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dictionary, weights and intercept that minimise the logistic loss together."""
    C = float(np.ravel(model.C_)[0])
    weights = torch.from_numpy(model.coef_.ravel().copy())
    intercept = torch.from_numpy(np.asarray(model.intercept_).copy())
    parameters = [t.clone().requires_grad_() for t in (D, weights, intercept)]
    optimizer = torch.optim.Adam(parameters, RATE)
    codes = None
    for _ in range(steps):
        D, weights, intercept = parameters
        codes = codes_of(X, D, None if codes is None else codes.detach())
        loss = binary_cross_entropy_with_logits(codes @ weights + intercept, y)
        optimizer.zero_grad()
        (loss + (weights**2).sum() / (2 * C * len(X))).backward()
        optimizer.step()
    D, weights, intercept = (t.detach() for t in parameters)
    return D, weights, intercept


def fold(
    X: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, steps: int
) -> list[float]:
    """The areas under the curve of the four methods."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import roc_auc_score

    # liblinear's l1 solver, at the weakest penalties of its path.
    warnings.simplefilter("ignore", ConvergenceWarning)
    mean, scale = X[train].mean(0), X[train].std(0)
    A, B = (X[train] - mean) / scale, (X[test] - mean) / scale
    found = [
        roc_auc_score(y[test], logistic(penalty).fit(A, y[train]).decision_function(B))
        for penalty in ("l1", "l2")
    ]
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    D = unsupervised(a, steps)
    model = logistic("l2").fit(codes_of(a, D).numpy(), y[train])
    found.append(roc_auc_score(y[test], model.decision_function(codes_of(b, D).numpy())))
    labels = torch.from_numpy(y[train]).double()
    D, weights, intercept = task_driven(a, labels, D, model, steps)
    found.append(roc_auc_score(y[test], (codes_of(b, D) @ weights + intercept).numpy()))
    return [100 * area for area in found]


def interval(values: np.ndarray, overlap: float) -> float:
    """Half the 95 % interval of the mean over folds.

    ``overlap`` is test over training rows where training sets overlap, and 0 where they do not.
    """
    from scipy.stats import t

    n = len(values)
    spread = values.std(ddof=1) * np.sqrt(1 / n + overlap)
    return float(t.ppf(0.975, n - 1) * spread)


def main() -> None:
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import RepeatedStratifiedKFold

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="of the five folds")
    parser.add_argument("--steps", type=int, default=100, help="of Adam, for each dictionary")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    X, y = load_breast_cancer(return_X_y=True)
    y = 1 - y  # malignant is what is sought
    if options.rows is not None:
        X, y = X[: options.rows], y[: options.rows]
    splits = list(
        RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=options.repeats, random_state=0).split(
            X, y
        )
    )
    tables = {}
    for part, swapped in (("four fifths", False), ("one fifth", True)):
        began = time.perf_counter()
        areas = []
        for large, small in splits:
            train, test = (small, large) if swapped else (large, small)
            areas.append(fold(X, y, train, test, options.steps))
        table = np.asarray(areas)
        tables[part] = table
        overlap = 0.0 if swapped else len(test) / len(train)
        seconds = (time.perf_counter() - began) / len(splits)
        print(f"\n{part} of {len(X)} rows train, {len(splits)} folds, {seconds:.1f} s each")
        print(f"{'':<20} {'AUC':>7} {'+-':>5}   {'minus task-driven':>18} {'+-':>5}")
        for j, name in enumerate(METHODS):
            values, gaps = table[:, j], table[:, j] - table[:, -1]
            row = f"{name:<20} {values.mean():7.2f} {interval(values, overlap):5.2f}"
            if j + 1 < len(METHODS):
                row += f"   {gaps.mean():18.2f} {interval(gaps, overlap):5.2f}"
            print(row)
    if options.figure is not None:
        figure(options.figure, tables)


def figure(path: Path, tables: dict[str, np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures, axes = plt.subplots(1, len(tables), figsize=(5 * len(tables), 3.6))
    for ax, (part, table) in zip(axes, tables.items(), strict=True):
        ax.boxplot(table, orientation="horizontal", tick_labels=METHODS)
        ax.set_title(f"{part} of the rows train")
        ax.set_xlabel("area under the ROC curve, %")
    pictures.tight_layout()
    pictures.savefig(path)


if __name__ == "__main__":
    main()
