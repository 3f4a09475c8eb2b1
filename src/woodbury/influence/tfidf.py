"""Which training texts share rare tokens with a query: a filter before influence is computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, DataError

__all__ = ["TfIdf"]

Tokens = Sequence[Hashable] | Tensor


class TfIdf:
    r"""Overlap of tokens with a query, rare tokens first.

    $$ s(Q, D) = \sum_{t \in Q} \frac{(k_1 + 1) f_{t,D}}{k_1 + f_{t,D}} \operatorname{IDF}(t),
    \qquad \operatorname{IDF}(t) = \log\Big(\frac{C - n_t + 0.5}{n_t + 0.5} + 1\Big), $$

    the sum over the tokens of the query as often as they occur, $n_t$ the number of the $C$
    documents that hold $t$. In the paper $f$ is 1 where the document holds the token, so that the
    first factor is 1; ``counts=True`` takes the number of times.

    The rows found go to ``Influence.scores(..., rows=...)``. What shares no token with the query is
    never found, whatever its influence.

    Args:
        documents: token sequences (numbers, or words), one for each training row.
        k1: $k_1 \ge 0$.
        counts: take how often a token occurs in a document.

    Raises:
        DataError: there are no documents.
        ArgumentError: ``k1`` is negative or no number.

    Cost: a pass over all tokens, then for a query the documents that hold its tokens.

    Source: Grosse et al., "Studying large language model generalization with influence functions"
    (2023), section 3.3 (``k1 = 1.5``); Robertson and Zaragoza, "The probabilistic relevance
    framework: BM25 and beyond" (2009).

    Example:
        >>> from woodbury.influence import TfIdf
        >>> texts = ["to be or not to be", "the rest is silence", "be silent"]
        >>> found = TfIdf([text.split() for text in texts])
        >>> found.top("the question to be".split(), 2)
        tensor([0, 1])
    """

    def __init__(
        self, documents: Iterable[Tokens], *, k1: float = 1.5, counts: bool = False
    ) -> None:
        if not 0 <= k1 < math.inf:
            raise ArgumentError(f"k1 is {k1}; it must be a number >= 0")
        self.k1, self.counts = k1, counts
        postings: dict[Hashable, list[tuple[int, int]]] = {}
        self.size = 0
        for number, document in enumerate(documents):
            self.size = number + 1
            tokens = document.tolist() if isinstance(document, Tensor) else document
            for token, times in Counter(tokens).items():
                postings.setdefault(token, []).append((number, times))
        if not self.size:
            raise DataError("there are no documents; give one sequence of tokens for each row")
        self._postings = {
            token: torch.tensor(pairs, dtype=torch.int64).T for token, pairs in postings.items()
        }

    def idf(self, token: Hashable) -> float:
        """The weight of a token, larger the fewer documents hold it."""
        found = self._postings.get(token)
        n = 0 if found is None else found.shape[1]
        return math.log((self.size - n + 0.5) / (n + 0.5) + 1)

    def scores(self, query: Tokens) -> Tensor:
        """Scores of all documents, ``[C]``, float64."""
        result = torch.zeros(self.size, dtype=torch.float64)
        tokens = query.tolist() if isinstance(query, Tensor) else query
        for token, times in Counter(tokens).items():
            found = self._postings.get(token)
            if found is None:
                continue
            f = found[1].double() if self.counts else torch.ones(found.shape[1]).double()
            result[found[0]] += times * self.idf(token) * (self.k1 + 1) * f / (self.k1 + f)
        return result

    def top(self, query: Tokens, k: int = 10_000) -> Tensor:
        """Rows of the ``k`` documents with the highest scores above zero, best first.

        Raises:
            ArgumentError: ``k`` is not positive.
        """
        if k < 1:
            raise ArgumentError(f"k is {k}; ask for at least one document")
        scores = self.scores(query)
        order = scores.argsort(descending=True, stable=True)[:k]
        return order[scores[order] > 0]
