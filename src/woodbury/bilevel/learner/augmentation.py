"""A network that changes the inputs of the training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from woodbury.bilevel.learner.hyper import Hyper
from woodbury.errors import GradientError

__all__ = ["Augmentation"]


class Augmentation(Hyper):
    r"""Training inputs $A_\phi(x)$ of a network whose weights $\phi$ are the hyperparameters.

    Validation inputs go to the model as they are. The network may draw random numbers: within one
    hypergradient all products see the same.

    Args:
        network: any module from the first input of the model to one of the same kind. From here on
            its parameters belong to the learner and require no gradient.

    Raises:
        GradientError: the network has no parameters.

    Cost: a pass through the network in every training step.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
    Differentiation" (AISTATS 2020), section 5.4; without the regulariser of the network.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Augmentation
        >>> shift = torch.nn.Linear(2, 2)
        >>> augmentation = Augmentation(shift)
        >>> shift.weight.requires_grad
        False
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not any(True for _ in network.parameters()):
            raise GradientError(
                f"{type(network).__name__} has no parameters; there is nothing to learn"
            )
        self.network = network.requires_grad_(False)

    def inputs(self, args: tuple[Any, ...], rows: Tensor | None) -> tuple[Any, ...]:
        """The first input through the network."""
        if not args:
            raise GradientError(
                "Augmentation changes the first positional input of the model, and batches that "
                "are mappings have none; give (inputs, targets)"
            )
        return (self.network(args[0]), *args[1:])
