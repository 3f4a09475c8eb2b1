"""Memory, disk and time of a run, before it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.layers import MatrixBlock, MatrixGradients, VectorGradients
from woodbury.curvature.per_example import ExampleGradients
from woodbury.errors import ArgumentError, BudgetError
from woodbury.operators.memory import available_bytes, in_words

__all__ = [
    "Forecast",
    "Plan",
    "gradient_seconds",
    "layered_cost",
    "layered_forecast",
    "make_plan",
    "query_bytes",
    "solve_bytes",
]

# Vectors that a solve holds for every right-hand side: b, x, r, z, p, A p and two to work with.
_VECTORS = 8
# Of an example: its gradient, the intermediate ones of its modules, and the copy that is summed.
_COPIES = 3
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """How a run is cut into pieces so that it stays within its memory.

    Attributes:
        budget: bytes it may take beside the model and the data.
        scores: bytes of the scores.
        columns: queries that are solved for together.
        chunk: examples whose gradients are held at once.
        cache: bytes for the linearised curvature.
    """

    budget: int
    scores: int
    columns: int
    chunk: int
    cache: int

    def peak(self, objective: Objective) -> int:
        """Bytes of scores, one block of solves, one chunk of gradients and the curvature."""
        solves = self.columns * solve_bytes(objective)
        return self.scores + solves + self.chunk * _COPIES * _vector(objective) + self.cache


def _vector(objective: Objective) -> int:
    return objective.space.dim * torch.finfo(objective.dtype).bits // 8


def solve_bytes(objective: Objective) -> int:
    """What a solve holds for one right-hand side."""
    return _VECTORS * _vector(objective)


def make_plan(
    objective: Objective, memory: int | None, queries: int, examples: int, modules: int
) -> Plan:
    """Cut a run of ``queries`` by ``examples`` to ``memory`` bytes (default: half of what is free).

    Raises:
        BudgetError: the scores and one query do not fit; the message says what is needed.
        ArgumentError: ``memory`` is not positive.
    """
    if memory is not None and memory < 1:
        raise ArgumentError(f"memory is {memory}; give a positive number of bytes")
    itemsize = torch.finfo(objective.dtype).bits // 8
    vector = _vector(objective)
    scores = queries * examples * itemsize * (1 + modules)
    budget = memory if memory is not None else available_bytes(objective.device) // 2
    least = scores + (_VECTORS + _COPIES) * vector
    if budget < least:
        raise BudgetError(
            f"{in_words(least)} are needed for {queries} x {examples} scores and one query with "
            f"{objective.space.dim} parameters, {in_words(budget)} are allowed; raise memory, "
            "score fewer queries at a time, or choose rows or params"
        )
    left = budget - least
    chunk = 1 + int(min(_CHUNK_BYTES, left // 4) // (_COPIES * vector))
    columns = 1 + int(left // 4 // (_VECTORS * vector))
    return Plan(budget, scores, min(columns, max(1, queries)), chunk, left // 4)


@dataclass(frozen=True)
class Forecast:
    """What a run will take, found with one small piece of it.

    Attributes:
        memory: bytes beside the model and the data, at most.
        disk: bytes in the folder of the run, if it has one.
        passes: passes over the gradients of the training examples.
        gradient_seconds: seconds of one such pass.
        product_seconds: seconds of one product of the matrix with one vector; 0 where the recipe
            multiplies with a matrix that was formed.
        products: products that the recipe may take at most, ``None`` where it does not say.
        plan: how the run is cut.

    Example:
        >>> import torch
        >>> from woodbury import Influence, Objective
        >>> model = torch.nn.Linear(2, 1)
        >>> objective = Objective(model, "mse", (torch.ones(4, 2), torch.ones(4, 1)), l2=0.1)
        >>> forecast = Influence(objective).forecast((torch.ones(1, 2), torch.ones(1, 1)))
        >>> forecast.passes, forecast.disk > 0
        (1, True)
    """

    memory: int
    disk: int
    passes: int
    gradient_seconds: float
    product_seconds: float
    products: int | None
    plan: Plan

    @property
    def seconds(self) -> float:
        """Seconds in all; without the solves where nobody knows how many products they take."""
        return self.passes * self.gradient_seconds + self.product_seconds * (self.products or 0)

    def __str__(self) -> str:
        if self.products == 0:
            solves = ""
        elif self.products is None:
            solves = f", products of {self.product_seconds:.2g} s, as many as the recipe needs"
        else:
            solves = f", up to {self.products} products of {self.product_seconds:.2g} s"
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return (
            f"about {self.seconds:.2g} s: {passes} over the gradients of "
            f"{self.gradient_seconds:.2g} s{solves}; {in_words(self.memory)} of memory at most, "
            f"{in_words(self.disk)} on disk if a folder is given"
        )


def gradient_seconds(objective: Objective, chunk: int, examples: int) -> float:
    """Seconds of a pass over ``examples`` gradients, from a few of the first batch."""
    batch = next(iter(objective.batches("forecast")))
    few = slice(0, min(batch.size, chunk, 64))
    gradients = ExampleGradients(objective)
    gradients.of(batch, few)  # the first call builds what later ones use
    start = time.perf_counter()
    gradients.of(batch, few)
    return (time.perf_counter() - start) / (few.stop - few.start) * examples


def layered_forecast(
    objective: Objective, asked: Objective, plan: Plan, rows: int, fits: int, rank: int | None
) -> Forecast:
    """Of scores layer by layer.

    Args:
        objective: of the training data.
        asked: of the queries.
        plan: of the scores.
        rows: training examples that are scored.
        fits: passes that fit the matrix.
        rank: of the gradients of the queries.
    """
    seconds, factors = layered_cost(objective)
    blocks = next(iter(FactoredGradients(asked).passes("forecast"))).blocks
    memory = plan.scores + factors + query_bytes(blocks, asked.num_examples, rank)
    disk, seconds = 2 * plan.scores + rows * 8, seconds * max(objective.num_examples, rows)
    return Forecast(memory, disk, fits + 1, seconds, 0.0, 0, plan)


def query_bytes(
    blocks: Mapping[str, MatrixGradients | VectorGradients], queries: int, rank: int | None
) -> int:
    """What the gradients of queries take when layers are scored, if all are like these.

    Args:
        blocks: gradients of some queries.
        queries: how many there are in all.
        rank: at most; ``None``: their factors.
    """
    numbers = 0
    for found in blocks.values():
        if isinstance(found, VectorGradients):
            numbers += found.values.shape[1]
            itemsize = found.values.element_size()
            continue
        t, p, m = found.grads.shape[1], found.block.p, found.block.m
        itemsize = found.grads.element_size()
        if rank is None:
            numbers += t * (p + m)
        else:
            numbers += t * (p + 1) if found.one_hot else min(min(t, rank) * (p + m), p * m)
    return queries * numbers * itemsize


def layered_cost(objective: Objective) -> tuple[float, int]:
    """Of K-FAC: seconds of a pass over one example, and bytes of factors and eigenvalues.

    Measured on the first batch: to the outputs of the layers and back, and the products of the
    inputs and of the gradients that the factors are made of.
    """
    gradients = FactoredGradients(objective)
    itemsize = torch.finfo(objective.dtype).bits // 8
    numbers = 0
    for block in gradients.blocks.values():
        if isinstance(block, MatrixBlock):
            numbers += block.p**2 + block.m**2 + block.p * block.m
        else:
            numbers += 2 * block.size(objective.space)
    start = time.perf_counter()
    batch = next(iter(gradients.passes("forecast")))
    for found in batch.blocks.values():
        if isinstance(found, MatrixGradients) and not found.one_hot:
            for side in (found.inputs, found.grads):
                flat = side.flatten(0, 1)
                flat.T @ flat
    # Sums, eigenbases in double precision, and what the user's dtype keeps of them.
    return (time.perf_counter() - start) / batch.size, 4 * numbers * itemsize
