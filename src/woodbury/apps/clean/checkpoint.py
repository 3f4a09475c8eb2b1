"""The state between two rounds, written atomically, so that a killed run goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from woodbury._files import load_tensors, save_tensors
from woodbury.errors import DataError

__all__ = ["Checkpoint", "State"]

FORMAT = "woodbury clean 2"


@dataclass(frozen=True, eq=False)
class State:
    """All that a round starts from.

    Attributes:
        model: the model that was chosen.
        settings: its penalty and the like.
        scores: held-out score of every candidate.
        round: rounds that are done.
        weights: of the rows in the next fit, ``[n]``.
        history: one entry a round.
        error: error probabilities of the last round ``[n]``, or None before the first.
        retuned: the settings were tuned to the weights.
        certificate: of the last fit.
        settled: error probabilities stopped changing.
    """

    model: str
    settings: dict[str, float]
    scores: dict[str, float]
    round: int
    weights: Tensor
    history: list[dict[str, Any]]
    error: Tensor | None = None
    retuned: bool = False
    certificate: dict[str, Any] = field(default_factory=dict)
    settled: bool = False

    def tuned_to(self, settings: dict[str, float]) -> State:
        """With other settings, tuned to the weights."""
        return replace(self, settings=settings, retuned=True)

    def advanced(self, weights: Tensor, error: Tensor, entry: dict[str, Any]) -> State:
        """After one more round."""
        history = [*self.history, entry]
        return replace(self, round=self.round + 1, weights=weights, error=error, history=history)

    def ended(
        self, history: list[dict[str, Any]], certificate: dict[str, Any], settled: bool
    ) -> State:
        """After the last round."""
        return replace(self, history=history, certificate=certificate, settled=settled)


class Checkpoint:
    """A file that holds a :class:`State`: tensors as safetensors, the rest as JSON inside it.

    Args:
        path: where, without suffix; nothing is kept if None.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = None if path is None else path.with_name(path.name + ".safetensors")

    def save(self, state: State) -> None:
        """Write the state; whoever reads sees the old one or this one."""
        if self.path is None:
            return
        tensors = {"weights": state.weights}
        if state.error is not None:
            tensors["error"] = state.error
        words = {
            "model": state.model,
            "settings": state.settings,
            "scores": state.scores,
            "round": state.round,
            "history": state.history,
            "retuned": state.retuned,
        }
        save_tensors(self.path, tensors, words, form=FORMAT)

    def load(self, rows: int) -> State | None:
        """The stored state of a run over ``rows`` rows, or None where there is none."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            tensors, words = load_tensors(self.path, form=FORMAT)
        except DataError:
            return None
        if len(tensors["weights"]) != rows:
            return None
        return State(weights=tensors["weights"], error=tensors.get("error"), **words)
