"""Scores layer by layer, for inverses in an eigenbasis of Kronecker form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.layers import MatrixGradients, VectorGradients
from woodbury.errors import DataError
from woodbury.influence.eigenbasis import (
    EigenBlock,
    MatrixQueries,
    Spectrum,
    Terms,
    VectorInverse,
    VectorQueries,
)
from woodbury.influence.kronecker import one_by_one
from woodbury.influence.pairwise import SECONDS_BETWEEN_PIECES, Say
from woodbury.influence.rows import Gradients, joined, norms_of, of_one_shape, rows_of_data
from woodbury.influence.runs import Run
from woodbury.influence.truncation import (
    Choice,
    Draw,
    Truncation,
    choose,
    falling,
    levels,
    pair_sizes,
)

__all__ = ["Inverses", "Layered", "Queries", "layered_self_scores"]

Inverses = Mapping[str, EigenBlock | VectorInverse]
Prepared = dict[str, MatrixQueries | VectorQueries]


class Queries(Protocol):
    """Queries of one block, ready to be scored against the gradients of training examples."""

    def __len__(self) -> int: ...

    def scores(self, gradients: Any, /) -> Tensor:
        """``[Q, b]``."""
        ...


# Terms and training examples of a first look, pairs that are drawn there and for the certificate,
# and the part of the tolerance that is aimed at: what is measured in the end is an upper limit.
_ROUGH, _PILOT, _SAMPLE, _AIM = 8, 1024, 1024, 0.5
# Where that is not met: more exact pairs, up to a share of all; then more terms; then exact scores.
_WIDENINGS, _MOST, _ATTEMPTS = 3, 0.1, 3


class Layered:
    """One run over queries and training examples.

    Args:
        objective: of the training data.
        inverses: of every block.
        tolerance: relative error that the separable form may cost; 0 for exact scores.
        rows: the training examples that are scored, ascending.
        run: where finished pieces are.
        parts: keep the scores of every block.
        say: progress.
    """

    def __init__(
        self,
        objective: Objective,
        inverses: Inverses,
        tolerance: float,
        rows: Tensor,
        run: Run,
        parts: bool,
        say: Say,
    ) -> None:
        self.objective, self.inverses, self.tolerance = objective, inverses, tolerance
        self.rows, self.run, self.say = rows.to(objective.device), run, say
        self.factored = FactoredGradients(objective, dense=one_by_one(inverses))
        self.asked = torch.zeros(0)  # norms of the gradients of the queries
        self.factor = -1 / objective.num_examples
        self.names = tuple(inverses) if parts else ()
        self.norms = torch.zeros(len(rows), dtype=objective.dtype, device=objective.device)

    def scores(self, asked: Objective) -> tuple[Tensor, Tensor | None, Truncation | None]:
        """Scores ``[Q, N]``, parts ``[M, Q, N]``, and what the separable form cost."""
        places, groups = self._prepare(asked)
        tolerance = self.tolerance
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            choice = self._choose(groups, 0.0 if last else tolerance)
            values, parts = self._pass(groups, f"scores-{attempt}")
            truncation = self._refine(groups, values, parts, choice, attempt) if choice else None
            if truncation is None or truncation.upper <= self.tolerance:
                break
            tolerance *= 0.8 * self.tolerance / truncation.upper
        result = asked.in_order(list(zip(places, values.split(_sizes(places)), strict=True)))
        if parts is not None:
            parts = torch.stack(
                [
                    asked.in_order(list(zip(places, p.split(_sizes(places)), strict=True)))
                    for p in parts
                ]
            )
        return result, parts, truncation

    def words(self, truncation: Truncation | None) -> dict[str, Any]:
        """What a certificate says."""
        if truncation is None:
            return {}
        return {
            "truncation_error": truncation.relative,
            "truncation_error_at_most": truncation.upper,
            "terms": dict(truncation.terms),
            "exact_pairs": truncation.exact,
        }

    def errors(self, queries: int, truncation: Truncation | None) -> Tensor | None:
        """What times ``norms`` bounds the error of every score, ``[Q]``, if anything does."""
        return torch.zeros(queries, dtype=torch.float64) if truncation is None else None

    # -------------------------------------------------------------- queries

    def _prepare(self, asked: Objective) -> tuple[list[Tensor], list[Prepared]]:
        places, groups, norms = [], [], []
        for batch in FactoredGradients(asked, dense=self.factored.dense).passes("queries"):
            prepared: Prepared = {}
            for name, gradients in batch.blocks.items():
                prepared[name] = self._queries(name, gradients)
            places.append(batch.rows)
            groups.append(prepared)
            norms.append(norms_of(batch.blocks))
        self.asked = torch.cat(norms)
        return places, groups

    def _queries(self, name: str, gradients: Gradients) -> MatrixQueries | VectorQueries:
        inverse = self.inverses.get(name)
        if isinstance(inverse, EigenBlock) and isinstance(gradients, MatrixGradients):
            return MatrixQueries(inverse, gradients)
        if isinstance(inverse, VectorInverse) and isinstance(gradients, VectorGradients):
            return VectorQueries(inverse, gradients)
        raise DataError(
            f"the queries use {name!r} in another way than the training data ({type(gradients)}"
            f" and {type(inverse)}); measure the same outputs of the same model"
        )

    # ---------------------------------------------------------------- terms

    def _choose(self, groups: Sequence[Prepared], tolerance: float) -> Choice | None:
        """Terms and exact pairs that the tolerance needs on a few training examples.

        The queries take the terms; ``None`` where they take none.
        """
        _use(groups, {})
        spectra = _spectra(groups) if tolerance > 0 else {}
        batch = self._pilot() if spectra else {}
        spectra = {name: found for name, found in spectra.items() if _single(batch.get(name))}
        if not spectra:
            return None
        terms = {name: found.terms() for name, found in spectra.items()}
        _use(groups, {name: some.leading(_ROUGH) for name, some in terms.items()})
        rough = self.factor * torch.cat([summed(each(group, batch)) for group in groups])
        norms = norms_of(batch)
        total, outer = float(rough.norm()), float(self.asked.norm() * norms.norm())
        if not (total > 0 and outer > 0):
            _use(groups, {})
            return None
        scale = total / outer
        sizes = pair_sizes(rough, self.asked, norms, scale)
        draw, at = Draw.of(sizes, 0, _SAMPLE), levels(sizes)
        weights = draw.weights() * (sizes[draw.queries, draw.columns] <= at[:, None])
        drawn, places = draw.columns.unique(return_inverse=True)
        errors = {}
        for name in terms:
            sample, found = batch[name].take(drawn), []
            for part, query, own in _among(groups, name, draw.queries):
                if isinstance(query, MatrixQueries) and query.single:
                    pairs = own, places[part], weights[:, part]
                    found.append(query.errors(terms[name], sample, *pairs))  # type: ignore[arg-type]
            errors[name] = falling(self.factor**2 * torch.stack(found).sum(0))
        shapes = {name: (len(some.u[0]), len(some.v[0])) for name, some in terms.items()}
        counts, level = choose(errors, shapes, sizes, at, (_AIM * tolerance * total) ** 2)
        _use(groups, {name: terms[name].leading(count) for name, count in counts.items()})
        return Choice(counts, scale, level) if counts else None

    def _pilot(self) -> dict[str, Gradients]:
        """Gradients of training examples from all over the data, which may be in any order."""
        generator = torch.Generator(self.rows.device).manual_seed(0)
        order = torch.randperm(len(self.rows), generator=generator, device=self.rows.device)
        subset = rows_of_data(self.objective, self.rows[order[:_PILOT]])
        few = self.objective.with_data([data for _, data in subset])
        found: dict[str, list[Gradients]] = {}
        for batch in FactoredGradients(few, dense=self.factored.dense).passes("pilot"):
            for name, gradients in batch.blocks.items():
                found.setdefault(name, []).append(gradients)
        return {name: joined(pieces) for name, pieces in found.items() if of_one_shape(pieces)}

    # ----------------------------------------------------------------- pass

    def _pass(
        self, groups: Sequence[Mapping[str, Queries]], name: str
    ) -> tuple[Tensor, Tensor | None]:
        count = sum(_width(group) for group in groups)
        values = self.norms.new_zeros(count, len(self.rows))
        parts = self.norms.new_zeros(len(self.names), count, len(self.rows))
        start, done = self._restored(name, values, parts)
        last = time.monotonic()
        for batch in self.factored.passes("scores", start):
            wanted = torch.isin(batch.rows, self.rows)
            blocks = batch.blocks
            if not bool(wanted.all()):
                index = wanted.nonzero().squeeze(1)
                blocks = {key: gradients.take(index) for key, gradients in blocks.items()}
            columns = torch.searchsorted(self.rows, batch.rows[wanted])
            if len(columns):
                found = [each(group, blocks) for group in groups]
                values[:, columns] = self.factor * torch.cat([summed(one) for one in found])
                for part, key in zip(parts, self.names, strict=True):
                    piece = [one.get(key, torch.zeros_like(summed(one))) for one in found]
                    part[:, columns] = self.factor * torch.cat(piece)
                self.norms[columns] = self._sizes_of(blocks)
            done += len(columns)
            self.say("scoring the training examples", done / len(self.rows))
            if time.monotonic() - last >= SECONDS_BETWEEN_PIECES or done == len(self.rows):
                tensors = {"values": values, "parts": parts, "norms": self.norms}
                self.run.keep(name, tensors, {"batches": batch.index + 1, "done": done})
                last = time.monotonic()
            if done == len(self.rows):
                break
        return values, parts if self.names else None

    def _sizes_of(self, blocks: Mapping[str, Gradients]) -> Tensor:
        """What is kept of the sizes of gradients: norms over all blocks, ``[b]``."""
        return norms_of(blocks)

    def _restored(self, name: str, values: Tensor, parts: Tensor) -> tuple[int, int]:
        kept = self.run.load(name)
        if kept is None:
            return 0, 0
        tensors, words = kept
        values.copy_(tensors["values"])
        parts.copy_(tensors["parts"])
        self.norms.copy_(tensors["norms"])
        return int(words["batches"]), int(words["done"])

    # ---------------------------------------------------------- certificate

    def _refine(
        self,
        groups: Sequence[Prepared],
        values: Tensor,
        parts: Tensor | None,
        choice: Choice,
        attempt: int,
    ) -> Truncation:
        """Exact scores of the largest pairs, in place, and of some others for the error."""
        sizes = pair_sizes(values, self.asked, self.norms, choice.scale)
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        level, exact = choice.level, 0
        for widening in range(_WIDENINGS):
            heavy = sizes > level
            seed = 1 + attempt * _WIDENINGS + widening  # not those that chose the terms
            draw = Draw.of(sizes.masked_fill(heavy, 0), seed, _SAMPLE)
            drawn = draw.queries, draw.columns
            pairs = [torch.cat(part) for part in zip(heavy.nonzero().T, drawn, strict=True)]
            before = values[drawn]
            self._exact(groups, values, parts, *pairs)
            errors = values[drawn] - before
            open_ = sizes[drawn].masked_fill(heavy[drawn], 0)  # exact ones are 0, without an error
            errors = errors.masked_fill(open_ == 0, 0)
            relative, upper = draw.relative(errors, norm)
            exact += int(heavy.sum())
            share = exact / sizes.numel()
            truncation = Truncation(relative, upper, len(errors), choice.terms, share)
            sizes[tuple(pairs)] = 0
            level = draw.level(errors, open_, (_AIM * self.tolerance * norm) ** 2)
            if upper <= self.tolerance or float((sizes > level).double().mean()) > _MOST:
                break
        return truncation

    def _exact(
        self,
        groups: Sequence[Prepared],
        values: Tensor,
        parts: Tensor | None,
        queries: Tensor,
        columns: Tensor,
    ) -> None:
        """Exact scores of some pairs, in place."""
        subset = rows_of_data(self.objective, self.rows[columns.unique()])
        order = torch.cat([rows for rows, _ in subset])
        few = self.objective.with_data([data for _, data in subset])
        place = torch.empty_like(self.rows)
        place[torch.searchsorted(self.rows, order)] = torch.arange(len(order), device=place.device)
        place, start = place[columns], 0  # of every pair its example among the few
        for batch in FactoredGradients(few, dense=self.factored.dense).passes("exact pairs"):
            rows = place - start
            here = ((rows >= 0) & (rows < batch.size)).nonzero().squeeze(1)
            whole = values.new_zeros(len(here))
            for number, name in enumerate(self.inverses):
                found = torch.zeros_like(whole)
                for part, query, own in _among(groups, name, queries[here]):
                    if name in batch.blocks:
                        found[part] = query.pairs(batch.blocks[name], own, rows[here[part]])  # type: ignore[arg-type]
                whole += found
                if parts is not None:
                    parts[number][queries[here], columns[here]] = self.factor * found
            values[queries[here], columns[here]] = self.factor * whole
            start += batch.size


def _sizes(places: Sequence[Tensor]) -> list[int]:
    return [len(part) for part in places]


def _width(group: Mapping[str, Queries]) -> int:
    return len(next(iter(group.values())))


def each(group: Mapping[str, Queries], blocks: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """Scores of every block that the queries and the examples share, ``[Q, b]``."""
    found = {}
    for name, query in group.items():
        if name in blocks:
            found[name] = query.scores(blocks[name])
    if not found:
        raise DataError("the queries and the training data use no parameter in common")
    return found


def _single(gradients: Gradients | None) -> bool:
    """Whether every example has one position."""
    return isinstance(gradients, MatrixGradients) and gradients.grads.shape[1] == 1


def _among(
    groups: Sequence[Prepared], name: str, queries: Tensor
) -> Iterator[tuple[Tensor, MatrixQueries | VectorQueries, Tensor]]:
    """Which of the ``queries`` each group has, its form of them, and their numbers there."""
    start = 0
    for group in groups:
        width = _width(group)
        if name in group:
            part = ((queries >= start) & (queries < start + width)).nonzero().squeeze(1)
            yield part, group[name], queries[part] - start
        start += width


def _spectra(groups: Sequence[Prepared]) -> dict[str, Spectrum]:
    """Spectra of the blocks that can take terms."""
    found = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        some = [group.get(name) for group in groups]
        queries = [one for one in some if isinstance(one, MatrixQueries) and one.single]
        spectrum = Spectrum.of(queries) if queries else None
        if spectrum is not None:
            found[name] = spectrum
    return found


def _use(groups: Sequence[Prepared], terms: Mapping[str, Terms]) -> None:
    """Let all queries take these terms, and those of other blocks none."""
    for group in groups:
        for name, query in group.items():
            if isinstance(query, MatrixQueries):
                query.use_terms(terms.get(name) if query.single else None)


def summed(found: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(found.values())).sum(0)


def layered_self_scores(objective: Objective, inverses: Inverses, run: Run, say: Say) -> Tensor:
    """Scores of every training example for its own loss, ``[N]``."""
    values = torch.zeros(objective.num_examples, dtype=objective.dtype, device=objective.device)
    start, done = 0, 0
    if (kept := run.load("self")) is not None:
        values.copy_(kept[0]["values"])
        start, done = int(kept[1]["batches"]), int(kept[1]["done"])
    last = time.monotonic()
    if done == len(values):
        return values
    gradients = FactoredGradients(objective, dense=one_by_one(inverses))
    for batch in gradients.passes("self-influence", start):
        for name, part in batch.blocks.items():
            found = inverses[name].self_scores(part)  # type: ignore[arg-type]
            values[batch.rows] -= found / objective.num_examples
        done += batch.size
        say("self-influence", done / len(values))
        if time.monotonic() - last >= SECONDS_BETWEEN_PIECES or done == len(values):
            run.keep("self", {"values": values}, {"batches": batch.index + 1, "done": done})
            last = time.monotonic()
    return values
