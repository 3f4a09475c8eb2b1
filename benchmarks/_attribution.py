"""What the benchmarks of influence share: rows of MNIST, its two models, training them again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("WOODBURY_PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))


def data_folder() -> Path:
    """The folder of public data sets; ends the program, saying so, where there is none."""
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        raise SystemExit(f"no data folder at {folder}: set WOODBURY_DATA to one with mnist.npz")
    return folder


def mnist(train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first rows of MNIST, flat, with mean 0.1307 and deviation 0.3081 taken out."""
    file = np.load(data_folder() / "mnist.npz")
    x = [
        torch.from_numpy(file[name][:n].copy())
        for name, n in [("x_train", train), ("x_test", test)]
    ]
    y = [
        torch.from_numpy(file[name][:n].copy())
        for name, n in [("y_train", train), ("y_test", test)]
    ]
    x = [(part.reshape(len(part), -1).float() / 255 - 0.1307) / 0.3081 for part in x]
    return x[0], y[0].long(), x[1], y[1].long()


@dataclass
class Setting:
    """A model and how it is trained: those of dattri 0.3.0's benchmark on MNIST."""

    name: str
    train: int = 5000
    test: int = 500
    epochs: int | None = None
    inputs: int = 784
    skip: int = 0  # test rows that are left out
    data: tuple[Tensor, Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.name not in ("lr", "mlp"):
            raise SystemExit(f"the model is {self.name!r}; use lr or mlp")
        if self.epochs is None:
            self.epochs = 20 if self.name == "lr" else 50

    @property
    def batch(self) -> int:
        return 32 if self.name == "lr" else 64

    @property
    def momentum(self) -> float:
        return 0.0 if self.name == "lr" else 0.9

    @property
    def rate(self) -> float:
        return 0.01

    @property
    def damping(self) -> float:
        """One over the length of training (learning rate times steps, over 1 - momentum).

        Gradient descent of that length shrinks every direction about as this penalty does: a choice
        that is made by the training alone, before any score is seen.
        """
        steps = self.epochs * -(-self.train // self.batch)
        return (1 - self.momentum) / (self.rate * steps)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training and test rows."""
        if self.data is None:
            x, y, *asked = mnist(self.train, self.test)
            self.data = (x, y, asked[0][self.skip :], asked[1][self.skip :])
        return self.data

    def model(self) -> nn.Module:
        """The model before training."""
        if self.name == "lr":
            return nn.Sequential(nn.Linear(self.inputs, 10))
        return nn.Sequential(
            nn.Linear(self.inputs, 128),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 10),
        )

    def __call__(self, rows: Tensor, seed: int) -> nn.Module:
        """Train on some rows, every batch drawn anew in each epoch."""
        x, y, _, _ = self.rows()
        x, y = x[rows], y[rows]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            model = self.model().train()
            optimizer = torch.optim.SGD(
                model.parameters(), lr=self.rate, momentum=self.momentum, foreach=True
            )
            for _ in range(self.epochs):
                for index in torch.randperm(len(x)).split(self.batch):
                    optimizer.zero_grad(set_to_none=True)
                    nn.functional.cross_entropy(model(x[index]), y[index]).backward()
                    optimizer.step()
        return model.eval()

    def losses(self, model: nn.Module) -> Tensor:
        """Losses of the test rows."""
        _, _, x, y = self.rows()
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    def parameters(self, model: nn.Module) -> Tensor:
        """The parameters laid end to end, so that a folder of results keeps models."""
        return nn.utils.parameters_to_vector(model.parameters())

    def restored(self, vector: Tensor) -> nn.Module:
        """The model with parameters that :meth:`parameters` gave."""
        model = self.model().eval()
        nn.utils.vector_to_parameters(vector.float(), model.parameters())
        return model.requires_grad_()

    @property
    def key(self) -> str:
        """What the results depend on beside rows and seeds."""
        return (
            f"mnist {self.train}+{self.test} {self.name} {self.epochs} epochs, batch {self.batch}, "
            f"rate {self.rate}, momentum {self.momentum}"
        )
