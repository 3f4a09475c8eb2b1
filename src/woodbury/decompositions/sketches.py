"""Random embeddings: short and wide operators that keep lengths nearly as they are."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from woodbury.errors import ArgumentError
from woodbury.operators.base import LinearOperator
from woodbury.operators.dense import Dense
from woodbury.operators.sparse import Sparse

__all__ = ["Hadamard", "SketchKind", "random_sketch"]

SketchKind = Literal["sparse_sign", "gaussian", "hadamard"]


def random_sketch(
    rows: int,
    columns: int,
    kind: SketchKind = "sparse_sign",
    *,
    nonzeros: int = 8,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> LinearOperator:
    r"""A random $S$ ``[s, m]`` with $E\,S^H S = I$, so that $\|S x\| \approx \|x\|$.

    ``"sparse_sign"``: every column has ``nonzeros`` entries $\pm 1/\sqrt{\zeta}$, one in each of as
    many bands of rows. ``"gaussian"``: independent normal entries of variance $1/s$, as good as a
    sketch can be, and dense. ``"hadamard"``: rows of a Walsh-Hadamard transform, drawn without
    replacement, after random signs (:class:`Hadamard`). On a subspace of dimension ``n`` lengths
    change by a factor of about $1 \pm \sqrt{n/s}$.

    Args:
        rows: $s$.
        columns: $m$.
        kind: which.
        nonzeros: $\zeta$ of the sparse one; at most ``rows``.
        dtype: of the entries, which are real.
        device: where they are.
        generator: draws them; the same ones every time if not given.

    Returns:
        An operator ``[s, m]``: :class:`~woodbury.Sparse`, :class:`~woodbury.Dense` or
        :class:`Hadamard`.

    Raises:
        ArgumentError: ``kind`` is unknown, or ``rows``, ``columns`` or ``nonzeros`` is less than 1.

    Cost: a product with one vector takes ``nonzeros m``, ``s m`` or ``m log m`` operations.

    Source: Nelson and Nguyen, "OSNAP: faster numerical linear algebra algorithms via sparser
    subspace embeddings" (2013), the block construction; Tropp, "Improved analysis of the subsampled
    randomized Hadamard transform" (2011).

    Example:
        >>> import torch
        >>> from woodbury.decompositions import random_sketch
        >>> S = random_sketch(64, 1000, nonzeros=4)
        >>> S.shape, round(float((S @ torch.ones(1000).double()).norm() / 1000**0.5), 1)
        ((64, 1000), 1.0)
    """
    for name, number in (("rows", rows), ("columns", columns), ("nonzeros", nonzeros)):
        if number < 1:
            raise ArgumentError(f"{name} is {number}; it must be at least 1")
    if kind not in get_args(SketchKind):
        raise ArgumentError(f"kind is {kind!r}; it must be one of {get_args(SketchKind)}")
    if generator is None:
        generator = torch.Generator(device).manual_seed(0)
    if kind == "gaussian":
        entries = torch.randn(rows, columns, dtype=dtype, device=device, generator=generator)
        return Dense(entries / math.sqrt(rows))
    if kind == "hadamard":
        padded = 1 << (columns - 1).bit_length()
        signs = _signs((columns,), dtype, device, generator)
        order = torch.randperm(padded, device=device, generator=generator)
        return Hadamard(signs, order[: min(rows, padded)])
    return _sparse_sign(rows, columns, min(nonzeros, rows), dtype, device, generator)


def _sparse_sign(
    rows: int,
    columns: int,
    nonzeros: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Sparse:
    edges = [rows * band // nonzeros for band in range(nonzeros + 1)]
    index = torch.stack(
        [
            torch.randint(low, high, (columns,), device=device, generator=generator)
            for low, high in pairwise(edges)
        ]
    )
    values = _signs((nonzeros, columns), dtype, device, generator) / math.sqrt(nonzeros)
    places = torch.arange(columns, device=device).expand(nonzeros, columns)
    where = torch.stack([index.flatten(), places.flatten()])
    matrix = torch.sparse_coo_tensor(
        where, values.flatten(), (rows, columns), check_invariants=False
    )
    return Sparse(matrix.coalesce())


def _signs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Tensor:
    coins = torch.randint(0, 2, shape, device=device, generator=generator)
    return (2 * coins - 1).to(dtype)


class Hadamard(LinearOperator):
    r"""$S = \sqrt{1/s}\;P\,H\,D$: signs, a Walsh-Hadamard transform, some of its rows.

    $H$ is the transform of size $p$, the next power of two, with entries $\pm 1$; vectors are
    padded with zeros.

    Args:
        signs: the diagonal of $D$, ``[m]``.
        rows: which rows of $H$ are kept, integers ``[s]``.

    Cost: a product is ``p log2(p)`` additions a column, memory of two padded blocks.

    Example:
        >>> import torch
        >>> from woodbury.decompositions import Hadamard
        >>> Hadamard(torch.ones(2), torch.tensor([0, 1])).to_dense() * 2**0.5
        tensor([[ 1.0000,  1.0000],
                [ 1.0000, -1.0000]])
    """

    _made_of = ("signs", "rows")

    def __init__(self, signs: Tensor, rows: Tensor) -> None:
        super().__init__((len(rows), len(signs)), dtype=signs.dtype, device=signs.device)
        self.signs, self.rows = signs, rows
        self.padded = 1 << max(0, len(signs) - 1).bit_length()

    def _matmat(self, X: Tensor) -> Tensor:
        full = X.new_zeros(self.padded, X.shape[1])
        full[: self.shape[1]] = X * self.signs.unsqueeze(1)
        return transformed(full)[self.rows] / math.sqrt(self.shape[0])

    def _rmatmat(self, Y: Tensor) -> Tensor:
        full = Y.new_zeros(self.padded, Y.shape[1]).index_add(0, self.rows, Y)
        inner = transformed(full)[: self.shape[1]] * self.signs.conj().unsqueeze(1)
        return inner / math.sqrt(self.shape[0])


def transformed(X: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the columns of ``[p, k]``, ``p`` a power of two."""
    p, k = X.shape
    half = 1
    while half < p:
        pairs = X.view(p // (2 * half), 2, half, k)
        X = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).view(p, k)
        half *= 2
    return X
