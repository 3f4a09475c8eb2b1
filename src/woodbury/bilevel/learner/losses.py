"""Both losses of a learner as pure functions of weights and hyperparameters at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from woodbury.bilevel.learner.graphs import require_known_leaves
from woodbury.bilevel.learner.hyper import Hyper
from woodbury.bilevel.learner.pipeline import TrainingLoss, ValidationLoss, checked_size
from woodbury.bilevel.learner.processes import Processes
from woodbury.curvature.batches import Batch, batch_size
from woodbury.curvature.functions import ModuleFunction
from woodbury.errors import DataError, GradientError

__all__ = ["Losses"]


class Losses:
    """The training loss without the penalties of weight decay, and the validation loss.

    Args:
        model: the module inside all wrappers.
        criterion: of the training.
        outer: of the validation.
        hypers: by name.
        params: the weights that are differentiated, by name.
        processes: who trains.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        outer: Any,
        hypers: Mapping[str, Hyper],
        params: Mapping[str, Tensor],
        processes: Processes,
    ) -> None:
        self.training = TrainingLoss(model, criterion, hypers)
        self.validation = ValidationLoss(model, outer)
        self.params, self.processes = params, processes
        self.tensors: dict[str, Tensor] = dict(self.training.hypers.named_parameters())
        self._trained = [name for name, p in params.items() if p.requires_grad]
        self._functions: dict[str, ModuleFunction] = {}
        self._shares = {"training": 1.0, "validation": 1.0}
        self._checked: set[str] = set()
        self._index = 0

    def modes(self) -> list[bool]:
        """Which submodules are in training mode now."""
        return [module.training for module in self.training.modules()]

    def freeze(
        self,
        data: Mapping[str, Any],
        modes: Sequence[bool],
        entering: Sequence[str],
        seed: int,
        index: int,
    ) -> dict[str, Batch]:
        """Hold buffers, modes and random numbers as they are; the batches by loss, checked.

        ``entering`` are the hyperparameters that are differentiated, ``index`` the number of the
        step, from which with ``seed`` the random numbers come.
        """
        self._require_same_parameters()
        sizes = {what: batch_size(batch) for what, batch in data.items()}
        self._shares.update(self.processes.shares(sizes))
        for batch in data.values():
            checked_size(batch)
        weights = {f"model.{name}": p for name, p in self.params.items()}
        hypers = {f"hypers.{name}": self.tensors[name] for name in entering}
        self._index = index
        self._functions = {
            "training": ModuleFunction(self.training, weights | hypers, "train", seed, modes),
            "validation": ModuleFunction(self.validation, weights, "eval", seed),
        }
        return {what: Batch(0, data[what], sizes[what], slice(0)) for what in data}

    def inner(self, params: Mapping[str, Tensor], hyper: Mapping[str, Tensor], data: Any) -> Tensor:
        """The training loss, as :class:`~woodbury.bilevel.Bilevel` asks for it."""
        return self._value("training", params, hyper, data)

    def outer(self, params: Mapping[str, Tensor], hyper: Mapping[str, Tensor], data: Any) -> Tensor:
        """The validation loss, likewise."""
        return self._value("validation", params, {}, data)

    def _value(
        self, what: str, params: Mapping[str, Tensor], hyper: Mapping[str, Tensor], data: Any
    ) -> Tensor:
        values = {f"model.{name}": value for name, value in params.items()}
        values |= {f"hypers.{name}": value for name, value in hyper.items()}
        versions = [p._version for p in params.values()]
        # The pair makes split() hand the batch on as the only argument.
        value = self._functions[what](values, Batch(self._index, ((data,), None), 0, slice(0)))
        pairs = zip(params.items(), versions, strict=True)
        changed = [name for (name, p), version in pairs if p._version != version]
        if changed:
            raise GradientError(
                f"the model changes its parameters {changed} in place in its forward pass, so they "
                "are not those that are differentiated; do that after optimizer.step()"
            )
        if what not in self._checked:
            names = {id(p): name for name, p in self.training.named_parameters()}
            require_known_leaves(value, values.values(), what, names)
            self._checked.add(what)
        self.processes.require_finite(value, what)
        return value * self._shares[what]

    def _require_same_parameters(self) -> None:
        now = dict(self.training.model.named_parameters())
        replaced = [name for name, p in self.params.items() if now.get(name) is not p]
        frozen = [name for name in self._trained if not self.params[name].requires_grad]
        for what, names in (("replaced", replaced), ("frozen", frozen)):
            if names:
                raise GradientError(
                    f"the parameters {names} were {what} since the learner was made; make a new "
                    "one (params=... leaves parameters out)"
                )


def no_training_batch() -> DataError:
    """What to say where there is none."""
    return DataError(
        "there is no training batch yet; call learner.loss(batch) in the training step, or pass "
        "it: learner.step(validation, train)"
    )
