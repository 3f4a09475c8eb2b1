"""Dense per-layer references, one example at a time, with hooks on modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Layer:
    """One block: modules that share a weight ``[p, m]``, one group of channels of them."""

    modules: Sequence[nn.Module]
    group: int = 0


def inputs_of(module: nn.Module, x: Tensor, group: int) -> Tensor:
    """The rows a weight is multiplied by, ``[t, m]``."""
    if isinstance(module, nn.Conv2d):
        x = x.chunk(module.groups, 1)[group]
        if module.padding_mode == "circular":
            p = module.padding
            x = F.pad(x, (p[1], p[1], p[0], p[0]), mode="circular")
            padding = (0, 0)
        else:
            padding = module.padding
        rows = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)[0].T
    elif isinstance(module, nn.Embedding):
        rows = F.one_hot(x.reshape(-1), module.num_embeddings).to(module.weight.dtype)
    else:
        rows = x.reshape(-1, x.shape[-1])
    if getattr(module, "bias", None) is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows.detach()


def grads_of(module: nn.Module, g: Tensor, group: int) -> Tensor:
    """Gradients at the outputs, ``[t, p]``."""
    if isinstance(module, nn.Conv2d):
        return g.chunk(module.groups, 1)[group][0].flatten(1).T
    return g.reshape(-1, g.shape[-1])


def columns(z: Tensor, y: Tensor, kind: str) -> list[Tensor]:
    """What is backpropagated from the logits of one example."""
    p = z.detach().softmax(-1).squeeze(0)
    eye = torch.eye(len(p), dtype=p.dtype)
    if kind == "empirical":
        return [(p - eye[int(y)]).unsqueeze(0)]
    return [(p[c].sqrt() * (eye[c] - p)).unsqueeze(0) for c in range(len(p))]


def factors(model: nn.Module, layer: Layer, x: Tensor, y: Tensor, kind: str):
    """Inputs ``[t, m]`` and, for each column, output gradients ``[t, p]``, of every example."""
    found = []
    calls: list = []

    def note(module, args, output):
        calls.append((module, args[0], output))

    hooks = [module.register_forward_hook(note) for module in layer.modules]
    for i in range(len(x)):
        calls.clear()
        z = model(x[i : i + 1])
        a = torch.cat([inputs_of(module, given, layer.group) for module, given, _ in calls])
        gs = []
        for column in columns(z, y[i], kind):
            grads = torch.autograd.grad(z, [out for _, _, out in calls], column, retain_graph=True)
            parts = [grads_of(c[0], g, layer.group) for c, g in zip(calls, grads, strict=True)]
            gs.append(torch.cat(parts))
        found.append((a, gs))
    for hook in hooks:
        hook.remove()
    return found


def dense_block(found, sharing: str, corrected: bool) -> Tensor:
    """The block as its definition says, with loops."""
    count = len(found)
    if sharing == "reduce":
        reduced = [
            (a.mean(0, keepdim=True), [g.sum(0, keepdim=True) for g in gs]) for a, gs in found
        ]
    else:
        reduced = found
    A = sum(torch.outer(row, row) for a, _ in reduced for row in a)
    S = sum(torch.outer(row, row) for _, gs in reduced for g in gs for row in g)
    if not corrected:
        return torch.kron(S, A) / (count * sum(len(a) for a, _ in reduced))
    Q_A, Q_S = torch.linalg.eigh(A)[1], torch.linalg.eigh(S)[1]
    values = torch.zeros(len(S), len(A), dtype=A.dtype)
    for a, gs in found:
        for g in gs:
            values += (Q_S.T @ (g.T @ a) @ Q_A) ** 2 / count
    Q = torch.kron(Q_S, Q_A)
    return Q @ torch.diag(values.flatten()) @ Q.T
