"""Learn one weight per training row by hypergradients, so that wrong labels stop mattering.

A fifth of the training labels are flipped. Every row has a weight in the training loss, and the
weights are moved downhill on the loss of a few trusted rows: one hypergradient of all weights costs
one linear solve. What is left of the weight of the flipped rows is printed beside the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as logistic

from woodbury import CG, Objective, hypergradient
from woodbury.implicit import newton_cg

ROWS, TRUSTED, COLUMNS, STEPS = 400, 40, 10, 30


def main() -> None:
    """Make the data, learn the weights, print what became of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(COLUMNS, dtype=torch.float64, generator=generator)
    x = torch.randn(ROWS + TRUSTED, COLUMNS, dtype=torch.float64, generator=generator)
    y = (x @ truth > 0).double()
    flipped = torch.rand(ROWS, generator=generator) < 0.2
    y[:ROWS][flipped] = 1 - y[:ROWS][flipped]

    def inner(w: Tensor, logits: Tensor) -> Tensor:
        losses = logistic(x[:ROWS] @ w, y[:ROWS], reduction="none")
        return (logits.sigmoid() * losses).mean() + 1e-2 * w.square().sum()

    def outer(w: Tensor, logits: Tensor) -> Tensor:
        return logistic(x[ROWS:] @ w, y[ROWS:])

    logits = torch.zeros(ROWS, dtype=torch.float64)
    w = torch.zeros(COLUMNS, dtype=torch.float64)
    for step in range(STEPS):

        def loss(params: dict[str, Tensor], _: object, logits: Tensor = logits) -> Tensor:
            return inner(params["w"], logits)

        w = newton_cg(Objective.functional(loss, {"w": w}, [x]))
        result = hypergradient(inner, outer, w, logits, CG(rtol=1e-8))
        logits = logits - 200.0 * result.value
        if step % 10 == 0 or step == STEPS - 1:
            weight = logits.sigmoid()
            print(
                f"step {step:2d}: trusted loss {result.outer_value:.4f}, mean weight of flipped "
                f"{weight[flipped].mean():.2f}, of the others {weight[~flipped].mean():.2f}"
            )
    print("certificate of the last hypergradient:", result.certificate())


if __name__ == "__main__":
    main()
