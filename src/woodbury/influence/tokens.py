"""Scores of the places in a sequence: which tokens of a training example its influence is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.layers import Block, MatrixBlock, MatrixGradients
from woodbury.errors import ArgumentError, ShapeError, StructureError
from woodbury.influence.forecast import make_plan
from woodbury.influence.influence import Influence
from woodbury.influence.measurements import measured
from woodbury.influence.rows import Gradients, rows_of_data

__all__ = ["TokenScores", "token_scores"]


@dataclass(frozen=True, eq=False)
class TokenScores:
    r"""The parts that the places of a training example have in its score.

    Attributes:
        values: $s_{qit}$, ``[Q, E, T]``, or ``[P, T]`` of ``P`` pairs; padding of shorter examples
            has 0.
        rest: ``[Q, E]`` or ``[P]``: the part of parameters that no place owns (norms, embeddings
            of positions). ``values.sum(-1) + rest`` are the scores of the examples.

    Example:
        >>> import torch
        >>> from woodbury.influence import TokenScores
        >>> found = TokenScores(torch.tensor([[[0.5, -2.0, 0.0]]]), torch.zeros(1, 1))
        >>> found.values.abs().argmax(2)  # the second place
        tensor([[1]])
    """

    values: Tensor
    rest: Tensor


def token_scores(
    influence: Influence, queries: Any, examples: Any, *, pairs: Tensor | None = None
) -> TokenScores:
    r"""Split the scores of some training examples over the places of their sequences.

    The gradient of an example in the weight of a layer is a sum over places,
    $D_i = \sum_t g_{it} a_{it}^T$, and so is its score:

    $$ s_{qit} = -\frac1N \sum_l g_{lit}^T\, \operatorname{mat}_l(A^{-1}\nabla m_q)\, a_{lit}. $$

    Place $t$ of a language model is where the token after it is predicted; with attention $g_{lit}$
    also has what later places need from it.

    Args:
        influence: whose matrix, damping, recipe and measurement are taken.
        queries: data of the queries, as for :meth:`Influence.scores`.
        examples: the training examples to look into, in a form that
            :class:`~woodbury.Objective` takes; all of the same padded length or in batches.
        pairs: ``[P, 2]``: the number of a query and of an example, in the order of these data, for
            each pair that is wanted. Default: all ``Q E``.

    Returns:
        :class:`TokenScores`.

    Raises:
        ArgumentError, ShapeError: pairs of what is not there, or in another form.
        StructureError: no layer of the model sees more than one place.
        BudgetError: the memory of ``influence`` does not hold one query.
        SolveError: as the recipe raises.

    Cost: a solve for each query, in blocks that fit into the memory of ``influence``; for each
    block one forward and backward pass over the examples of its pairs, and for each pair a product
    of its places with each weight.

    Source: R. Grosse et al., "Studying large language model generalization with influence
    functions" (2023), section 3.3, "Layerwise and tokenwise attribution".

    Example:
        >>> import torch
        >>> from woodbury import Influence, Objective
        >>> from woodbury.influence import token_scores
        >>> _ = torch.manual_seed(0)
        >>> words, targets = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.out = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5)
        ...     def forward(self, words):
        ...         return self.out(torch.tanh(self.embed(words))).mT
        >>> objective = Objective(Model(), "cross_entropy", (words, targets))
        >>> influence = Influence(objective, damping=0.1)
        >>> data = words[:2], targets[:2]
        >>> found = token_scores(influence, data, data)
        >>> found.values.shape
        torch.Size([2, 2, 4])
        >>> scores = influence.scores(data).values[:, :2]
        >>> torch.allclose(found.values.sum(2) + found.rest, scores, rtol=1e-3, atol=1e-5)
        True
    """
    objective = influence.objective
    asked = measured(objective, influence.measurement, queries)
    looked_at = objective.with_data(examples)
    Q, E = asked.num_examples, looked_at.num_examples
    wanted = torch.cartesian_prod(torch.arange(Q), torch.arange(E)) if pairs is None else pairs
    wanted = _checked(wanted, Q, E).to(objective.device)
    columns = make_plan(objective, influence._memory, Q, E, 0).columns
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for chunk in wanted[:, 0].unique().split(columns) if len(wanted) else ():
        slots = torch.isin(wanted[:, 0], chunk).nonzero().squeeze(1)
        few, order = _rows(looked_at, wanted[slots, 1].unique())
        factored = FactoredGradients(few)
        solved = _solved(influence, asked, chunk)
        matrices = {
            name: _shaped(solved[:, block.positions(objective.space).to(solved.device)], block)
            for name, block in factored.blocks.items()
        }
        start = 0
        for batch in factored.passes("scores of places"):
            rows = order[start : start + batch.size]
            start += batch.size
            inside = slots[torch.isin(wanted[slots, 1], rows)]
            place = torch.full((E,), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            here = torch.searchsorted(chunk, wanted[inside, 0].contiguous())
            pair = torch.stack([here, place[wanted[inside, 1]]], 1)
            pieces.append((inside, *_of_batch(batch.blocks, matrices, pair)))
            done += len(inside)
            influence._say("scoring tokens", done / len(wanted))
    length = max((values.shape[1] for _, values, _ in pieces), default=0)
    values = wanted.new_zeros(len(wanted), length, dtype=objective.dtype)
    rest = wanted.new_zeros(len(wanted), dtype=objective.dtype)
    for slots, own, others in pieces:
        values[slots, : own.shape[1]] = own
        rest[slots] = others
    if pairs is None:
        return TokenScores(values.view(Q, E, length), rest.view(Q, E))
    return TokenScores(values, rest)


def _checked(pairs: Tensor, queries: int, examples: int) -> Tensor:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ShapeError(
            f"pairs are {pairs.dtype} of shape {tuple(pairs.shape)}; give integers [P, 2]: the "
            "number of a query and of an example"
        )
    for what, column, count in (
        ("queries", pairs[:, 0], queries),
        ("examples", pairs[:, 1], examples),
    ):
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        if low < 0 or high >= max(count, 1):
            raise ArgumentError(f"pairs name {what} from {low} to {high}; there are {count}")
    return pairs.long()


def _rows(objective: Objective, wanted: Tensor) -> tuple[Objective, Tensor]:
    """Some rows of the data, and which they are, in the order that batches bring them."""
    found = rows_of_data(objective, wanted)
    return objective.with_data([data for _, data in found]), torch.cat([rows for rows, _ in found])


def _solved(influence: Influence, asked: Objective, queries: Tensor) -> Tensor:
    r"""$-\frac1N A^{-1}\nabla m_q$ of ascending ``queries``, ``[q, n]``."""
    few, order = _rows(asked, queries)
    gradients = torch.cat([found for _, found in few.per_example_gradients()])[order.argsort()]
    solved = influence.system.solve(gradients.T.contiguous()).value.T
    return solved / -influence.objective.num_examples


def _shaped(rows: Tensor, block: Block) -> Tensor:
    return rows.view(-1, block.p, block.m) if isinstance(block, MatrixBlock) else rows


def _steps(gradients: Any) -> int:
    """The number of places: what most layers see."""
    counts = Counter(
        g.grads.shape[1] for g in gradients if isinstance(g, MatrixGradients) and g.grads.shape[1]
    )
    if not counts:
        raise StructureError("no layer of the model has gradients that are sums over places")
    most = max(counts.values())
    return min(steps for steps, count in counts.items() if count == most)


def _of_batch(
    blocks: Mapping[str, Gradients], matrices: Mapping[str, Tensor], pairs: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of places ``[P, T]`` and the rest ``[P]`` of pairs of a solution and an example.

    Args:
        blocks: gradients of the examples.
        matrices: solutions ``[q, p, m]`` or ``[q, n]``.
        pairs: ``[P, 2]``, places in the two.
    """
    steps = _steps(blocks.values())
    first = next(iter(matrices.values()))
    values, rest = first.new_zeros(len(pairs), steps), first.new_zeros(len(pairs))
    for query in pairs[:, 0].unique().tolist():
        own = (pairs[:, 0] == query).nonzero().squeeze(1)
        examples = pairs[own, 1]
        for name, gradients in blocks.items():
            few = gradients.take(examples)
            solution = matrices[name][query : query + 1]
            if not isinstance(few, MatrixGradients):
                rest[own] += few.inner(solution)[0]
                continue
            parts = few.tokens(solution)[0]
            if parts.shape[1] % steps == 0:  # several uses of a weight lie one after another
                values[own] += parts.unflatten(1, (-1, steps)).sum(1)
            else:
                rest[own] += parts.sum(1)
    return values, rest
