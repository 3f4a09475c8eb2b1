"""Dense float64 references built without the code under test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from woodbury import Objective

Function = Callable[[Tensor], Tensor]


def flat_parameters(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    """Selected parameters laid end to end."""
    chosen = dict(model.named_parameters())
    names = list(chosen) if names is None else names
    return torch.cat([chosen[name].detach().reshape(-1) for name in names])


def at(model: nn.Module, flat: Tensor, *args, names: Sequence[str] | None = None, **kwargs):
    """What the model returns with the selected parameters taken from ``flat``."""
    chosen = dict(model.named_parameters())
    names = list(chosen) if names is None else names
    values, start = {}, 0
    for name in names:
        stop = start + chosen[name].numel()
        values[name] = flat[start:stop].view(chosen[name].shape)
        start = stop
    return functional_call(model, values, args, kwargs, tie_weights=True)


def mlp(flat: Tensor, x: Tensor, sizes: Sequence[int], activation: Function) -> Tensor:
    """A fully connected network written out."""
    start = 0
    for layer, (m, n) in enumerate(itertools.pairwise(sizes)):
        W = flat[start : start + m * n].view(n, m)
        b = flat[start + m * n : start + m * n + n]
        start += m * n + n
        x = x @ W.T + b
        if layer < len(sizes) - 2:
            x = activation(x)
    return x


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Losses per row, written out."""
    return torch.logsumexp(z, 1) - z[torch.arange(len(z)), y]


def dense_hessian(loss: Function, flat: Tensor) -> Tensor:
    """The Hessian of a scalar function."""
    return hessian(loss, flat)


def dense_gauss_newton(outputs: Function, loss: Function, flat: Tensor) -> Tensor:
    """``J^T H J`` with ``J`` and ``H`` formed whole; ``loss`` is a function of all outputs."""
    z = outputs(flat).detach()
    J = jacobian(outputs, flat).reshape(z.numel(), flat.numel())
    H = hessian(loss, z).reshape(z.numel(), z.numel())
    return J.T @ H @ J


def dense_jacobian(outputs: Function, flat: Tensor) -> Tensor:
    """The Jacobian with outputs flattened."""
    return jacobian(outputs, flat).reshape(-1, flat.numel())


def network(sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A fully connected network in float64."""
    layers: list[nn.Module] = []
    for m, n in itertools.pairwise(sizes):
        layers += [nn.Linear(m, n, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def classification(rows: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    """Random inputs and labels."""
    return torch.randn(rows, inputs, dtype=torch.float64), torch.randint(0, classes, (rows,))


def unequal(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows in batches of 1, 4 and the rest."""
    return [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:])]


def apart(A: Tensor, B: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    assert A.shape == B.shape, (A.shape, B.shape)
    return float((A - B).abs().max() / B.abs().max().clamp_min(1e-300))


def classifier(rows: int = 9):
    """A model, its data in unequal batches, and the losses of its rows by hand."""
    sizes = (3, 4, 2)
    model = network(sizes)
    x, y = classification(rows, sizes[0], sizes[-1])

    def losses(flat: Tensor) -> Tensor:
        return cross_entropy(mlp(flat, x, sizes, torch.tanh), y)

    return model, unequal(x, y), losses, flat_parameters(model)


def gradient_of(function: Function, flat: Tensor) -> Tensor:
    """The gradient of a scalar, the Jacobian of a vector."""
    return jacobian(function, flat)


def all_gradients(objective: Objective, rows: int | None = None) -> Tensor:
    """Gradients per example, put into the order of the data."""
    result = torch.full((objective.num_examples, objective.space.dim), float("nan"))
    result = result.to(torch.float64)
    for places, gradients in objective.per_example_gradients(rows):
        result[places] = gradients
    return result
