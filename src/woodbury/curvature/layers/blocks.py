r"""Blocks of parameters, and gradients per example of one block.

A *matrix block* is a weight $W$ with the biases added to its outputs, laid out as one matrix
$[W, b]$ of shape ``[p, m]``. The gradient of one example is $\sum_t g_t a_t^T$ with inputs $a_t$
``[m]`` (a one behind them for each bias that was added) and output gradients $g_t$ ``[p]``. A
*vector block* is some parameters laid end to end, with gradients as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from woodbury.curvature.layers.references import Reference
from woodbury.curvature.products import turned
from woodbury.spaces import Space

__all__ = ["Block", "MatrixBlock", "MatrixGradients", "VectorBlock", "VectorGradients"]

# Gradients of matrix blocks are formed for so many bytes of examples at a time.
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Block:
    """Parameters that belong together.

    Attributes:
        name: of the layer, or of the parameter.
    """

    name: str

    @property
    def references(self) -> tuple[Reference, ...]:
        """The parts of parameters it is made of."""
        raise NotImplementedError

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return tuple(dict.fromkeys(reference.name for reference in self.references))

    def positions(self, space: Space) -> Tensor:
        """Where its entries are in a flat vector, ``[n]``."""
        raise NotImplementedError

    def size(self, space: Space) -> int:
        """Number of its entries ``n``."""
        raise NotImplementedError


@dataclass(frozen=True)
class VectorBlock(Block):
    """Some parameters, or rows of them, laid end to end.

    Attributes:
        name: of the layer, or of the parameter.
        parts: which parameters, and which rows of them.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import FactoredGradients
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
        >>> objective = Objective(model, "mse", (torch.randn(4, 3), torch.randn(4, 2)))
        >>> norm = FactoredGradients(objective).blocks["1"]
        >>> norm.parameters, norm.positions(objective.space)
        (('1.weight', '1.bias'), tensor([ 8,  9, 10, 11]))
    """

    parts: tuple[Reference, ...]

    @property
    def references(self) -> tuple[Reference, ...]:
        """The parts of parameters it is made of."""
        return self.parts

    def positions(self, space: Space) -> Tensor:
        """Where its entries are in a flat vector, ``[n]``."""
        return torch.cat([rows_of(space, part).reshape(-1) for part in self.parts])

    def size(self, space: Space) -> int:
        """Number of its entries."""
        return sum(rows_of(space, part).numel() for part in self.parts)


@dataclass(frozen=True)
class MatrixBlock(Block):
    """A weight and the biases behind it, as a matrix ``[p, m]``.

    Attributes:
        name: of the layer, or of the parameter.
        p: outputs.
        m: inputs, with one for each bias.
        weight: rows of the weight, or ``None`` where only biases are parameters.
        biases: rows of the biases, one column each behind those of the weight.
        transposed: whether the weight is stored as ``[in, out]``.
        one_hot: whether all inputs are one-hot vectors, given as indices.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import FactoredGradients
        >>> data = torch.randn(4, 3), torch.randn(4, 2)
        >>> objective = Objective(torch.nn.Linear(3, 2), "mse", data)
        >>> block = FactoredGradients(objective).blocks["weight"]
        >>> block.p, block.m  # the bias is the last column
        (2, 4)
        >>> block.positions(objective.space).view(2, 4)
        tensor([[0, 1, 2, 6],
                [3, 4, 5, 7]])
    """

    p: int
    m: int
    weight: Reference | None
    biases: tuple[Reference, ...] = ()
    transposed: bool = False
    one_hot: bool = False

    @property
    def references(self) -> tuple[Reference, ...]:
        """The parts of parameters it is made of."""
        return (*((self.weight,) if self.weight is not None else ()), *self.biases)

    def positions(self, space: Space) -> Tensor:
        """Where the entries of ``[p, m]``, row by row, are in a flat vector, ``[p m]``."""
        columns = []
        if self.weight is not None:
            weight = rows_of(space, self.weight)
            columns.append(weight.t() if self.transposed else weight.reshape(self.p, -1))
        columns += [rows_of(space, bias).reshape(self.p, 1) for bias in self.biases]
        return torch.cat(columns, dim=1).reshape(-1)

    def size(self, space: Space) -> int:
        """``p m``."""
        return self.p * self.m


def rows_of(space: Space, reference: Reference) -> Tensor:
    """Places of the entries of these rows in a flat vector, in the shape of the parameter."""
    start = 0
    for name, size in space.sizes.items():
        if name == reference.name:
            shape = space.shapes[name]
            places = torch.arange(start, start + size).view(shape)
            return places[reference.start : reference.stop] if shape else places
        start += size
    raise KeyError(reference.name)


class VectorGradients:
    """Gradients per example of a vector block.

    Attributes:
        block: whose gradients these are.
        values: ``[b, n]``.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import FactoredGradients
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
        >>> objective = Objective(model, "mse", (torch.randn(4, 3), torch.randn(4, 2)))
        >>> (batch,) = FactoredGradients(objective)
        >>> batch.blocks["1"].dense().shape
        torch.Size([4, 4])
    """

    def __init__(self, block: VectorBlock, values: Tensor) -> None:
        self.block, self.values = block, values

    def take(self, part: Tensor) -> VectorGradients:
        """Those of some of the examples."""
        return VectorGradients(self.block, self.values[part])

    def dense(self) -> Tensor:
        """The gradients ``[b, n]``."""
        return self.values

    def squared_norms(self) -> Tensor:
        """Of every example, ``[b]``."""
        return self.values.square().sum(1)

    def inner(self, U: Tensor) -> Tensor:
        """Inner products ``[q, b]`` with ``U [q, n]``."""
        return U @ self.values.T

    def total(self, weights: Tensor) -> Tensor:
        """``sum_i w_i g_i`` for ``weights [b]``: ``[n]``."""
        return weights @ self.values


class MatrixGradients:
    r"""Gradients $\sum_t g_t a_t^T$ per example of a matrix block, as their factors.

    Positions $t$ are places of a sequence, of an image, and the several uses of one weight.

    Attributes:
        block: whose gradients these are.
        inputs: $a$, ``[b, t, m]``; for one-hot inputs their indices ``[b, t]``.
        grads: $g$, ``[b, t, p]``.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import FactoredGradients
        >>> data = torch.randn(4, 3), torch.randn(4, 2)
        >>> (batch,) = FactoredGradients(Objective(torch.nn.Linear(3, 2), "mse", data))
        >>> layer = batch.blocks["weight"]
        >>> U = torch.randn(5, 2, 4)
        >>> torch.allclose(layer.inner(U), U.flatten(1) @ layer.dense().T, atol=1e-5)
        True
    """

    def __init__(self, block: MatrixBlock, inputs: Tensor, grads: Tensor) -> None:
        self.block, self.inputs, self.grads = block, inputs, grads

    def __len__(self) -> int:
        return len(self.grads)

    @property
    def one_hot(self) -> bool:
        """Whether ``inputs`` are indices."""
        return self.block.one_hot

    def take(self, part: Tensor) -> MatrixGradients:
        """Those of some of the examples."""
        return MatrixGradients(self.block, self.inputs[part], self.grads[part])

    def dense_inputs(self) -> Tensor:
        """The inputs ``[b, t, m]``, one-hot ones written out."""
        if not self.one_hot:
            return self.inputs
        return F.one_hot(self.inputs, self.block.m).to(self.grads.dtype)

    def dense(self) -> Tensor:
        """The gradients as rows ``[b, p m]``."""
        b, t, p = self.grads.shape
        m = self.block.m
        if self.one_hot:
            out = self.grads.new_zeros(b * m, p)
            places = self.inputs + m * torch.arange(b, device=out.device).unsqueeze(1)
            out.index_add_(0, places.reshape(-1), self.grads.reshape(b * t, p))
            return out.view(b, m, p).mT.reshape(b, p * m)
        if t == 1:
            return (self.grads.mT * self.inputs).view(b, p * m)
        return torch.bmm(self.grads.mT, self.inputs).view(b, p * m)

    def squared_norms(self) -> Tensor:
        """Of every example, ``[b]``, by the gradients or by products of positions."""
        g, a, t = self.grads, self.inputs, self.grads.shape[1]
        if self.one_hot or g.shape[2] * self.block.m < t * (g.shape[2] + self.block.m):
            return torch.cat([part.dense().square().sum(1) for part in self.chunks()])
        if t == 1:
            return g[:, 0].square().sum(1) * a[:, 0].square().sum(1)
        return (torch.bmm(g, g.mT) * torch.bmm(a, a.mT)).sum((1, 2))

    def chunks(self, nbytes: int = _CHUNK_BYTES) -> Sequence[MatrixGradients]:
        """These gradients in parts whose dense form takes at most so many bytes."""
        each = self.block.p * self.block.m * self.grads.element_size()
        step = max(1, nbytes // max(each, 1))
        if step >= len(self):
            return [self]
        pairs = zip(self.inputs.split(step), self.grads.split(step), strict=True)
        return [MatrixGradients(self.block, a, g) for a, g in pairs]

    def rotate(self, Q_S: Tensor | None, Q_A: Tensor | None) -> MatrixGradients:
        r"""The same in another basis: $Q_S^T (\sum_t g_t a_t^T) Q_A$; ``None`` is the identity."""
        grads = self.grads if Q_S is None else turned(self.grads, Q_S)
        if Q_A is None:
            return MatrixGradients(self.block, self.inputs, grads)
        if not self.one_hot:
            return MatrixGradients(self.block, turned(self.inputs, Q_A), grads)
        plain = MatrixBlock(**{**vars(self.block), "one_hot": False})
        return MatrixGradients(plain, Q_A[self.inputs], grads)

    def inner(self, U: Tensor) -> Tensor:
        """Inner products ``[q, b]`` with matrices ``U [q, p, m]``.

        The gradients are not formed where that is cheaper: for one matrix, or one position.
        """
        q, (b, t, p) = len(U), self.grads.shape
        if self.one_hot:
            return self._inner_one_hot(U)
        if q > 1 and t > 1:
            flat = U.reshape(q, -1)
            return torch.cat([flat @ part.dense().T for part in self.chunks()], dim=1)
        grads, inputs = self.grads.reshape(b * t, p), self.inputs.reshape(b * t, -1)
        rows = [torch.linalg.vecdot(grads @ matrix, inputs).view(b, t).sum(1) for matrix in U]
        return torch.stack(rows)

    def tokens(self, U: Tensor) -> Tensor:
        """The part ``g_t^T U a_t`` of every position in the inner products, ``[q, b, t]``."""
        if self.one_hot:
            return torch.stack([(self.grads * matrix.T[self.inputs]).sum(-1) for matrix in U])
        return torch.stack([torch.linalg.vecdot(self.grads @ M, self.inputs) for M in U])

    def total(self, weights: Tensor) -> Tensor:
        """``sum_i w_i D_i`` for ``weights [b]``, flat ``[p m]``."""
        grads = (self.grads * weights.view(-1, 1, 1)).flatten(0, 1)
        if self.one_hot:
            out = grads.new_zeros(self.block.m, self.block.p)
            return out.index_add_(0, self.inputs.reshape(-1), grads).T.reshape(-1)
        return (grads.T @ self.inputs.flatten(0, 1)).reshape(-1)

    def _inner_one_hot(self, U: Tensor) -> Tensor:
        return self.tokens(U).sum(-1)
