"""Which blocks the uses of a forward pass make, and the gradients of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from woodbury.curvature.layers.blocks import (
    Block,
    MatrixBlock,
    MatrixGradients,
    VectorBlock,
    VectorGradients,
    rows_of,
)
from woodbury.curvature.layers.references import Reference
from woodbury.curvature.layers.uses import Arrangement, MatrixUse, Piece, Use, VectorUse
from woodbury.spaces import Space

__all__ = ["Plan", "make_plan"]

_PROJECTIONS = ("q", "k", "v")

# Inputs of the layers of a batch by place in memory, kept while that is compared, and widened.
_Widened = dict[tuple[Any, ...], tuple[Tensor, Tensor]]


@dataclass
class Plan:
    """Blocks of the parameters, and which parameters have gradients of unknown form.

    Attributes:
        blocks: by name; every parameter that was used is in exactly one.
        dense: names of parameters whose gradients are taken one by one.
    """

    space: Space
    blocks: dict[str, Block]
    dense: tuple[str, ...]
    home: dict[Reference, str] = field(init=False)

    def __post_init__(self) -> None:
        pairs = [(ref, name) for name, block in self.blocks.items() for ref in block.references]
        self.home = dict(pairs)

    def knows(self, uses: Iterable[Use], other: Iterable[str]) -> bool:
        """Whether another forward pass uses parameters in the same ways."""
        if not set(other) <= set(self.dense):
            return False
        references = {ref for use in uses for ref in references_of(use)}
        return all(ref in self.home or ref.name in self.dense for ref in references)

    def relevant(self, uses: Iterable[Use]) -> list[Use]:
        """The uses of parameters that are not dense."""
        return [u for u in uses if any(r.name not in self.dense for r in references_of(u))]

    def gradients(
        self,
        uses: Sequence[Use],
        grads: Sequence[Tensor | None],
        arrangements: Sequence[Arrangement],
        size: int,
    ) -> dict[str, MatrixGradients | VectorGradients]:
        """Gradients per example of every block that is not dense."""
        terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
        widened: _Widened = {}
        vectors: dict[Reference, Tensor] = {}
        for use, grad, where in zip(uses, grads, arrangements, strict=True):
            if grad is None:
                continue
            if isinstance(use, VectorUse):
                for ref, value in use.terms(grad, where, size).items():
                    vectors[ref] = vectors[ref] + value if ref in vectors else value
            elif isinstance(use, MatrixUse):
                for name, term in self._terms(use, grad, where, size, widened):
                    terms.setdefault(name, []).append(term)
        result: dict[str, MatrixGradients | VectorGradients] = {}
        for name, block in self.blocks.items():
            if isinstance(block, MatrixBlock):
                if name in terms:
                    pairs = list(zip(*terms[name], strict=True))
                    a, g = (p[0] if len(p) == 1 else torch.cat(p, dim=1) for p in pairs)
                    result[name] = MatrixGradients(block, a, g)
            elif isinstance(block, VectorBlock) and block.parameters[0] not in self.dense:
                result[name] = self._vector(block, vectors, size, grads)
        return result

    def _vector(
        self,
        block: VectorBlock,
        vectors: Mapping[Reference, Tensor],
        size: int,
        grads: Sequence[Tensor | None],
    ) -> VectorGradients:
        like = next(g for g in grads if g is not None)
        parts = [
            vectors[ref]
            if ref in vectors
            else like.new_zeros(size, rows_of(self.space, ref).numel())
            for ref in block.parts
        ]
        return VectorGradients(block, torch.cat(parts, dim=1))

    def _terms(
        self,
        use: MatrixUse,
        grad: Tensor,
        where: Arrangement,
        size: int,
        widened: _Widened,
    ) -> Iterable[tuple[str, tuple[Tensor, Tensor]]]:
        """``(block, (inputs, grads))`` of every piece."""
        lead = use.leading(grad)
        mask = use.mask()
        if mask is not None:
            lead = lead * mask.unsqueeze(-1)
        lead = _positions(lead, where, size)
        for piece in use.pieces:
            g = lead[..., piece.outputs]
            if piece.weight is not None and piece.weight.name not in self.dense:
                name = self.home[piece.weight]
                block = self.blocks[name]
                assert isinstance(block, MatrixBlock)  # weights are in no other
                x = use.inputs(piece)
                a = (
                    _positions(x.unsqueeze(-1), where, size).squeeze(-1)
                    if use.one_hot
                    else (_positions(x, where, size))
                )
                yield name, _oriented(use, piece, block, a, g, widened)
            bias = piece.bias
            if bias is None or bias.name in self.dense:
                continue
            own = self.blocks[self.home[bias]]
            if isinstance(own, MatrixBlock) and own.weight is None:
                yield own.name, (g.new_ones(*g.shape[:-1], 1), g)


def _positions(tensor: Tensor, where: Arrangement, size: int) -> Tensor:
    """``[size, t, k]`` from ``[*lead, k]``."""
    return where.front(tensor, size).reshape(size, -1, tensor.shape[-1])


def _oriented(
    use: MatrixUse, piece: Piece, block: MatrixBlock, a: Tensor, g: Tensor, widened: _Widened
) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients as the block has them."""
    if block.one_hot:
        return a, g
    if use.one_hot:
        turned = use.transposed != block.transposed
        a = F.one_hot(a, block.p if turned else block.m - len(block.biases)).to(g.dtype)
    if use.transposed != block.transposed:
        a, g = g, a
    if block.biases:
        a = _widen(a, [1.0 if bias == piece.bias else 0.0 for bias in block.biases], widened)
    return a, g


def _widen(a: Tensor, numbers: Sequence[float], widened: _Widened) -> Tensor:
    """``a`` with columns of these numbers behind it, once for layers with the same inputs."""
    key = (a.data_ptr(), a.shape, a.stride(), tuple(numbers))
    if key not in widened:
        columns = [torch.full_like(a[..., :1], number) for number in numbers]
        widened[key] = a, torch.cat([a, *columns], dim=-1)
    return widened[key][1]


def references_of(use: Use) -> list[Reference]:
    """All parts of parameters in a use."""
    if isinstance(use, VectorUse):
        return [ref for ref in (use.weight, use.bias) if ref is not None]
    assert isinstance(use, MatrixUse)  # there is no third kind
    return [ref for piece in use.pieces for ref in (piece.weight, piece.bias) if ref is not None]


def make_plan(
    uses: Sequence[Use], other: Iterable[str], space: Space, packed: Mapping[str, int]
) -> Plan:
    """The blocks that these uses make.

    Args:
        uses: of a forward pass.
        other: names of parameters whose gradients must be taken one by one.
        space: of the parameters.
        packed: parameters that hold the projections of attention.
    """
    dense = set(other) | _conflicts(uses)
    while True:
        blocks, more = _blocks(uses, dense, space, packed)
        if not more:
            break
        dense |= more
    order = {name: i for i, name in enumerate(space.shapes)}
    for name in dense:
        whole = Reference(name, 0, _rows(space, name))
        blocks.append(VectorBlock(name, (whole,)))
    first = {id(block): min((order[r.name], r.start) for r in block.references) for block in blocks}
    blocks.sort(key=lambda block: first[id(block)])
    return Plan(space, _named(blocks), tuple(sorted(dense, key=order.__getitem__)))


def _rows(space: Space, name: str) -> int:
    shape = space.shapes[name]
    return shape[0] if shape else 1


def _conflicts(uses: Sequence[Use]) -> set[str]:
    """Parameters used in several ways that do not go together."""
    roles: dict[str, set[str]] = {}
    parts: dict[str, set[Reference]] = {}
    for use in uses:
        for ref in references_of(use):
            parts.setdefault(ref.name, set()).add(ref)
            role = "vector"
            if isinstance(use, MatrixUse):
                weights = {piece.weight for piece in use.pieces}
                role = "weight" if ref in weights else "bias"
            roles.setdefault(ref.name, set()).add(role)
    mixed = {name for name, found in roles.items() if len(found) > 1}
    for name, found in parts.items():
        ordered = sorted(found)
        if any(b.start < a.stop for a, b in itertools.pairwise(ordered)):
            mixed.add(name)
    return mixed


def _blocks(
    uses: Sequence[Use], dense: set[str], space: Space, packed: Mapping[str, int]
) -> tuple[list[Block], set[str]]:
    """Blocks without the parameters in ``dense``, and parameters that should be in there, too."""
    matrix: dict[Reference, list[tuple[MatrixUse, Piece]]] = {}
    behind: dict[Reference, set[Reference | None]] = {}
    vectors: list[set[Reference]] = []
    for use in uses:
        if isinstance(use, MatrixUse):
            for piece in use.pieces:
                weight = piece.weight
                if weight is not None and weight.name not in dense:
                    matrix.setdefault(weight, []).append((use, piece))
                else:
                    weight = None
                if piece.bias is not None and piece.bias.name not in dense:
                    behind.setdefault(piece.bias, set()).add(weight)
        else:
            refs = {ref for ref in references_of(use) if ref.name not in dense}
            touching = [group for group in vectors if group & refs]
            vectors = [g for g in vectors if not g & refs] + [refs.union(*touching)]
    more: set[str] = set()
    blocks: list[Block] = []
    for weight, found in matrix.items():
        biases = [bias for bias, owners in behind.items() if owners == {weight}]
        block, wrong = _matrix_block(weight, found, biases, space, packed)
        more |= wrong
        blocks.append(block)
    for bias, owners in behind.items():
        if len(owners) > 1 or None in owners:
            blocks.append(MatrixBlock(bias.name, bias.stop - bias.start, 1, None, (bias,)))
    order = {name: i for i, name in enumerate(space.shapes)}
    for group in vectors:
        if group:
            parts = tuple(sorted(group, key=lambda ref: (order[ref.name], ref.start)))
            blocks.append(VectorBlock(_base(parts[0].name), parts))
    return blocks, more


def _matrix_block(
    weight: Reference,
    found: Sequence[tuple[MatrixUse, Piece]],
    biases: Sequence[Reference],
    space: Space,
    packed: Mapping[str, int],
) -> tuple[MatrixBlock, set[str]]:
    transposed = all(use.transposed for use, _ in found)
    one_hot = all(use.one_hot for use, _ in found)
    shape = rows_of(space, weight).shape
    rows, columns = shape[0], shape[1:].numel()
    p, m = (columns, rows) if transposed else (rows, columns)
    turned = [piece for use, piece in found if use.transposed != transposed]
    wrong = {weight.name} if any(piece.bias is not None for piece in turned) else set()
    name = _base(weight.name)
    whole = _rows(space, weight.name)
    if weight.name in packed:
        name = f"{name}.{_PROJECTIONS[weight.start // packed[weight.name]]}"
    elif weight.stop - weight.start < whole:
        name = f"{name}[{weight.start // (weight.stop - weight.start)}]"
    return MatrixBlock(name, p, m + len(biases), weight, tuple(biases), transposed, one_hot), wrong


def _base(name: str) -> str:
    """The name of the layer a parameter is in."""
    return name.rpartition(".")[0] or name


def _named(blocks: Sequence[Block]) -> dict[str, Block]:
    """By name; where two would have one name, by that of their first parameter."""
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block.name] = counts.get(block.name, 0) + 1
    result: dict[str, Block] = {}
    for block in blocks:
        name = block.name if counts[block.name] == 1 else block.references[0].name
        while name in result:
            name += "'"
        result[name] = type(block)(**{**vars(block), "name": name})
    return result
