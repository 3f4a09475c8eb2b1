"""A small convex training problem, written twice: with the learner's objects, and by hand.

Three classes, three features, two terms of the loss (cross-entropy and a square of the logits,
which makes it strictly convex). By hand everything is one function of flat tensors in float64, its
derivatives dense and from ``torch.func``, its solution by Newton's method with LAPACK.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from woodbury.bilevel import (
    Augmentation,
    ExampleWeights,
    Hyper,
    LabelCorrection,
    LossWeights,
    WeightDecay,
)

ROWS, VALID, SIZE = 12, 9, 3
CRITERION = {"ce": "cross_entropy", "square": lambda logits, target: (logits**2).mean(1)}
KINDS = ("decay", "weights", "softmax", "labels", "augment", "terms")


class Convex:
    """The data, the model at a point, and the hyperparameters of some kinds at random values."""

    def __init__(self, kinds: tuple[str, ...], per: str = "weight") -> None:
        gen = torch.Generator().manual_seed(3)
        self.randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
        self.x, self.v = self.randn(ROWS, SIZE), self.randn(VALID, SIZE)
        self.y = torch.randint(0, SIZE, (ROWS,), generator=gen)
        self.z = torch.randint(0, SIZE, (VALID,), generator=gen)
        self.model = nn.Linear(SIZE, SIZE).double()
        self.train = (self.x, self.y, torch.arange(ROWS))
        self.valid = (self.v, self.z)
        self.hypers = {kind: self.make(kind, per) for kind in kinds}
        self.per = per
        for hyper in self.hypers.values():
            hyper.double()
            for p in hyper.parameters():
                p.data += 0.3 * self.randn(*p.shape)
        self.set(self.solve(self.values()))

    def make(self, kind: str, per: str) -> Hyper:
        return {
            "decay": lambda: WeightDecay(self.model, 0.1, per=per),
            "weights": lambda: ExampleWeights(ROWS),
            "softmax": lambda: ExampleWeights(ROWS, "softmax"),
            "labels": lambda: LabelCorrection(self.y, SIZE),
            "augment": lambda: Augmentation(nn.Linear(SIZE, SIZE)),
            "terms": lambda: LossWeights({"ce": 1.0, "square": 0.5}),
        }[kind]()

    # ------------------------------------------------------------------ by hand

    def values(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": p.detach().clone()
            for kind, hyper in self.hypers.items()
            for name, p in hyper.named_parameters()
        }

    def point(self) -> Tensor:
        return torch.cat([self.model.weight.flatten(), self.model.bias]).detach().clone()

    def set(self, flat: Tensor) -> None:
        with torch.no_grad():
            self.model.weight.copy_(flat[: SIZE * SIZE].view(SIZE, SIZE))
            self.model.bias.copy_(flat[SIZE * SIZE :])

    def inner(self, flat: Tensor, h: dict[str, Tensor]) -> Tensor:
        x = self.x
        if "augment.network.weight" in h:
            x = x @ h["augment.network.weight"].T + h["augment.network.bias"]
        logits = x @ flat[: SIZE * SIZE].view(SIZE, SIZE).T + flat[SIZE * SIZE :]
        soft = nn.functional.one_hot(self.y, SIZE).double()
        if "labels.logits" in h:
            soft = h["labels.logits"].exp() / h["labels.logits"].exp().sum(1, keepdim=True)
        ce = logits.exp().sum(1).log() - (soft * logits).sum(1)
        square = logits.square().sum(1) / SIZE
        scale = h.get("terms.log_weights", torch.zeros(2).double()).exp()
        losses = scale[0] * ce + scale[1] * square
        if "weights.logits" in h:
            losses = losses / (1 + (-h["weights.logits"]).exp())
        if "softmax.logits" in h:
            e = h["softmax.logits"].exp()
            losses = losses * ROWS * e / e.sum()
        total = losses.sum() / ROWS
        if "decay.log_decay" in h:
            decay = h["decay.log_decay"].exp()
            if self.per == "tensor":
                decay = torch.cat([decay[:1].expand(SIZE * SIZE), decay[1:].expand(SIZE)])
            total = total + 0.5 * (decay * flat**2).sum()
        return total

    def outer(self, flat: Tensor) -> Tensor:
        logits = self.v @ flat[: SIZE * SIZE].view(SIZE, SIZE).T + flat[SIZE * SIZE :]
        return (logits.exp().sum(1).log() - logits[torch.arange(VALID), self.z]).mean()

    def solve(self, h: dict[str, Tensor]) -> Tensor:
        """Damped Newton with LAPACK, to rounding."""
        w = torch.zeros(SIZE * SIZE + SIZE, dtype=torch.float64)
        for _ in range(60):
            slope = torch.func.grad(self.inner)(w, h)
            if slope.norm() < 1e-14:
                break
            direction = torch.linalg.solve(
                torch.func.jacrev(torch.func.grad(self.inner))(w, h), slope
            )
            t = 1.0
            while self.inner(w - t * direction, h) > self.inner(w, h) and t > 1e-6:
                t /= 2
            w = w - t * direction
        return w

    def exact(
        self, inverse: Callable[[Tensor, Tensor], Tensor] = torch.linalg.solve
    ) -> dict[str, Tensor]:
        """``-J H^{-1} a`` at the point of the model, all dense."""
        w, h = self.point(), self.values()
        hessian = torch.func.jacrev(torch.func.grad(self.inner))(w, h)
        q = inverse(hessian, torch.func.grad(self.outer)(w))
        mixed = torch.func.jacrev(torch.func.grad(self.inner), argnums=1)(w, h)
        return {name: -torch.tensordot(q, part, 1) for name, part in mixed.items()}
