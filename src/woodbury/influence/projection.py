r"""Gradients per example of layers, made shorter without being formed.

A row of a store is the piece of every block, end to end. With $D = \sum_t g_t a_t^T$ of a layer
a piece is $P_S D P_A^T = \sum_t (P_S g_t)(P_A a_t)^T$, from projected factors. In the eigenbasis
it is whitened by the inverse, so that scores are plain products of rows, and what is dropped is
known: the squares that are left out of $\|D\|^2_{A^{-1}}$ are summed where they are at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.curvature import KFAC, FactoredBatch
from woodbury.curvature.damping import Damping
from woodbury.curvature.layers import Block, MatrixBlock, MatrixGradients, VectorGradients
from woodbury.errors import ArgumentError, DataError, NonFiniteError
from woodbury.influence.eigenbasis import EigenBlock
from woodbury.influence.kronecker import layer_inverses
from woodbury.operators import Dense, Eigendecomposed
from woodbury.spaces import Space

__all__ = [
    "BlockProjection",
    "EigenProjection",
    "Eigenbasis",
    "RandomBasis",
    "RandomProjection",
    "digest_of",
    "eigen_projections",
    "random_projections",
    "row_of",
]

Gradients = MatrixGradients | VectorGradients


@dataclass(frozen=True)
class EigenProjection:
    r"""Keep the leading directions of EK-FAC's eigenbasis, for :class:`GradientStore`.

    Of every layer the rows and columns with the largest sums of $\lambda_{jk}/(\lambda_{jk}+\rho)$
    are kept: the share of a score that they carry where queries are like the training data.

    Args:
        outputs: directions kept on the side of the outputs of a layer; all where it has no more.
        inputs: on the side of its inputs.
        vector: of a block without Kronecker form (norms, scales).

    Raises:
        ArgumentError: a size that is not positive.

    Example:
        >>> from woodbury.influence import EigenProjection
        >>> EigenProjection(32, 32)
        EigenProjection(outputs=32, inputs=32, vector=1024)
    """

    outputs: int = 64
    inputs: int = 64
    vector: int = 1024

    def __post_init__(self) -> None:
        _require_sizes(self.outputs, self.inputs, self.vector)


@dataclass(frozen=True)
class RandomProjection:
    r"""Gaussian projections of both sides of a layer (LoGra), for :class:`GradientStore`.

    $P_S$ has entries $\mathcal N(0, 1/k_S)$ and $P_A$ $\mathcal N(0, 1/k_A)$, drawn from the seed
    and the name of the layer; a side that has no more than so many directions is kept as it is.
    Blocks without Kronecker form get one projection.

    Args:
        outputs: $k_S$.
        inputs: $k_A$.
        vector: directions of a block without Kronecker form.
        seed: of the projections.

    Raises:
        ArgumentError: a size that is not positive.

    Example:
        >>> from woodbury.influence import RandomProjection
        >>> RandomProjection(16, 16, seed=1)
        RandomProjection(outputs=16, inputs=16, vector=256, seed=1)
    """

    outputs: int = 16
    inputs: int = 16
    vector: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        _require_sizes(self.outputs, self.inputs, self.vector)


def _require_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise ArgumentError(f"a projection has the sizes {sizes}; each must be positive")


class BlockProjection:
    """How the gradients of one block become a piece of a row."""

    @property
    def size(self) -> int:
        """Numbers that are kept of an example."""
        raise NotImplementedError

    @property
    def doubt(self) -> float:
        """Relative standard error of products of pieces; 0 where nothing is drawn."""
        return 0.0

    def project(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Pieces ``[b, size]``, and the norm of what was dropped where it is known, ``[b]``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Eigenbasis(BlockProjection):
    r"""Kept directions of the eigenbasis of a block, whitened by its inverse.

    Attributes:
        left: $Q_S$ ``[p, p]``, or the eigenvectors of a vector block ``[n, n]``; ``None`` for the
            identity.
        right: $Q_A$ ``[m, m]``, likewise.
        inverse: $W$, ``[p, m]`` or ``[n]``.
        rows: kept rows of $W$, ascending.
        columns: kept columns of $W$; ``None`` for a vector block.
    """

    left: Tensor | None
    right: Tensor | None
    inverse: Tensor
    rows: Tensor
    columns: Tensor | None

    @property
    def size(self) -> int:
        """Kept entries of the inverse."""
        return len(self.rows) * (1 if self.columns is None else len(self.columns))

    def project(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Whitened pieces, and what the dropped directions hold in the norm of the inverse."""
        if isinstance(gradients, VectorGradients):
            v = gradients.values if self.left is None else gradients.values @ self.left
            squares = v.square() * self._left_out()
            return v[:, self.rows] * self.inverse[self.rows].sqrt(), squares.sum(1).sqrt()
        assert self.columns is not None  # of a matrix block
        rotated = gradients.rotate(self.left, self.right)
        a, g = rotated.dense_inputs(), rotated.grads
        root = self.inverse[self.rows][:, self.columns].sqrt()
        kept = torch.bmm(g[:, :, self.rows].mT, a[:, :, self.columns]) * root
        if self.size == self.inverse.numel():
            return kept.flatten(1), kept.new_zeros(len(kept))
        p, m = self.inverse.shape
        block = MatrixBlock(gradients.block.name, p=p, m=m, weight=None)
        rest = EigenBlock(block, None, None, self._left_out(), self.inverse)
        squares = rest.self_scores(MatrixGradients(block, a, g))
        return kept.flatten(1), squares.clamp(min=0).sqrt()

    def _left_out(self) -> Tensor:
        """The inverse with zeros at what is kept: what is left out is summed without a loss."""
        found = self.inverse.clone()
        if self.columns is None:
            found[self.rows] = 0
        else:
            found[self.rows[:, None], self.columns] = 0
        return found


@dataclass(frozen=True, eq=False)
class RandomBasis(BlockProjection):
    """Random projections of a block; ``None`` keeps a side as it is.

    Attributes:
        left: $P_S^T$ ``[p, k]``, or of a vector block ``[n, k]``.
        right: $P_A^T$ ``[m, k]``.
        shape: of a piece before it is laid flat.
    """

    left: Tensor | None
    right: Tensor | None
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Numbers that are kept of an example."""
        return self.shape[0] * self.shape[1]

    @property
    def doubt(self) -> float:
        r"""$\sqrt{(1 + 2/k_S)(1 + 2/k_A) - 1}$, without the sides that are kept."""
        found = 1.0
        for side in (self.left, self.right):
            found *= 1.0 if side is None else 1 + 2 / side.shape[1]
        return (found - 1) ** 0.5

    def project(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Projected pieces; what the projection does not see is not known, and 0 is said."""
        if isinstance(gradients, VectorGradients):
            values = gradients.values
            found = values if self.left is None else values @ self.left
        elif gradients.one_hot and self.right is None:
            D = gradients.dense().view(len(gradients), gradients.block.p, -1)
            found = (D if self.left is None else self.left.T @ D).flatten(1)
        else:
            rotated = gradients.rotate(self.left, self.right)
            found = torch.bmm(rotated.grads.mT, rotated.dense_inputs()).flatten(1)
        return found, found.new_zeros(len(found))


def eigen_projections(
    matrix: KFAC, damping: Damping, sizes: EigenProjection
) -> dict[str, Eigenbasis]:
    """The kept eigenbasis of every block of a matrix with damping.

    Raises:
        SingularError: an eigenvalue is not positive.
    """
    damped = matrix.damped(damping)
    found = {}
    for name, inverse in layer_inverses(matrix, damped).items():
        if isinstance(inverse, EigenBlock):
            share = inverse.moments.clamp(min=0) * inverse.inverse
            rows = _leading(share.sum(1), sizes.outputs)
            columns = _leading(share.sum(0), sizes.inputs)
            found[name] = Eigenbasis(inverse.left, inverse.right, inverse.inverse, rows, columns)
            continue
        plain, block = matrix.blocks[name], damped.blocks[name]
        assert isinstance(plain, Eigendecomposed)  # seen by layer_inverses
        assert isinstance(block, Eigendecomposed)
        diagonal = block.values.reciprocal()
        vectors = block.basis.matrix if isinstance(block.basis, Dense) else None
        rows = _leading(plain.values.clamp(min=0) * diagonal, sizes.vector)
        found[name] = Eigenbasis(vectors, None, diagonal, rows, None)
    return found


def _leading(shares: Tensor, count: int) -> Tensor:
    return shares.topk(min(count, len(shares))).indices.sort().values


def random_projections(
    blocks: Mapping[str, Block], sizes: RandomProjection, space: Space, like: Tensor
) -> dict[str, RandomBasis]:
    """Projections of every block, of the dtype and on the device of ``like``."""
    found = {}
    for name, block in blocks.items():
        digest = hashlib.sha256(f"{sizes.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if isinstance(block, MatrixBlock):
            p, m = block.p, block.m
            left = _gaussian(p, sizes.outputs, generator, like)
            right = _gaussian(m, sizes.inputs, generator, like)
            shape = min(p, sizes.outputs), min(m, sizes.inputs)
        else:
            n = block.size(space)
            left, right = _gaussian(n, sizes.vector, generator, like), None
            shape = min(n, sizes.vector), 1
        found[name] = RandomBasis(left, right, shape)
    return found


def _gaussian(size: int, kept: int, generator: torch.Generator, like: Tensor) -> Tensor | None:
    if kept >= size:
        return None
    drawn = torch.randn(size, kept, generator=generator, dtype=torch.float64) / kept**0.5
    return drawn.to(like)


def row_of(
    projections: Mapping[str, BlockProjection], batch: FactoredBatch
) -> tuple[Tensor, Tensor]:
    """Rows ``[b, K]`` and the norms of what was dropped ``[b, L]`` of a batch.

    Raises:
        DataError: the batch uses a block that has no projection.
        NonFiniteError: a row is NaN or infinite.
    """
    strange = sorted(set(batch.blocks) - set(projections))
    if strange or not batch.blocks:
        raise DataError(
            f"the blocks {strange} of parameters are used here and not in the data of the store; "
            "measure the same outputs of the same model"
        )
    one = next(iter(batch.blocks.values()))
    like = one.values if isinstance(one, VectorGradients) else one.grads
    pieces, dropped = [], []
    for name, projection in projections.items():
        piece, rest = like.new_zeros(len(like), projection.size), like.new_zeros(len(like))
        if name in batch.blocks:
            piece, rest = projection.project(batch.blocks[name])
        pieces.append(piece)
        dropped.append(rest)
    values = torch.cat(pieces, 1)
    _require_finite(values, batch.rows)
    return values, torch.stack(dropped, 1)


def _require_finite(values: Tensor, rows: Tensor) -> None:
    finite = torch.isfinite(values).all(1)
    if not bool(finite.all()):
        bad = rows[~finite].tolist()
        raise NonFiniteError(
            f"the gradients of {len(bad)} examples hold NaN or infinity (rows "
            f"{', '.join(map(str, bad[:8]))}); look at these rows, or leave them out"
        )


def digest_of(matrix: KFAC) -> str:
    """A hash of what a matrix is made of."""
    found = hashlib.sha256(type(matrix).__name__.encode())
    probe = torch.linspace(-1, 1, matrix.shape[0], dtype=torch.float64).to(
        matrix.device, matrix.dtype
    )
    for part in (matrix.diagonal(), matrix @ probe):
        found.update(part.detach().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
