r"""A faster Jacobian for networks whose parameters enter through linear layers.

Let $y_l = W_l x_l + b_l$ be the layers, $z$ the outputs ``[C]`` of one example. For every layer
that is far from a narrow output, the signals $B_l = \partial z / \partial y_l$, ``[C, out]``, are
kept, and

$$ J v = \sum_l B_l (V_l x_l + v_l), \qquad J^T u = (B_l^T u\, x_l^T,\; B_l^T u)_l : $$

no pass through the weights is needed, which spares half of the multiplications of all but the first
and last layers. Layers close to the outputs go through the graph behind them instead, which is
cheaper there.

Which parameters enter where is seen by watching the calls of ``linear``. Whether that was all, and
whether examples are independent of one another, is *verified* against automatic differentiation in
a random direction, every time signals are made; where it fails there are no signals, and
:class:`~woodbury.curvature.graphs.GraphJacobian` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from woodbury.curvature.graphs import JacobianLinearized, Layout, Room
from woodbury.curvature.losses import Product
from woodbury.curvature.memory import graph_bytes, storage_bytes

__all__ = ["SignalJacobian", "make_signals"]

# A multiplication with a signal is bound by memory, and about this many times slower than one in a
# product of matrices (measured: 12 against 160 GFLOP/s on one core).
_SLOWNESS = 16
# Columns of a block are taken together while their intermediate tensors stay below this: within the
# cache, or beyond it where many signals are to be read, once for all of these columns.
_CACHE_BYTES, _BLOCK_BYTES = 2**20, 16 * 2**20
_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-9}


@dataclass
class Layer:
    """One call of ``linear``: inputs as rows ``[B * T, in]``, outputs ``[B, ..., out]``."""

    x: Tensor
    weight: int | None
    bias: int | None
    shape: torch.Size
    edge: Any  # into the graph at its outputs; None once that is of no use
    following: int = 0  # outputs of the next layer, whoever's it is
    is_output: bool = False
    signal: Tensor | None = None

    @property
    def out(self) -> int:
        """Outputs of the layer."""
        return self.shape[-1]

    @property
    def width(self) -> int:
        """Outputs of the layer for one example: ``T * out``."""
        return self.shape[1:].numel()


class _Watch(TorchFunctionMode):
    """Sees every call of ``linear`` with one of our parameters."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.place = {id(leaf): i for i, leaf in enumerate(leaves)}
        self.layers: list[Layer] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False), **(kwargs or {}))
            self._note(result, given["input"], given["weight"], given.get("bias"))
        return result

    def _note(self, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if self.layers and not self.layers[-1].following:
            self.layers[-1].following = result.shape[-1]
        slots = self.place.get(id(weight)), self.place.get(id(bias))
        if slots == (None, None) or x.dim() < 2:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        # The edge, not the tensor: an operation in place behind the layer would change the tensor.
        edge = get_gradient_edge(result)
        self.layers.append(Layer(rows, slots[0], slots[1], result.shape, edge))


def make_signals(
    evaluate: Callable[[dict[str, Tensor]], Tensor],
    leaves: dict[str, Tensor],
    layout: Layout,
    make_middle: Callable[[Tensor], Product],
    resident: Sequence[Tensor],
    room: Room,
) -> SignalJacobian | None:
    """The Jacobian of a batch by signals, or ``None`` where that is not possible or not better."""
    values = list(leaves.values())
    if values[0].dtype not in _AGREEMENT:
        return None
    with _Watch(values) as watch:
        z = evaluate(leaves)
    layers = watch.layers
    if not layers or not z.requires_grad or any(layer.shape[0] != len(z) for layer in layers):
        return None
    outputs = z[0].numel()
    layers[-1].is_output = get_gradient_edge(z) == layers[-1].edge
    chosen = _worthwhile(layers, outputs, len(z))
    needed = sum(len(z) * outputs * layer.width for layer in chosen) * z.element_size()
    held = storage_bytes(layer.x for layer in layers)
    # Signals that outweigh the inputs of their layers must not cost other batches their place.
    if needed > room.left or (needed > held and needed + held > room.share):
        return None
    if not (chosen or all(layer.is_output for layer in layers)):
        return None
    _fill(z, chosen, outputs)
    result = SignalJacobian(z, layers, layout, make_middle(z.detach()))
    if not _agrees(result, z, values):
        return None
    result.close(z, resident)
    return result


def _worthwhile(layers: list[Layer], outputs: int, size: int) -> list[Layer]:
    """The layers whose signals cost less than the way through the layers behind them."""
    chosen = []
    for layer in layers:
        small = outputs * layer.width * size <= layer.x.numel()
        if not layer.is_output and (_SLOWNESS * outputs <= layer.following or small):
            chosen.append(layer)
    return chosen


def _fill(z: Tensor, chosen: list[Layer], outputs: int) -> None:
    """Backpropagate each output once."""
    if not chosen:
        return
    size = len(z)
    for layer in chosen:
        layer.signal = z.new_empty(size, outputs, layer.width)
    unit = torch.zeros_like(z).view(size, outputs)
    for c in range(outputs):
        unit.zero_()[:, c] = 1
        edges = [layer.edge for layer in chosen]
        parts: Sequence[Tensor | None] = torch.autograd.grad(
            z, edges, unit.view_as(z), retain_graph=True, allow_unused=True
        )
        for layer, part in zip(chosen, parts, strict=True):
            assert layer.signal is not None  # made above
            if part is None:
                layer.signal[:, c] = 0
            else:
                layer.signal[:, c] = part.reshape(size, -1)


def _agrees(signals: SignalJacobian, z: Tensor, values: Sequence[Tensor]) -> bool:
    """Whether ``J^T u`` is what automatic differentiation says, for a random ``u``."""
    generator = torch.Generator(z.device).manual_seed(0)
    u = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
    truth: Sequence[Tensor | None] = torch.autograd.grad(
        z, values, u, retain_graph=True, allow_unused=True
    )
    row = torch.zeros(1, sum(value.numel() for value in values), dtype=z.dtype, device=z.device)
    signals.vjp(u[None], row, add=False)
    for i, (mine, true) in enumerate(zip(signals.layout.views(row[0]), truth, strict=True)):
        if true is None and i in signals.slots:
            return False
        true = torch.zeros_like(mine) if true is None else true
        scale = _AGREEMENT[z.dtype] * true.norm()
        if not (mine - true).norm() <= scale:
            return False
    return True


class SignalJacobian(JacobianLinearized):
    """Outputs of a batch to first order by layer inputs and signals; see the top of this module."""

    def __init__(self, z: Tensor, layers: list[Layer], layout: Layout, middle: Product) -> None:
        self.layers, self.layout, self.middle = layers, layout, middle
        self.shape = z.shape
        self.outputs = z[0].numel()
        places = [(layer.weight, layer.bias) for layer in layers]
        self.slots = {slot for pair in places for slot in pair if slot is not None}
        self.used = frozenset(layout.names[slot] for slot in self.slots)
        # Layers without signal go through the graph from their outputs to z.
        self.behind = [ly for ly in layers if ly.signal is None and not ly.is_output]
        self.edges = [layer.edge for layer in self.behind]
        self.output = z if self.behind else None
        self.pulled: list[GradientEdge] = []
        widest = max(layer.width for layer in layers) * len(z) * z.element_size()
        self.step = max(1, (_BLOCK_BYTES if self.outputs > 2 else _CACHE_BYTES) // widest)

    def close(self, z: Tensor, resident: Sequence[Tensor]) -> None:
        """Keep only what products need, and measure it."""
        roots: list[Tensor] = []
        if self.behind:
            self.dummy = torch.zeros_like(z).requires_grad_()
            roots = list(torch.autograd.grad(z, self.edges, self.dummy, create_graph=True))
            self.pulled = [get_gradient_edge(root) for root in roots]
        for layer in self.layers:
            layer.edge = None  # or the graph would live on
        held = [layer.x for layer in self.layers]
        held += [layer.signal for layer in self.layers if layer.signal is not None]
        self.nbytes = storage_bytes(held, resident)
        self.nbytes += graph_bytes([*roots, z][: 2 * len(roots)], [*resident, *held, *roots])

    def jvp(self, rows: Tensor) -> Tensor:
        """``J`` times every row of ``[k, n]``."""
        blocks = [self._forward(part) for part in rows.split(self.step)]
        result = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        return result.transpose(0, 1).reshape(len(rows), *self.shape)

    def _forward(self, rows: Tensor) -> Tensor:
        """``J`` times a block that is not too wide, ``[B, k, C]``."""
        size, k = self.shape[0], len(rows)
        result = rows.new_zeros(size, k, self.outputs)
        views = [self.layout.views(row) for row in rows]
        through: list[list[Tensor]] = [[] for _ in range(k)]
        for layer in self.layers:
            dy = rows.new_empty(size, k, layer.width)
            for j in range(k):
                _tangent(layer, views[j], dy[:, j])
            if layer.signal is not None:
                result += dy @ layer.signal.transpose(1, 2)
            elif layer.is_output:
                result += dy
            else:
                for j in range(k):
                    through[j].append(dy[:, j].reshape(layer.shape))
        for j in range(k if self.behind else 0):
            (part,) = torch.autograd.grad(
                self.pulled, [self.dummy], through[j], retain_graph=True, allow_unused=True
            )
            if part is not None:
                result[:, j] += part.view(size, -1)
        return result

    def vjp(self, U: Tensor, out: Tensor, *, add: bool) -> None:
        """``J^T`` times ``U``."""
        for u, target in zip(U.split(self.step), out.split(self.step), strict=True):
            self._backward(u, target, add=add)

    def _backward(self, U: Tensor, out: Tensor, *, add: bool) -> None:
        size, k = self.shape[0], len(U)
        views = [self.layout.views(row) for row in out]
        written = set(range(len(self.layout.sizes))) if add else set()
        through = [self._pull(u) for u in U]
        cotangent = U.reshape(k, size, -1).transpose(0, 1).contiguous()
        for layer in self.layers:
            if layer.signal is not None:
                # For one output, torch is slow to see that this is no product of matrices.
                one = self.outputs == 1
                dy = cotangent * layer.signal if one else cotangent @ layer.signal
            elif layer.is_output:
                dy = cotangent
            for j in range(k):
                behind = layer.signal is None and not layer.is_output
                delta = through[j].pop(0) if behind else dy[:, j]
                _cotangent(layer, delta.reshape(-1, layer.out), views[j], written)
            written |= {slot for slot in (layer.weight, layer.bias) if slot is not None}
        for slot in set(range(len(self.layout.sizes))) - written:
            for view in views:
                view[slot].zero_()

    def _pull(self, u: Tensor) -> list[Tensor]:
        if self.output is None:
            return []
        return list(torch.autograd.grad(self.output, self.edges, u, retain_graph=True))


def _tangent(layer: Layer, views: list[Tensor], dy: Tensor) -> None:
    """Write ``V x + v`` into ``dy [B, T * out]``."""
    weight = None if layer.weight is None else views[layer.weight]
    bias = None if layer.bias is None else views[layer.bias]
    single = len(layer.x) == len(dy)  # T = 1: dy is a matrix to write into
    target = dy if single else dy.new_empty(len(layer.x), layer.out)
    if weight is None:
        target.copy_(bias.expand_as(target))  # type: ignore[union-attr]
    elif bias is None:
        torch.mm(layer.x, weight.t(), out=target)
    else:
        torch.addmm(bias, layer.x, weight.t(), out=target)
    if not single:
        dy.copy_(target.view_as(dy))


def _cotangent(layer: Layer, delta: Tensor, views: list[Tensor], written: set[int]) -> None:
    """Write ``delta^T x`` and the sum of ``delta`` into ``views``; add where ``written``."""
    if layer.weight is not None:
        beta = 1 if layer.weight in written else 0
        view = views[layer.weight]
        torch.addmm(view, delta.t(), layer.x, beta=beta, out=view)
    if layer.bias is not None:
        if layer.bias in written:
            views[layer.bias].add_(delta.sum(0))
        else:
            torch.sum(delta, 0, out=views[layer.bias])
