"""LAFTR: the distance of two networks as functions, from moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from woodbury.curvature import Hessian, Objective
from woodbury.errors import ArgumentError, ShapeError, StructureError
from woodbury.influence.measurements import Measurement
from woodbury.influence.rivals.common import against, as_scores, asked_of, query_gradients
from woodbury.influence.scores import Scores
from woodbury.operators import FunctionOperator, Identity
from woodbury.solvers import CG, Recipe, inverse

__all__ = ["InputMoments", "function_space_distance", "laftr"]

_SILENT = (nn.Flatten, nn.Dropout, nn.Identity)


@dataclass(frozen=True, eq=False)
class InputMoments:
    """What is kept of the data in the place of the data.

    Attributes:
        mean: of the inputs, ``[d]``.
        covariance: of the inputs, ``[d, d]``.
        gates: share of inputs that switch each unit on, ``[m]`` for each ReLU in order.

    Example:
        >>> import torch
        >>> from woodbury.influence.rivals import InputMoments
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> InputMoments.of(model, torch.randn(50, 3)).gates[0].shape
        torch.Size([2])
    """

    mean: Tensor
    covariance: Tensor
    gates: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Sequential, x: Tensor) -> InputMoments:
        """The moments of inputs ``[N, ...]``, which are taken flat, at the model's parameters.

        Raises:
            StructureError: the model is not a sequence of linear layers and ReLUs.
        """
        x = x.flatten(1)
        mean = x.mean(0)
        centred = x - mean
        gates = []
        with torch.no_grad():
            for kind, layer in _layers(model):
                if kind == "gate":
                    gates.append((x > 0).to(x.dtype).mean(0))
                    x = x.relu()
                else:
                    assert layer is not None  # a linear layer
                    x = nn.functional.linear(x, layer.weight, layer.bias)
        return cls(mean, centred.T @ centred / len(centred), tuple(gates))


def function_space_distance(
    model: nn.Sequential,
    params: Mapping[str, Tensor],
    moments: InputMoments,
    *,
    method: Literal["moments", "sampled"] = "moments",
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""$\frac12 \mathbb{E}\|f(x, \theta_1) - f(x, \theta_0)\|^2$ of a linearised network.

    Every ReLU is replaced by a gate $n \sim \mathrm{Bernoulli}(\mu)$, the same for both networks,
    which are linear then: with $z = (a, \Delta a)$ a layer is $z \leftarrow T z + c$,
    $T = \bigl(\begin{smallmatrix} W_0 & 0 \\ W_1 - W_0 & W_1 \end{smallmatrix}\bigr)$,
    $c = (b_0, b_1 - b_0)$, and a gate multiplies both halves. The mean $M$ and the covariance $C$
    of $z$ follow exactly:

    $$ M \leftarrow T M + c, \quad C \leftarrow T C T^T; \qquad
       C \leftarrow E \odot (C + M M^T) - (\mu M)(\mu M)^T, \quad M \leftarrow \mu M, $$

    with $E = \mu\mu^T + \operatorname{diag}(\mu(1-\mu))$ tiled over both halves, and the distance
    is $\frac12 (\operatorname{tr} C_{\Delta\Delta} + \|M_\Delta\|^2)$.

    Args:
        model: linear layers and ReLUs in a sequence, at $\theta_0$.
        params: $\theta_1$ by the names of the model; those that are missing are $\theta_0$.
        moments: of the inputs and the gates.
        method: ``"moments"``: the recursion. ``"sampled"``: normal inputs and gates are drawn,
            which is what the source does.
        samples: for ``"sampled"``.
        generator: for ``"sampled"``; the same numbers every time if not given.

    Returns:
        A scalar, differentiable in ``params``.

    Raises:
        StructureError: the model is not a sequence of linear layers and ReLUs.
        ShapeError: the moments are of another model.
        ArgumentError: ``method`` or ``samples`` makes no sense.

    Cost: the recursion $8 m^3$ multiplications for a layer of width $m$, whatever the number of
    rows.

    Source: Dhawan, Huang, Bae and Grosse, "Efficient parametric approximations of neural network
    function space distance" (ICML 2023), section 4; the exact recursion of the covariance is
    derived here.

    Example:
        >>> import torch
        >>> from woodbury.influence.rivals import InputMoments, function_space_distance
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> moved = {"0.weight": model[0].weight.detach() + torch.tensor([[1.0, 0.0]])}
        >>> function_space_distance(model, moved, InputMoments.of(model, x))  # (1 + 0) / 2 / 2
        tensor(0.2500)
    """
    if method not in ("moments", "sampled"):
        raise ArgumentError(f"method is {method!r}; use 'moments' or 'sampled'")
    if samples < 1:
        raise ArgumentError(f"samples is {samples}; at least one is drawn")
    layers = _paired(model, params, moments)
    if method == "sampled":
        return _sampled(layers, moments, samples, generator)
    d = len(moments.mean)
    M = torch.cat([moments.mean, torch.zeros_like(moments.mean)])
    C = nn.functional.pad(moments.covariance, (0, d, 0, d))
    for part in layers:
        if isinstance(part, Tensor):
            mu = part.repeat(2)
            both = torch.outer(mu, mu)
            same = torch.diag(part * (1 - part)).repeat(2, 2)
            second = (both + same) * (C + torch.outer(M, M))
            M = mu * M
            C = second - torch.outer(M, M)
        else:
            W0, b0, W1, b1 = part
            T = torch.cat(
                [torch.cat([W0, torch.zeros_like(W0)], 1), torch.cat([W1 - W0, W1], 1)], 0
            )
            M = T @ M + torch.cat([b0, b1 - b0])
            C = T @ C @ T.T
    half = len(M) // 2
    return 0.5 * (C.diagonal()[half:].sum() + M[half:].square().sum())


def laftr(
    objective: Objective,
    model: nn.Sequential,
    moments: InputMoments,
    queries: Any = None,
    *,
    damping: float,
    recipe: Recipe | None = None,
    measurement: Measurement = "loss",
) -> Scores:
    r"""Influence with the curvature of LAFTR's distance in the place of the data's.

    $s_{qi} = -\frac1N \nabla m_q^T (F + \rho I)^{-1} \nabla\ell_i$, where $F$ is the Hessian in
    $\theta_1$, at $\theta_1 = \theta_0$, of :func:`function_space_distance`: the response of the
    proximal problem of the source to first order, without a pass over the data for the matrix.

    Args:
        objective: of the training data.
        model: the objective's model, linear layers and ReLUs in a sequence.
        moments: of the training inputs, :meth:`InputMoments.of`.
        queries: as for :func:`grad_dot`.
        damping: $\rho > 0$.
        recipe: for $(F + \rho I)^{-1}$; default conjugate gradients.
        measurement: as for :class:`woodbury.Influence`.

    Returns:
        :class:`~woodbury.influence.Scores` ``[Q, N]``.

    Raises:
        ArgumentError: ``damping`` is not positive, or a selected parameter is not the model's.
        StructureError: the model is not a sequence of linear layers and ReLUs.

    Cost: :func:`grad_dot`, and the products that the recipe takes, each about three evaluations of
    the recursion.

    Source: Dhawan et al. (2023), section 5.2.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.rivals import InputMoments, laftr
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> x, y = torch.eye(2).double(), torch.ones(2, 1).double()
        >>> objective = Objective(model, "mse", (x, y))
        >>> moments = InputMoments.of(model, x)
        >>> laftr(objective, model, moments, damping=0.1).values.shape
        torch.Size([2, 2])
    """
    if not 0 < damping < float("inf"):
        raise ArgumentError(f"damping is {damping}; it must be a positive number")
    unknown = [name for name in objective.space.sizes if name not in dict(model.named_parameters())]
    if unknown:
        raise ArgumentError(f"the model has no parameters {unknown}; give the objective's model")
    asked = asked_of(objective, measurement, queries)
    here = objective.space.unflatten(objective.params_vector())
    frozen = _at(model, here)

    def distance(params: Mapping[str, Tensor], _: Any) -> Tensor:
        return function_space_distance(frozen, params, moments)

    nothing = torch.zeros(1, 1, dtype=objective.dtype, device=objective.device)
    H = Hessian(Objective.functional(distance, here, [nothing]))
    # Semidefinite, because the distance has its minimum, 0, here.
    F = FunctionOperator(
        H.matmat, H.shape, tags={"positive_semidefinite"}, dtype=H.dtype, device=H.device
    )
    A = F + damping * Identity(len(objective.params_vector()))
    solved = inverse(A, CG() if recipe is None else recipe) @ query_gradients(asked).T.contiguous()
    values = -against(objective, solved.T.contiguous()) / objective.num_examples
    return as_scores(objective, values, measurement, method="LAFTR", damping=damping)


def _layers(model: nn.Module) -> list[tuple[str, nn.Linear | None]]:
    """The layers in order: ``("linear", layer)`` or ``("gate", None)``."""
    found: list[tuple[str, nn.Linear | None]] = []
    for name, module in (
        model.named_children() if isinstance(model, nn.Sequential) else [("", model)]
    ):
        if isinstance(module, nn.Linear):
            found.append(("linear", module))
        elif isinstance(module, nn.ReLU):
            found.append(("gate", None))
        elif not isinstance(module, _SILENT):
            raise StructureError(
                f"{name or 'the model'} is a {type(module).__name__}; moments are propagated "
                "through an nn.Sequential of Linear and ReLU (Flatten, Dropout, Identity) only"
            )
    return found


_Part = Tensor | tuple[Tensor, Tensor, Tensor, Tensor]


def _paired(
    model: nn.Sequential, params: Mapping[str, Tensor], moments: InputMoments
) -> list[_Part]:
    """Gates, and the weights and biases of both networks, in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gates = list(moments.gates)
    found: list[_Part] = []
    width = len(moments.mean)
    for kind, layer in _layers(model):
        if kind == "gate":
            if not gates or len(gates[0]) != width:
                raise ShapeError(
                    f"the moments have no gate of width {width} here: use those of "
                    "InputMoments.of(model, inputs)"
                )
            found.append(gates.pop(0))
            continue
        assert layer is not None  # a linear layer
        if layer.in_features != width:
            raise ShapeError(f"a layer takes {layer.in_features} inputs, the moments have {width}")
        W0 = layer.weight.detach()
        b0 = W0.new_zeros(len(W0)) if layer.bias is None else layer.bias.detach()
        W1 = params.get(names[id(layer.weight)], W0)
        b1 = b0 if layer.bias is None else params.get(names[id(layer.bias)], b0)
        found.append((W0, b0, W1, b1))
        width = layer.out_features
    return found


def _sampled(
    layers: list[_Part], moments: InputMoments, samples: int, generator: torch.Generator | None
) -> Tensor:
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(moments.covariance)
    root = vectors * values.clamp_min(0).sqrt()
    draws = torch.randn(samples, len(values), generator=generator, dtype=root.dtype)
    a0 = moments.mean + draws.to(root) @ root.T
    a1 = a0
    for part in layers:
        if isinstance(part, Tensor):
            drawn = torch.rand(samples, len(part), generator=generator).to(part)
            gate = (drawn < part).to(a0)
            a0, a1 = gate * a0, gate * a1
        else:
            W0, b0, W1, b1 = part
            a0, a1 = a0 @ W0.T + b0, a1 @ W1.T + b1
    return 0.5 * (a1 - a0).square().sum(1).mean()


def _at(model: nn.Sequential, params: Mapping[str, Tensor]) -> nn.Sequential:
    """A copy of the model at the objective's parameters."""
    import copy

    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in frozen.named_parameters():
            if name in params:
                parameter.copy_(params[name])
    return frozen
