"""Follow the largest eigenvalue of the Hessian while a network is trained by gradient descent.

The Hessian has 2,242 rows and is never formed: a few products per check, by Lanczos, give both ends
of its spectrum with error bounds. Gradient descent with step size 0.5 is stable where the largest
eigenvalue is below 2 / 0.5.
"""

from __future__ import annotations

import torch
from torch import nn

from woodbury import Hessian, Objective
from woodbury.decompositions import extreme_eigenvalues

STEP = 0.5


def main() -> None:
    """Train, and print the loss and the ends of the spectrum every 50 steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 2))
    for step in range(201):
        objective = Objective(model, "cross_entropy", (x, y))
        if step % 50 == 0:
            ends = extreme_eigenvalues(Hessian(objective), 20, generator=generator)
            print(
                f"step {step:3d}: loss {objective.value():.4f}, eigenvalues from "
                f"{ends.smallest:+.3f} to {ends.largest:.3f} (+- {ends.largest_error:.0e}), "
                f"{ends.products} products; stable below {2 / STEP:g}"
            )
        descent = objective.space.unflatten(objective.params_vector() - STEP * objective.gradient())
        model.load_state_dict(descent)


if __name__ == "__main__":
    main()
