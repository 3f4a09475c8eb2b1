"""Scores layer by layer, for inverses in an eigenbasis of Kronecker form."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.curvature import FactoredGradients, Objective
from woodbury.curvature.layers import MatrixGradients, VectorGradients
from woodbury.errors import DataError
from woodbury.influence.eigenbasis import (
    EigenBlock,
    MatrixQueries,
    Spectrum,
    VectorInverse,
    VectorQueries,
)
from woodbury.influence.kronecker import one_by_one
from woodbury.influence.pairwise import SECONDS_BETWEEN_PIECES, Say
from woodbury.influence.runs import Run
from woodbury.influence.truncation import Draw, Truncation, allocate, heaviest

__all__ = ["Inverses", "Layered", "Queries", "layered_self_scores", "rows_of_data"]

Gradients = MatrixGradients | VectorGradients
Inverses = Mapping[str, EigenBlock | VectorInverse]
Prepared = dict[str, MatrixQueries | VectorQueries]


class Queries(Protocol):
    """Queries of one block, ready to be scored against the gradients of training examples."""

    def __len__(self) -> int: ...

    def scores(self, gradients: Any, /) -> Tensor:
        """``[Q, b]``."""
        ...


# Terms of a first look, and the part of the tolerance that is aimed at: what is measured in the end
# is an upper limit.
_ROUGH, _AIM = 12, 0.5
_PILOT = 1024
_ATTEMPTS = 4


def take(gradients: Gradients, part: Tensor) -> Gradients:
    """The gradients of some of the examples."""
    if isinstance(gradients, VectorGradients):
        return VectorGradients(gradients.block, gradients.values[part])
    return MatrixGradients(gradients.block, gradients.inputs[part], gradients.grads[part])


def _of_one_shape(pieces: Sequence[Gradients]) -> bool:
    vectors = isinstance(pieces[0], VectorGradients)
    return vectors or len({piece.grads.shape[1] for piece in pieces}) == 1  # type: ignore[union-attr]


def joined(pieces: Sequence[Gradients]) -> Gradients:
    first = pieces[0]
    if isinstance(first, VectorGradients):
        return VectorGradients(first.block, torch.cat([p.values for p in pieces]))  # type: ignore[union-attr]
    inputs, grads = zip(*((p.inputs, p.grads) for p in pieces), strict=True)  # type: ignore[union-attr]
    return MatrixGradients(first.block, torch.cat(inputs), torch.cat(grads))


def norms_squared(gradients: Gradients) -> Tensor:
    """Squared norms of the gradients of every example, ``[b]``."""
    if isinstance(gradients, VectorGradients):
        return gradients.values.square().sum(1)
    g, t = gradients.grads, gradients.grads.shape[1]
    if gradients.one_hot or g.shape[2] * gradients.block.m < t * (g.shape[2] + gradients.block.m):
        return torch.cat([part.dense().square().sum(1) for part in gradients.chunks()])
    a = gradients.inputs
    if t == 1:
        return g[:, 0].square().sum(1) * a[:, 0].square().sum(1)
    return (torch.bmm(g, g.mT) * torch.bmm(a, a.mT)).sum((1, 2))


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
        self.names = tuple(inverses) if parts else ()
        self.norms = torch.zeros(len(rows), dtype=objective.dtype, device=objective.device)

    def scores(self, asked: Objective) -> tuple[Tensor, Tensor | None, Truncation | None]:
        """Scores ``[Q, N]``, parts ``[M, Q, N]``, and what the separable form cost."""
        places, groups = self._prepare(asked)
        tolerance = self.tolerance
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            terms = self._choose_terms(groups, 0.0 if last else tolerance)
            values, parts = self._pass(groups, f"scores-{attempt}")
            truncation = self._refine(groups, values, parts, terms) if terms else None
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
        }

    def errors(self, queries: int, truncation: Truncation | None) -> Tensor | None:
        """What times ``norms`` bounds the error of every score, ``[Q]``, if anything does."""
        return torch.zeros(queries, dtype=torch.float64) if truncation is None else None

    # -------------------------------------------------------------- queries

    def _prepare(self, asked: Objective) -> tuple[list[Tensor], list[Prepared]]:
        places, groups = [], []
        for batch in FactoredGradients(asked, dense=self.factored.dense).passes("queries"):
            prepared: Prepared = {}
            for name, gradients in batch.blocks.items():
                prepared[name] = self._queries(name, gradients)
            places.append(batch.rows)
            groups.append(prepared)
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

    def _choose_terms(self, groups: Sequence[Prepared], tolerance: float) -> dict[str, int]:
        """Give every block as many terms as the tolerance needs on a few training examples.

        The heaviest pairs do not count, because :meth:`_refine` will compute such ones exactly.
        """
        for group in groups:
            for query in group.values():
                query.forget_terms()
        if tolerance <= 0 or len(groups) != 1:
            return {}  # several batches of queries may be of several shapes: exact
        spectra: dict[str, Spectrum] = {}
        for name, query in groups[0].items():
            found = query.decompose() if isinstance(query, MatrixQueries) else None
            if found is not None and len(found.values):
                spectra[name] = found
        if not spectra:
            return {}  # as of sequences: nothing is to be tried on training examples
        batch = self._pilot()
        for name in list(spectra):
            query, gradients = groups[0][name], batch.get(name)
            if isinstance(gradients, MatrixGradients) and gradients.grads.shape[1] == 1:
                assert isinstance(query, MatrixQueries)  # it has a spectrum
                query.use_terms(spectra[name], min(_ROUGH, len(spectra[name].values)))
            else:
                del spectra[name]
        rough = _total(_each(groups[0], batch)) if spectra else self.norms.new_zeros(1, 1)
        heavy = heaviest(rough)
        draw = Draw.of(rough, heavy)
        if draw is None:
            return {}
        pilot = {name: take(gradients, draw.unique) for name, gradients in batch.items()}
        found_in = ((name, query) for name, query in groups[0].items() if name in pilot)
        exact = {name: query.exact(pilot[name]) for name, query in found_in}  # type: ignore[arg-type]
        weights = draw.weights().repeat(len(rough), 1)
        weights[heavy[0][:, None], torch.isin(draw.unique, heavy[1]).nonzero().squeeze(1)] = 0
        allowed = (_AIM * tolerance) ** 2 * draw.total
        errors, costs = {}, {}
        for name, found in spectra.items():
            query, sample = groups[0][name], pilot[name]
            assert isinstance(query, MatrixQueries)  # it has a spectrum
            assert isinstance(sample, MatrixGradients)
            errors[name] = query.errors(found, sample, exact[name], weights)
            costs[name] = len(found.left) + len(found.right)
        terms = allocate(errors, costs, allowed)
        for name, query in groups[0].items():
            query.forget_terms()
            if name in terms and query.pays(terms[name]):
                assert isinstance(query, MatrixQueries)  # it has a spectrum
                query.use_terms(spectra[name], terms[name])
        return {name: count for name, count in terms.items() if groups[0][name].pays(count)}

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
        return {name: joined(pieces) for name, pieces in found.items() if _of_one_shape(pieces)}

    # ----------------------------------------------------------------- pass

    def _pass(
        self, groups: Sequence[Mapping[str, Queries]], name: str
    ) -> tuple[Tensor, Tensor | None]:
        count = sum(_width(group) for group in groups)
        values = self.norms.new_zeros(count, len(self.rows))
        parts = self.norms.new_zeros(len(self.names), count, len(self.rows))
        start, done = self._restored(name, values, parts)
        last = time.monotonic()
        factor = -1 / self.objective.num_examples
        for batch in self.factored.passes("scores", start):
            wanted = torch.isin(batch.rows, self.rows)
            blocks = batch.blocks
            if not bool(wanted.all()):
                index = wanted.nonzero().squeeze(1)
                blocks = {key: take(gradients, index) for key, gradients in blocks.items()}
            columns = torch.searchsorted(self.rows, batch.rows[wanted])
            if len(columns):
                found = [_each(group, blocks) for group in groups]
                values[:, columns] = factor * torch.cat([_total(one) for one in found])
                for part, key in zip(parts, self.names, strict=True):
                    piece = [one.get(key, torch.zeros_like(_total(one))) for one in found]
                    part[:, columns] = factor * torch.cat(piece)
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
        return torch.stack([norms_squared(part) for part in blocks.values()]).sum(0).sqrt()

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
        terms: Mapping[str, int],
    ) -> Truncation:
        """Exact scores of the heaviest pairs, in place, and of some others for the error."""
        heavy = queries, columns = heaviest(values)
        draw = Draw.of(values, heavy)
        if draw is None:
            return Truncation(0.0, 0.0, 0, terms)
        everything = torch.arange(len(values), device=values.device)
        (group,) = groups  # several have no terms
        for part, places in ((queries, columns), (everything, draw.unique)):
            few = {name: query.take(part) for name, query in group.items()}
            exact, pieces = self._exact(few, places)
            if part is everything:
                truncation = draw.truncation(exact, values[:, places], terms)
            values[part[:, None], places] = exact
            if parts is not None:
                parts[:, part[:, None], places] = pieces
        return truncation

    def _exact(self, group: Mapping[str, Queries], columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of some columns, ascending: ``[Q, u]``, and of the blocks ``[M, Q, u]``.

        Exact, of queries that take no terms.
        """
        wanted, count = self.rows[columns], _width(group)
        exact = self.norms.new_zeros(count, len(wanted))
        parts = self.norms.new_zeros(len(self.names), count, len(wanted))
        subset = rows_of_data(self.objective, wanted)
        order = torch.cat([rows for rows, _ in subset])
        few = self.objective.with_data([data for _, data in subset])
        column, factor = 0, -1 / self.objective.num_examples
        for batch in FactoredGradients(few, dense=self.factored.dense).passes("exact scores"):
            found = _each(group, batch.blocks)
            places = torch.searchsorted(wanted, order[column : column + batch.size])
            exact[:, places] = factor * _total(found)
            for part, key in zip(parts, self.names, strict=True):
                if key in found:
                    part[:, places] = factor * found[key]
            column += batch.size
        return exact, parts


def _sizes(places: Sequence[Tensor]) -> list[int]:
    return [len(part) for part in places]


def _width(group: Mapping[str, Queries]) -> int:
    return len(next(iter(group.values())))


def _each(group: Mapping[str, Queries], blocks: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """Scores of every block that the queries and the examples share, ``[Q, b]``."""
    found = {}
    for name, query in group.items():
        if name in blocks:
            found[name] = query.scores(blocks[name])
    if not found:
        raise DataError("the queries and the training data use no parameter in common")
    return found


def _total(found: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(found.values())).sum(0)


def rows_of_data(objective: Objective, wanted: Tensor) -> list[tuple[Tensor, object]]:
    """Places and data of some rows, batch by batch, in the form that the batches have."""
    found: list[tuple[Tensor, object]] = []
    for batch in objective.batches("chosen rows"):
        places = batch.places().to(wanted.device)
        index = torch.isin(places, wanted).nonzero().squeeze(1)
        if not len(index):
            continue
        leaves, structure = tree_flatten(batch.data)
        parts = [
            leaf[index.to(leaf.device)]
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch.size
            else leaf
            for leaf in leaves
        ]
        found.append((places[index], tree_unflatten(parts, structure)))
    return found


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
