"""Scores of the places in a sequence: which tokens of a training example its influence is of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import FactoredGradients
from woodbury.curvature.layers import MatrixGradients
from woodbury.errors import StructureError
from woodbury.influence.influence import Influence
from woodbury.influence.measurements import measured

__all__ = ["TokenScores", "token_scores"]


@dataclass(frozen=True, eq=False)
class TokenScores:
    r"""The parts that the places of a training example have in its score.

    Attributes:
        values: $s_{qit}$, ``[Q, E, T]``; padding of shorter examples has 0.
        rest: ``[Q, E]``: the part of parameters that no place owns (norms, embeddings of
            positions). ``values.sum(2) + rest`` are the scores of the examples.

    Example:
        >>> import torch
        >>> from woodbury.influence import TokenScores
        >>> found = TokenScores(torch.tensor([[[0.5, -2.0, 0.0]]]), torch.zeros(1, 1))
        >>> found.values.abs().argmax(2)  # the second place
        tensor([[1]])
    """

    values: Tensor
    rest: Tensor


def token_scores(influence: Influence, queries: Any, examples: Any) -> TokenScores:
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

    Returns:
        :class:`TokenScores`.

    Raises:
        StructureError: no layer of the model sees more than one place.
        SolveError: as the recipe raises.

    Cost: a solve for each query, and for each batch of examples one forward and backward pass and
    ``Q`` products with each weight. Memory of the solutions, ``Q n`` numbers.

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
    pieces: list[tuple[slice | Tensor, Tensor]] = list(asked.per_example_gradients())
    directions = influence.system.solve(asked.in_order(pieces).T.contiguous()).value.T
    directions = directions / -objective.num_examples
    looked_at = FactoredGradients(objective.with_data(examples))
    places = {
        name: block.positions(objective.space).to(directions.device)
        for name, block in looked_at.blocks.items()
    }
    values: list[tuple[Tensor, Tensor]] = []
    rests: list[tuple[slice | Tensor, Tensor]] = []
    length = 0
    for batch in looked_at.passes("scores of places"):
        steps = _steps(batch.blocks.values())
        found = directions.new_zeros(len(directions), batch.size, steps)
        rest = directions.new_zeros(len(directions), batch.size)
        for name, gradients in batch.blocks.items():
            own = directions[:, places[name]]
            if isinstance(gradients, MatrixGradients):
                parts = gradients.tokens(own.view(-1, gradients.block.p, gradients.block.m))
                if parts.shape[2] % steps == 0:  # several uses of a weight lie one after another
                    found += parts.unflatten(2, (-1, steps)).sum(2)
                else:
                    rest += parts.sum(2)
            else:
                rest += gradients.inner(own)
        length = max(length, steps)
        values.append((batch.rows, found.transpose(0, 1)))
        rests.append((batch.rows, rest.T))
    padded: list[tuple[slice | Tensor, Tensor]] = [
        (rows, _padded(part, length)) for rows, part in values
    ]
    inside = looked_at.objective
    return TokenScores(inside.in_order(padded).transpose(0, 1), inside.in_order(rests).T)


def _steps(gradients: Any) -> int:
    """The number of places: what most layers see."""
    counts = Counter(
        g.grads.shape[1] for g in gradients if isinstance(g, MatrixGradients) and g.grads.shape[1]
    )
    if not counts:
        raise StructureError("no layer of the model has gradients that are sums over places")
    most = max(counts.values())
    return min(steps for steps, count in counts.items() if count == most)


def _padded(part: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, length - part.shape[2]))
