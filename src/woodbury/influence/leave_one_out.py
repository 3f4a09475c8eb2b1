"""Leave-one-out predictions from one fit and the inverse curvature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from woodbury.curvature import GaussNewton, Objective
from woodbury.curvature.batches import Batch
from woodbury.errors import ArgumentError, ShapeError, StructureError
from woodbury.influence.glm import without_row
from woodbury.influence.linear_rows import LinearRows, fits
from woodbury.influence.systems import DENSE_LIMIT, formed
from woodbury.operators import LinearOperator
from woodbury.solvers import CG, Cholesky, Recipe, SolveReport, inverse, solve

__all__ = ["LeaveOneOut", "leave_one_out"]

_CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class LeaveOneOut:
    r"""Predictions of every row by the model that did not see it.

    Attributes:
        predictions: outputs (logits) ``[N, C]`` had row $i$ been left out of the fit.
        fitted: outputs of the fit ``[N, C]``.
        losses: the criterion at ``predictions``, ``[N]``.
        leverage: trace of $L_i S_i$, ``[N]``: how many parameters row $i$ occupies. The sum over
            rows is the effective number of parameters.
        unstable: rows ``[N]`` (bool) without which the problem has no minimum by this curvature
            ($L_i S_i$ has an eigenvalue of 1 or more); their predictions are not to be trusted.
        stationarity: norm of the gradient of the objective at the fit; the formula assumes 0.
        suboptimality: $\frac12 g^T H^{-1} g$, to second order what the objective is above its
            minimum.
        report: the solves with the curvature: statuses and the worst true residual.

    Example:
        >>> import torch
        >>> from woodbury import Objective, leave_one_out
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [1.0]]).double()
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(3 / 5)
        >>> left_out = leave_one_out(Objective(model, "mse", (x, y)))
        >>> left_out.leverage  # they sum to the number of parameters
        tensor([0.2000, 0.8000], dtype=torch.float64)
        >>> left_out.certificate()["ok"]
        True
    """

    predictions: Tensor
    fitted: Tensor
    losses: Tensor
    leverage: Tensor
    unstable: Tensor
    stationarity: float
    suboptimality: float
    report: SolveReport

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the predictions: plain numbers and words."""
        return {
            "stationarity": self.stationarity,
            "suboptimality": self.suboptimality,
            "effective_parameters": self.leverage.sum().item(),
            "largest_leverage": self.leverage.max().item(),
            "unstable_rows": int(self.unstable.sum()),
            **self.report.certificate(),
        }


def leave_one_out(
    objective: Objective,
    recipe: Recipe | None = None,
    *,
    curvature: LinearOperator | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> LeaveOneOut:
    r"""For every row, the prediction the model would make had that row been left out.

    One Newton step from the fit $\hat\theta$ on the objective without row $i$,
    $F(\theta) - \frac{w_i}{N}\ell_i(\theta)$ (the regulariser keeps its strength), with the
    curvature $H$ of the whole objective. With the Jacobian $J_i$ ``[C, n]`` of the outputs, the
    gradient $r_i$ and the Hessian $S_i$ of the criterion in them, and the block leverage

    $$L_i = \frac{w_i}{N} J_i H^{-1} J_i^T, \qquad
      z_{-i} = z_i + (I - L_i S_i)^{-1} L_i r_i,$$

    by the Woodbury identity: one inverse serves all rows. For squared error on a linear model this
    is exact; for generalised linear models it is one Newton step with the exact Hessian; for
    networks $H$ is the Gauss-Newton matrix (with the regulariser).

    Args:
        objective: at its minimiser, with outputs ``[N, C]`` (or ``[N]``).
        recipe: how to apply $H^{-1}$. Default: Cholesky to 3,000 parameters, and of a softmax model
            linear in its parameters as long as memory allows; CG beyond. ``Eigh()`` takes a
            singular $H$ (an unpenalised intercept of a softmax model), ``Nystrom`` a large network.
        curvature: $H$, if it is not to be ``GaussNewton(objective)``.
        chunk_bytes: memory of the Jacobians that are held at once.

    Returns:
        :class:`LeaveOneOut`.

    Raises:
        StructureError: the objective has no outputs (a loss only), or rows depend on each other
            (mode ``"train"``).
        ShapeError: an output with more than one axis per example.
        SolveError, NotPositiveDefiniteError: as the recipe raises.
        DataError: a shuffling loader whose batches carry no indices.

    Cost: the Jacobians of all outputs once and $N C$ solves, in blocks. With cross-entropy, a
    model linear in its parameters (as is the last layer of a network), a positive number as ``l2``
    and Cholesky: one factorisation, and $2 N C^2 m^2$ multiplications with $m$ inputs; $4 C^2 m^2$
    numbers in float64, of which half of the free memory may be taken.

    Source: Beirami, Razaviyayn, Shahrampour and Tarokh, "On optimal generalizability in parametric
    learning" (NeurIPS 2017); Rad and Maleki, "A scalable estimate of the out-of-sample prediction
    error via approximate leave-one-out cross-validation" (JRSS B 2020). The block form for several
    outputs and row weights is derived here.

    Example:
        >>> import torch
        >>> from woodbury import Objective, leave_one_out
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [1.0]]).double()
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(3 / 5)  # least squares of both rows
        >>> leave_one_out(Objective(model, "mse", (x, y))).predictions.T  # 1 * 1/2 and 2 * 1
        tensor([[0.5000, 2.0000]], dtype=torch.float64)
    """
    if chunk_bytes < 1:
        raise ArgumentError(f"chunk_bytes is {chunk_bytes}; it must be positive")
    if objective.replayed:
        raise StructureError(
            "in mode 'train' the outputs of a row depend on its batch, so leaving it out is not "
            "defined by this formula; use mode='eval'"
        )
    objective.criterion  # noqa: B018 - raises where there are no outputs
    objective.require_rows("leave_one_out")
    operator = GaussNewton(objective) if curvature is None else curvature
    if operator.shape != (objective.space.dim, objective.space.dim):
        raise ShapeError(
            f"curvature is {operator.shape}, the objective has {objective.space.dim} parameters"
        )
    report = SolveReport()
    gradient = objective.gradient()
    linear = _linear_rows(objective, recipe) if curvature is None else None
    if linear is not None:
        newton, pieces = _from_leverages(objective, linear, gradient, report)
    else:
        if recipe is None:
            recipe = Cholesky() if operator.shape[0] <= DENSE_LIMIT else CG()
        inverted = inverse(formed(operator, recipe), recipe, report=report)
        newton = inverted @ gradient
        pieces = [
            (rows, _left_out(objective, chunk, inverted))
            for rows, chunk in _chunks(objective, chunk_bytes)
        ]
    joined = [
        objective.in_order([(rows, values[j]) for rows, values in pieces])
        for j in range(len(pieces[0][1]))
    ]
    predictions, fitted, losses, leverage, unstable = joined
    return LeaveOneOut(
        predictions=predictions,
        fitted=fitted,
        losses=losses,
        leverage=leverage,
        unstable=unstable,
        stationarity=objective.space.norm(gradient).item(),
        suboptimality=0.5 * objective.space.inner(gradient, newton).item(),
        report=report,
    )


Pieces = list[tuple[Any, tuple[Tensor, ...]]]


def _linear_rows(objective: Objective, recipe: Recipe | None) -> LinearRows | None:
    """Rows of a softmax model linear in its parameters, where a Cholesky factor is wanted."""
    wanted = recipe is None or recipe == Cholesky()
    definite = isinstance(objective.l2, int | float) and objective.l2 > 0
    return LinearRows.of(objective) if wanted and definite and fits(objective) else None


def _from_leverages(
    objective: Objective, linear: LinearRows, gradient: Tensor, report: SolveReport
) -> tuple[Tensor, Pieces]:
    """The Newton step of the fit and what leaves each row out, from the leverages of all rows."""
    curvature = linear.curvature(float(objective.l2))
    matrix = linear.operator(curvature, objective)
    solution = solve(matrix, gradient.double(), Cholesky())
    report.add(solution)
    leverages = curvature.leverage(torch.cat(linear.inputs)).split([len(x) for x in linear.inputs])
    pieces: Pieces = []
    batches = objective.batches("leave one out")
    given = zip(batches, linear.places, linear.outputs, linear.shares, leverages, strict=True)
    for batch, places, outputs, shares, leverage in given:
        target = objective.target(batch)
        slope, bend = _expansion(objective, outputs, target)
        L = leverage * shares.to(leverage).view(-1, 1, 1)
        step = (L @ slope[:, :, None]).squeeze(2)
        pieces.append((places, _outcome(objective, outputs, target, L @ bend, step)))
    return solution.value.to(gradient), pieces


@dataclass(frozen=True)
class _Chunk:
    """Some rows of one batch: their outputs ``[b, ...]``, Jacobians ``[b, C, n]``, targets."""

    outputs: Tensor
    jacobian: Tensor
    target: Any
    shares: Tensor  # w_i / N


def _left_out(
    objective: Objective, chunk: _Chunk, inverted: LinearOperator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs, jacobian = chunk.outputs, chunk.jacobian
    rows, width, n = jacobian.shape
    slope, bend = _expansion(objective, outputs, chunk.target)
    # H^-1 meets J^T S and J^T r only, which lie in its range also where H is singular.
    sides = torch.cat([bend, slope.reshape(rows, width, 1)], dim=2)
    columns = (jacobian.mT @ sides).movedim(1, 0).reshape(n, rows * (width + 1))
    solved = (inverted @ columns.contiguous()).reshape(n, rows, width + 1).movedim(0, 1)
    levered = jacobian @ solved * chunk.shares.view(-1, 1, 1)
    return _outcome(objective, outputs, chunk.target, levered[:, :, :width], levered[:, :, width])


def _expansion(objective: Objective, outputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the criterion in the outputs, as they are, and its Hessian ``[b, C, C]``."""
    rows, width = len(outputs), outputs[:1].numel()
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        total = objective.criterion.losses(leaf, target, rows).sum()
        (slope,) = torch.autograd.grad(total, leaf)
    basis = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    directions = basis.view(width, 1, width).expand(width, rows, width)
    product = objective.criterion.curvature(outputs, target, None)
    bend = product(directions.reshape(width, *outputs.shape).contiguous())
    return slope, bend.reshape(width, rows, width).movedim(0, 2)  # symmetric


def _outcome(
    objective: Objective, outputs: Tensor, target: Any, coupled: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Predictions, outputs, losses, leverages, and which rows are unstable.

    ``coupled`` is $L S$ ``[b, C, C]``, and ``step`` is $L r$ ``[b, C]``.
    """
    moved, info = without_row(coupled, step)
    radius = torch.linalg.eigvals(coupled).real.amax(1) if step.shape[1] else step.sum(1)
    # At an eigenvalue of 1 the row alone determines a direction; rounding blurs where that is.
    unstable = (radius >= 1 - torch.finfo(radius.dtype).eps ** 0.5) | (info != 0)
    predictions = outputs + moved.reshape(outputs.shape)
    with torch.no_grad():
        losses = objective.criterion.losses(predictions, target, len(outputs))
    return predictions, outputs, losses, coupled.diagonal(dim1=1, dim2=2).sum(1), unstable


def _chunks(objective: Objective, chunk_bytes: int) -> Iterator[tuple[Any, _Chunk]]:
    itemsize = torch.finfo(objective.dtype).bits // 8
    total = objective.num_examples
    params = {name: tensor.detach() for name, tensor in objective.leaves().items()}
    for batch in objective.batches("leave one out"):
        with torch.no_grad():
            outputs = objective.outputs(params, batch)
        if outputs.dim() > 2:
            raise ShapeError(
                f"outputs have shape {tuple(outputs.shape)}; leave_one_out needs [B, C] or [B], "
                "one prediction per row"
            )
        width = outputs.shape[1] if outputs.dim() == 2 else 1
        weights = objective.batch_weights(batch)
        shares = torch.ones(batch.size, dtype=objective.dtype, device=objective.device)
        shares = (shares if weights is None else weights) / total
        size = max(1, chunk_bytes // max(1, 3 * itemsize * width * objective.space.dim))
        for start in range(0, batch.size, size):
            stop = min(start + size, batch.size)
            part = _rows_of(batch, start, stop)
            chunk = _Chunk(
                outputs[start:stop],
                _jacobian(objective, part, width),
                objective.target(part),
                shares[start:stop],
            )
            yield part.rows, chunk


def _rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop`` of a batch as a batch of their own."""
    leaves, structure = tree_flatten(batch.data)
    parts = [
        leaf[start:stop]
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch.size
        else leaf
        for leaf in leaves
    ]
    rows = batch.rows
    if isinstance(rows, slice):
        rows = slice(rows.start + start, rows.start + stop)
    else:
        rows = rows[start:stop]
    return Batch(batch.index, tree_unflatten(parts, structure), stop - start, rows, batch.resident)


def _jacobian(objective: Objective, batch: Batch, width: int) -> Tensor:
    """The Jacobians of the outputs of each row, ``[b, C, n]``.

    Rows do not depend on each other, so the gradient of the sum over rows of output ``c`` with
    respect to a copy of the parameters per row is what is wanted; a model that cannot be
    vectorised over such copies is done row by row.
    """
    leaves, structure = tree_flatten(batch.data)
    sliced = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch.size for x in leaves]
    rows = [x for x, cut in zip(leaves, sliced, strict=True) if cut]

    def outputs(flat: Tensor, *row: Tensor) -> Tensor:
        given = iter(row)
        data = [next(given)[None] if cut else x for x, cut in zip(leaves, sliced, strict=True)]
        single = Batch(batch.index, tree_unflatten(data, structure), 1, slice(0, 1), True)
        return objective.outputs(objective.space.unflatten(flat), single).reshape(width)

    flat = objective.params_vector()
    jacobian = torch.func.jacrev(outputs)
    try:
        in_dims = (None, *[0] * len(rows))
        result: Tensor = torch.func.vmap(jacobian, in_dims=in_dims)(flat, *rows)
        return result
    except (RuntimeError, ValueError):  # the model has something that vmap cannot do
        return torch.stack([jacobian(flat, *(x[i] for x in rows)) for i in range(batch.size)])
