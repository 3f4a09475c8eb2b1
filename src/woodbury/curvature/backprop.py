"""What is backpropagated for every example: its loss, a sampled score, or a column of a root."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.draws import Draws
from woodbury.curvature.likelihoods import Likelihood
from woodbury.curvature.losses import per_example
from woodbury.curvature.problem import Params, Problem
from woodbury.errors import ArgumentError, NonFiniteError, StructureError

__all__ = ["Backprop", "pulled_back"]

# Outputs of an example whose root is decomposed: c^3 operations for each example.
_FEW = 128


class Backprop:
    r"""Scalars per example whose gradients $s$ make a matrix $\sum s s^T$.

    Args:
        problem: gives losses and outputs.
        kind: ``"empirical"``: the loss. ``"sampled"``: the score at a drawn label, times the root
            of the weight of its element. ``"exact"``: one after the other the columns of a root of
            the curvature in the outputs.
        samples: labels drawn for each example.
        seed: of the labels, which belong to the rows of the data: the same however these are cut
            into batches (``woodbury.curvature.draws``).

        principal: with ``"exact"``: columns of each example that are orthogonal to each other, the
            largest first, where outputs are few (``_FEW``); they concentrate what there is.

    Raises:
        ArgumentError: ``kind`` or ``samples`` is not valid.
        StructureError: the criterion is no likelihood (sampled, exact).
    """

    def __init__(
        self,
        problem: Problem,
        kind: str,
        samples: int = 1,
        seed: int = 0,
        *,
        principal: bool = False,
    ) -> None:
        if kind not in ("exact", "sampled", "empirical"):
            raise ArgumentError(f"kind is {kind!r}; use 'exact', 'sampled' or 'empirical'")
        if samples < 1:
            raise ArgumentError(f"samples is {samples}; at least one label is drawn per example")
        if kind != "empirical" and not isinstance(problem.criterion, Likelihood):
            raise StructureError(
                f"the {kind} Fisher matrix needs a likelihood: cross_entropy, mse or "
                "BCEWithLogitsLoss; kind='empirical' works with any criterion"
            )
        self.problem, self.kind, self.samples, self.seed = problem, kind, samples, seed
        self.principal = principal

    def evaluate(self, params: Params, batch: Batch) -> Tensor:
        """What is differentiated: losses ``[B]`` or outputs ``[B, ...]``."""
        if self.kind == "empirical":
            return per_example(self.problem.losses(params, batch), "gradients per example")
        return self.problem.outputs(params, batch)

    def root(self, params: Params, batch: Batch) -> Tensor:
        """The same, seen to be finite."""
        result = self.evaluate(params, batch)
        what = "losses" if self.kind == "empirical" else "outputs"
        bad = ~torch.isfinite(result.detach()).reshape(len(result), -1).all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"the {what} of batch {batch.index} ({batch.size} examples) hold NaN or infinity, "
                f"first in its example {row} (row {int(batch.places()[row])} of the data); check "
                "that example and the parameters"
            )
        return result

    def cotangents(self, root: Tensor, batch: Batch) -> Iterator[Tensor]:
        """What the root is multiplied by, one after the other."""
        plain = root.detach()
        if self.kind == "empirical":
            yield torch.ones_like(plain)
            return
        if self.kind == "exact":
            columns = self._likelihood.root_columns(plain, self.problem.target(batch))
            few = self.principal and plain[0].numel() <= _FEW
            yield from _orthogonal(list(columns)) if few else columns
            return
        for score in self.scores(plain, batch):
            yield score / self.samples**0.5

    def scores(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """``sqrt(a)`` times the score at a drawn label, for one sample after the other."""
        likelihood = self._likelihood
        root = likelihood.mass(outputs, self.problem.target(batch)).sqrt()
        rows = batch.places().to(outputs.device)
        for sample in range(self.samples):
            yield likelihood.score(outputs, Draws(self.seed, rows, sample)) * root

    @property
    def _likelihood(self) -> Likelihood:
        criterion = self.problem.criterion
        assert isinstance(criterion, Likelihood)  # seen in the constructor
        return criterion

    def columns(self, root: Tensor) -> int:
        """How many cotangents there are."""
        if self.kind == "exact":
            return root[0].numel()
        return self.samples if self.kind == "sampled" else 1

    def probe(self, root: Tensor) -> Tensor:
        """A random cotangent, to see which outputs of a layer belong to which example."""
        if self.kind == "empirical":
            return torch.ones_like(root)
        generator = torch.Generator(root.device).manual_seed(0)
        return torch.randn(root.shape, dtype=root.dtype, device=root.device, generator=generator)


def _orthogonal(columns: Sequence[Tensor]) -> Iterator[Tensor]:
    """Columns with the same sum of outer products, those of an example orthogonal."""
    root = torch.stack([column.flatten(1) for column in columns], 2)  # [B, outputs, columns]
    U, values, _ = torch.linalg.svd(root, full_matrices=False)
    for column in (U * values[:, None]).unbind(2):
        yield column.reshape(columns[0].shape)


def pulled_back(
    root: Tensor, inputs: Sequence[Any], cotangent: Tensor, *, keep: bool
) -> Sequence[Tensor | None]:
    """Gradients of ``<root, cotangent>``."""
    with torch.enable_grad():
        # A number, not the pair: given a cotangent, torch first loads its symbolic shapes (0.4 s).
        number = (root * cotangent).sum()
    return torch.autograd.grad(number, inputs, retain_graph=keep, allow_unused=True)
