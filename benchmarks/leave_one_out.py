"""Leave-one-out predictions against refits: digits, 500 rows, multinomial logistic regression.

Prints the correlation of log-probabilities and the time of one against the other, in one run.
"""

from __future__ import annotations

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from woodbury import Objective, leave_one_out
from woodbury.implicit import newton_cg


def main(rows: int = 500, l2: float = 1e-3, every: int = 4) -> None:
    """Fit once, leave every row out by the formula, then refit without every fourth."""
    torch.set_num_threads(2)
    digits = load_digits()
    x = torch.as_tensor(digits.data)[:rows] / 16
    y = torch.as_tensor(digits.target)[:rows]
    model = nn.Linear(64, 10, bias=False).double()
    objective = Objective(model, "cross_entropy", (x, y), l2=l2)
    objective = objective.with_params(newton_cg(objective, gtol=1e-10))

    start = time.perf_counter()
    result = leave_one_out(objective)
    formula = time.perf_counter() - start

    chosen = torch.arange(0, rows, every)
    exact = torch.empty_like(result.predictions[chosen])
    start = time.perf_counter()
    for position, i in enumerate(chosen.tolist()):
        weights = torch.ones(rows, dtype=torch.float64)
        weights[i] = 0
        theta = newton_cg(objective.with_weights(weights), gtol=1e-8)
        exact[position] = x[i] @ theta.view(10, 64).T
    refits = time.perf_counter() - start

    ours, theirs = result.predictions[chosen].log_softmax(1), exact.log_softmax(1)
    correlation = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1].item()
    own = torch.arange(len(chosen)), y[chosen]
    given = torch.corrcoef(torch.stack([ours[own], theirs[own]]))[0, 1].item()
    print(f"digits, {rows} rows, 640 parameters, l2 = {l2:g}")
    print(f"correlation of log-probabilities, all classes   {correlation:.6f}")
    print(f"correlation of log-probabilities, own label     {given:.6f}")
    refits *= rows / len(chosen)
    print(
        f"leave_one_out {formula:.2f} s; {rows} warm-started refits {refits:.1f} s "
        f"({len(chosen)} of them timed): ratio {refits / formula:.0f}"
    )
    print(f"certificate: {result.certificate()}")


if __name__ == "__main__":
    main()
