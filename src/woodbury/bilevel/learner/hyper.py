"""What every kind of hyperparameter of a training loop is: tensors, and where they enter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from woodbury.errors import ArgumentError

__all__ = ["Hyper", "Hypers", "named_hypers", "own", "unwrapped"]


class Hyper(nn.Module):
    """Hyperparameters of one kind. A subclass says where they enter the training loss.

    Its parameters are the hyperparameters. They do not require a gradient, so that no backward pass
    of the training touches them; :class:`~woodbury.bilevel.HyperLearner` differentiates with
    respect to leaves of its own. Overwrite any of the hooks below; each gets the batch of the
    moment and may use the parameters of the module.

    Attributes:
        needs_rows: whether a hook wants to know which rows of the data a batch holds.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Hyper
        >>> class Temperature(Hyper):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        ...     def outputs(self, outputs):
        ...         return outputs * self.log.exp()
        >>> Temperature().outputs(torch.ones(2))
        tensor([1., 1.])
    """

    needs_rows = False

    def inputs(self, args: tuple[Any, ...], rows: Tensor | None) -> tuple[Any, ...]:
        """The positional inputs of the model, changed."""
        return args

    def outputs(self, outputs: Any) -> Any:
        """What the model returned, changed."""
        return outputs

    def target(self, target: Any, rows: Tensor | None) -> Any:
        """The target of the criterion, changed."""
        return target

    def weigh(self, losses: Tensor, rows: Tensor | None) -> Tensor:
        """The losses ``[B]`` of the examples, changed."""
        return losses

    def project(self) -> None:
        """Bring the hyperparameters back into their bounds, after each of their steps."""


def own(values: Tensor) -> nn.Parameter:
    """``values`` as a hyperparameter: a leaf that training does not differentiate."""
    return nn.Parameter(values.detach().clone().contiguous(), requires_grad=False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        if isinstance(model, wrapped):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


Hypers = Hyper | Iterable[Hyper] | Mapping[str, Hyper]


def named_hypers(hypers: Hypers) -> dict[str, Hyper]:
    """Hyperparameters by name; the names of their classes where none are given.

    Raises:
        ArgumentError: there are none, or names clash or cannot be those of modules.
    """
    if isinstance(hypers, Hyper):
        hypers = [hypers]
    if isinstance(hypers, Mapping):
        found = dict(hypers)
    else:
        found = {}
        for hyper in hypers:
            name = type(hyper).__name__
            if name in found:
                raise ArgumentError(
                    f"two hyperparameters are called {name}; give a mapping of names"
                )
            found[name] = hyper
    if not found:
        raise ArgumentError("hypers is empty; give at least one, for example WeightDecay(model)")
    for name, hyper in found.items():
        if not isinstance(hyper, Hyper):
            raise ArgumentError(
                f"hypers[{name!r}] is a {type(hyper).__name__}; give objects such as "
                "WeightDecay(model) or ExampleWeights(len(data))"
            )
        if not name or "." in name:
            raise ArgumentError(f"{name!r} cannot name a hyperparameter; use a word without a dot")
    return found
