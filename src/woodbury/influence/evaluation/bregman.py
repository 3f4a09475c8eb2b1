"""The proximal Bregman response: what influence scores with Gauss-Newton are the derivative of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.curvature.batches import Batch
from woodbury.errors import ArgumentError, DtypeError, StructureError
from woodbury.implicit import LBFGS, IterationStatus
from woodbury.influence.chunks import chosen_rows
from woodbury.influence.measurements import Measurement, measured, support
from woodbury.influence.scores import Scores

__all__ = ["BregmanResponse", "bregman_response"]

Progress = Callable[[str, float], object]


@dataclass(frozen=True, eq=False)
class BregmanResponse:
    r"""Changes of measurements when rows are given more weight, with the model held near itself.

    Attributes:
        scores: the changes per weight $1/N$, ``[Q, M]``, in the convention of
            :class:`~woodbury.influence.Scores`, to be compared with those of a method.
        converged: which of the ``M`` minimisations reached the tolerance.
        gradient_norms: at their ends, relative to that at the start, ``[M]``.
        epsilon: the weight that was added.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.influence.evaluation import bregman_response
        >>> x = torch.tensor([[1.0], [2.0]]).double()
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> objective = Objective(model, "mse", (x, torch.ones(2, 1).double()))
        >>> bregman_response(objective, damping=0.1).converged
        tensor([True, True])
    """

    scores: Scores
    converged: Tensor
    gradient_norms: Tensor
    epsilon: float


def bregman_response(
    objective: Objective,
    queries: Any = None,
    *,
    damping: float,
    measurement: Measurement = "loss",
    rows: Tensor | None = None,
    epsilon: float | None = None,
    tol: float = 1e-7,
    max_steps: int = 2000,
    block: int = 16,
    progress: Progress | None = None,
) -> BregmanResponse:
    r"""The ground truth of influence functions that does not depend on convergence of training.

    For every row $z$, by L-BFGS from the model's parameters $\theta_s$,

    $$ \theta(\epsilon) = \arg\min_\theta \frac1N \sum_i w_i D_i(\theta) + \epsilon\,\ell_z(\theta)
    + \frac12 (\theta-\theta_s)^T (\Lambda + \rho I) (\theta-\theta_s), $$

    where $D_i = \ell_i(h) - \ell_i(h_s) - \langle\nabla\ell_i(h_s), h - h_s\rangle$ is the Bregman
    divergence of the loss in the outputs $h$ of the model and $h_s$ those at $\theta_s$. Scores are
    $(m_q(\theta(\epsilon)) - m_q(\theta_s)) / (\epsilon N)$. As $\epsilon \to 0$ they become those
    of ``Influence(objective, measurement, damping=rho)``, which has $A = G + \Lambda + \rho I$ with
    the Gauss-Newton matrix $G$: exactly, at any parameters.

    Args:
        objective: of the training data, in float64, with outputs, in mode ``"eval"``; every batch
            fits into memory ``block`` times.
        queries: as for :meth:`woodbury.Influence.scores`; default the training data.
        damping: $\rho > 0$ (or 0 where all of ``l2`` is positive).
        measurement: as for :class:`woodbury.Influence`.
        rows: numbers of the rows $z$, ``[M]``; default all.
        epsilon: the weight; default $1/N$, as if the row were added once more.
        tol: of the norm of the gradient, relative to its start.
        max_steps: of every minimisation.
        block: how many rows are minimised for at once.
        progress: called as ``progress(stage, fraction)``.

    Returns:
        :class:`BregmanResponse`.

    Raises:
        DtypeError: the objective is not in float64: the response is a small difference.
        ArgumentError: the damping or ``epsilon`` makes no sense, or rows are not row numbers.
        StructureError: the objective has no outputs, or rows depend on their batch.

    Cost: some hundred gradients of the objective for every row.

    Source: Bae, Ng, Lo, Ghassemi and Grosse, "If influence functions are the answer, then what is
    the question?" (NeurIPS 2022), equation 14.

    Example:
        >>> import torch
        >>> from woodbury import Influence, Objective
        >>> from woodbury.influence.evaluation import bregman_response
        >>> x = torch.tensor([[1.0], [2.0]]).double()
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> objective = Objective(model, "mse", (x, torch.ones(2, 1).double()))
        >>> truth = bregman_response(objective, damping=0.1, epsilon=1e-6).scores.values
        >>> torch.allclose(truth, Influence(objective, damping=0.1).scores().values, rtol=1e-4)
        True
    """
    _check(objective, damping, epsilon, block)
    chosen = chosen_rows(objective, rows)
    count = objective.num_examples
    epsilon = 1 / count if epsilon is None else float(epsilon)
    asked = measured(objective, measurement, objective.data if queries is None else queries)
    before = asked.per_example_losses()
    divergence = _Divergence(objective, damping)
    solver = LBFGS(tol=tol, max_steps=max_steps, batched=True)
    values, converged, norms = [], [], []
    for start in range(0, len(chosen), block):
        some = chosen[start : start + block].to(objective.device)
        value, ok, norm = _respond(divergence, some, epsilon, solver, asked, before)
        values.append(value / (epsilon * count))
        converged.append(ok)
        norms.append(norm)
        if progress is not None:
            progress("proximal Bregman response", min(1.0, (start + block) / len(chosen)))
    settings = {
        "method": "proximal Bregman response",
        "damping": damping,
        "epsilon": epsilon,
        "measurement": measurement if isinstance(measurement, str) else "function",
    }
    empty = before.new_zeros(len(before), 0)
    scores = Scores(
        torch.cat(values, dim=1) if values else empty,
        chosen,
        support=support(measurement),
        settings=settings,
    )
    if not values:
        return BregmanResponse(scores, torch.zeros(0).bool(), torch.zeros(0), epsilon)
    return BregmanResponse(scores, torch.cat(converged), torch.cat(norms), epsilon)


def _respond(
    divergence: _Divergence,
    rows: Tensor,
    epsilon: float,
    solver: LBFGS,
    asked: Objective,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Changes ``[Q, B]`` for some rows, which converged, and the norms of the gradients."""
    start = divergence.start.expand(len(rows), -1).clone()
    leaf = start.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(divergence(leaf, rows, epsilon).sum(), leaf)
    size = slope.norm(dim=1)
    # Every problem begins with a gradient of norm 1, so that the tolerance is relative.
    scale = torch.where(size > 0, 1 / size.clamp_min(1e-300), torch.ones_like(size))
    found = solver.run(lambda X: divergence(X, rows, epsilon) * scale, start, throw=False)
    statuses = found.row_status or (found.status,) * len(rows)
    after = torch.stack([asked.with_params(theta).per_example_losses() for theta in found.value])
    ok = torch.tensor([status is IterationStatus.converged for status in statuses])
    return (after - before).T, ok, found.residual.detach().cpu()


class _Divergence:
    """The function that is minimised, for a batch of parameter vectors."""

    def __init__(self, objective: Objective, damping: float) -> None:
        self.objective = objective
        self.start = objective.params_vector()
        self.pull = torch.as_tensor(objective.l2, dtype=self.start.dtype) + damping
        self.batches: list[tuple[Batch, Tensor, Tensor, Tensor]] = []
        params = objective.space.unflatten(self.start)
        for batch in objective.batches("outputs"):
            leaf = objective.outputs(params, batch).detach().requires_grad_()
            with torch.enable_grad():
                losses = objective.criterion.losses(leaf, objective.target(batch), batch.size)
                (slope,) = torch.autograd.grad(losses.sum(), leaf)
            weights = objective.batch_weights(batch)
            shares = torch.ones(batch.size).to(self.start) if weights is None else weights
            self.batches.append((batch, leaf.detach(), slope, shares / objective.num_examples))

    def __call__(self, thetas: Tensor, rows: Tensor, epsilon: float) -> Tensor:
        """Values ``[B]`` at ``thetas [B, n]``."""
        moved = thetas - self.start
        total = 0.5 * (moved.square() * self.pull).sum(1)
        for part in self.batches:
            total = total + self._batch(part, thetas, rows, epsilon)
        return total

    def _batch(
        self, part: tuple[Batch, Tensor, Tensor, Tensor], thetas: Tensor, rows: Tensor, eps: float
    ) -> Tensor:
        batch, base, slope, shares = part
        objective = self.objective
        own = (batch.places().to(rows)[None, :] == rows[:, None]).to(thetas)

        def one(theta: Tensor, own: Tensor) -> Tensor:
            outputs = objective.outputs(objective.space.unflatten(theta), batch)
            losses = objective.criterion.losses(outputs, objective.target(batch), batch.size)
            along = (slope * (outputs - base)).flatten(1).sum(1)
            return ((losses - along) * shares).sum() + eps * (losses * own).sum()

        return torch.func.vmap(one)(thetas, own)


def _check(objective: Objective, damping: float, epsilon: float | None, block: int) -> None:
    objective.criterion  # noqa: B018 - raises where there are no outputs
    if objective.replayed:
        raise StructureError(
            "in mode 'train' the loss of an example depends on its batch; use mode='eval'"
        )
    if objective.dtype != torch.float64:
        raise DtypeError(
            f"the objective is {objective.dtype}; a response is a small difference, so use "
            "model.double() and data in float64"
        )
    smallest = float(torch.as_tensor(objective.l2).min())
    if not 0 <= damping < float("inf") or damping + smallest <= 0:
        raise ArgumentError(
            f"damping is {damping} and the smallest l2 {smallest}; damping must be >= 0 and their "
            "sum positive, or the model is not held"
        )
    if epsilon is not None and not (0 < abs(epsilon) < float("inf")):
        raise ArgumentError(f"epsilon is {epsilon}; it must be a number other than 0")
    if block < 1:
        raise ArgumentError(f"block is {block}; at least one row is minimised for at once")
