"""Scores from solved queries and gradients of training examples, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from woodbury.curvature import Objective
from woodbury.errors import NonFiniteError
from woodbury.influence.chunks import gradient_chunks
from woodbury.influence.forecast import Plan
from woodbury.influence.runs import Run
from woodbury.influence.systems import Solved, System

__all__ = ["Pairwise", "Say", "self_scores"]

# Finished pieces go to disk about this often.
SECONDS_BETWEEN_PIECES = 20.0

Say = Callable[[str, float], object]
Owner = list[tuple[int, slice]]


def _kept_plan(run: Run, plan: Plan) -> Plan:
    """The plan the run began with: what is free now does not change its results."""
    found = run.load("plan")
    if found is not None:
        return replace(plan, **found[1])
    run.keep("plan", {"none": torch.zeros(1)}, {"columns": plan.columns, "chunk": plan.chunk})
    return plan


class Pairwise:
    """One run over queries and training examples.

    Args:
        objective: of the training data.
        system: the damped matrix.
        plan: how the run is cut.
        run: where finished pieces are.
        rows: the training examples that are scored, ascending.
        owner: which entries of a gradient belong to which module; empty for no parts.
        say: progress.
    """

    def __init__(
        self,
        objective: Objective,
        system: System,
        plan: Plan,
        run: Run,
        rows: Tensor,
        owner: Owner,
        say: Say,
    ) -> None:
        self.objective, self.system, self.run, self.rows = objective, system, run, rows
        self.plan = _kept_plan(run, plan)
        self.owner, self.say = owner, say
        self.count = 1 + max((place for place, _ in owner), default=-1)
        self.norms = torch.zeros(len(rows), dtype=objective.dtype, device=objective.device)

    def scores(self, asked: Objective) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores ``[Q, N]``, errors of the solves ``[Q]``, parts ``[M, Q, N]``."""
        total = asked.num_examples
        pieces, done = [], 0
        for number, (places, gradients) in enumerate(gradient_chunks(asked, self.plan.columns)):
            solved = self._solved(number, gradients)
            done += len(places)
            self.say("solving for the queries", done / total)
            pieces.append((places, solved.error, *self._against(number, solved.value)))
        parts = None
        if self.owner:
            parts = torch.stack(
                [asked.in_order([(p[0], p[3][m]) for p in pieces]) for m in range(self.count)]
            )
        values = asked.in_order([(p[0], p[2]) for p in pieces])
        return values, asked.in_order([(p[0].cpu(), p[1]) for p in pieces]), parts

    def _solved(self, number: int, gradients: Tensor) -> Solved:
        kept = self.run.load(f"solved-{number:05d}")
        if kept is not None:
            tensors, words = kept
            self.system.restored(words)
            return Solved(tensors["value"], tensors["residual"], tensors["error"], words["proven"])
        solved = self.system.solve(gradients.T.contiguous())
        self.run.keep(
            f"solved-{number:05d}",
            {"value": solved.value, "residual": solved.residual, "error": solved.error},
            {"proven": solved.proven, "certificate": self.system.report.certificate()},
        )
        return solved

    def _against(self, number: int, X: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of solved queries ``X [n, k]``, ``[k, N]``, and parts ``[M, k, N]``."""
        factor = -1 / self.objective.num_examples
        X = X.to(self.objective.device)
        values = X.new_zeros(X.shape[1], len(self.rows))
        parts = X.new_zeros(self.count, X.shape[1], len(self.rows))
        name = f"scores-{number:05d}"
        done = self._restored(name, values, parts)
        last = time.monotonic()
        rows = self.rows.to(X.device)
        for places, gradients in gradient_chunks(
            self.objective, self.plan.chunk, rows=self.rows, done=done
        ):
            columns = torch.searchsorted(rows, places)
            if self.owner:
                for module, entries in self.owner:
                    parts[module][:, columns] += factor * (X[entries].T @ gradients[:, entries].T)
                values[:, columns] = parts[:, :, columns].sum(0)
            else:
                values[:, columns] = factor * (X.T @ gradients.T)
            self.norms[columns] = gradients.norm(dim=1)
            done += len(places)
            self.say("scoring the training examples", done / len(rows))
            if time.monotonic() - last >= SECONDS_BETWEEN_PIECES or done == len(rows):
                self._keep(name, values, parts, done)
                last = time.monotonic()
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"scores overflow {values.dtype}; scale the measurement or use float64"
            )
        return values, parts

    def _keep(self, name: str, values: Tensor, parts: Tensor, done: int) -> None:
        self.run.keep(name, {"values": values, "parts": parts, "norms": self.norms}, {"done": done})

    def _restored(self, name: str, values: Tensor, parts: Tensor) -> int:
        kept = self.run.load(name)
        if kept is None:
            return 0
        tensors, words = kept
        values.copy_(tensors["values"])
        parts.copy_(tensors["parts"])
        self.norms.copy_(tensors["norms"])
        return int(words["done"])


def self_scores(
    objective: Objective, system: System, plan: Plan, run: Run, say: Say
) -> tuple[Tensor, Tensor]:
    """Scores of every training example for its own loss, ``[N]``, and bounds of their errors."""
    plan = _kept_plan(run, plan)
    count, done = objective.num_examples, 0
    values = torch.zeros(count, dtype=objective.dtype, device=objective.device)
    errors = torch.zeros(count, dtype=torch.float64)
    if (kept := run.load("self")) is not None:
        tensors, words = kept
        values.copy_(tensors["values"])
        errors.copy_(tensors["errors"])
        done = int(words["done"])
        system.restored(words)
    last = time.monotonic()
    for places, gradients in gradient_chunks(objective, min(plan.chunk, plan.columns), done=done):
        solved = system.solve(gradients.T.contiguous())
        values[places] = -(solved.value.T * gradients).sum(1) / count
        errors[places.cpu()] = solved.error * gradients.norm(dim=1).double().cpu() / count
        done += len(places)
        say("self-influence", done / count)
        if time.monotonic() - last >= SECONDS_BETWEEN_PIECES or done == count:
            words = {"done": done, "proven": solved.proven}
            words["certificate"] = system.report.certificate()
            run.keep("self", {"values": values, "errors": errors}, words)
            last = time.monotonic()
    return values, errors
