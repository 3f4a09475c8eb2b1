"""Learning rates, from one step of the optimizer to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from woodbury.bilevel.learner.hyper import Hyper, own
from woodbury.errors import ArgumentError, GradientError

__all__ = ["LearningRates"]


class LearningRates(Hyper):
    r"""The learning rate $e^{\lambda_k}$ of every parameter group of an optimizer.

    A learning rate does not enter the loss, so no implicit function theorem applies to it. What is
    differentiated is the **last step** of the optimizer, everything before it held fixed: a step
    proportional to the learning rate has $\partial w_t / \partial\lambda_k = w_t - w_{t-1}$ on the
    parameters of group $k$, so

    $$\frac{\partial f(w_t)}{\partial \lambda_k} = \langle \nabla_k f(w_t), w_t - w_{t-1} \rangle.$$

    It is exact for one step of SGD (momentum and Nesterov included), Adam, AdamW and every other
    optimizer whose step is its learning rate times a direction; being greedy, it knows nothing of
    the steps after. A scheduler that changes a rate in between is followed.

    Args:
        optimizer: that of the training; a hook on its ``step`` keeps the parameters before it.

    Raises:
        ArgumentError: a learning rate is not positive.
        GradientError: at use, the optimizer has taken no step yet.

    Cost: a copy of the parameters, one pass over them in every training step.

    Source: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent" (ICLR 2018),
    equation 5, with a logarithmic rate and the validation loss.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import LearningRates
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> LearningRates(torch.optim.SGD([w], lr=0.1)).rates()
        [0.1]
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        for index, group in enumerate(optimizer.param_groups):
            if not 0 < float(group["lr"]) < math.inf:
                raise ArgumentError(
                    f"the learning rate of group {index} is {group['lr']}; it must be positive to "
                    "be learned"
                )
        self.log_rates = own(torch.tensor([math.log(rate) for rate in self.rates()]))
        # What the optimizer was last seen with, to the bit; saved with the logarithms.
        self.in_force: Tensor
        self.register_buffer("in_force", torch.tensor(self.rates(), dtype=torch.float64))
        self._before: list[list[Tensor]] | None = None
        optimizer.register_step_pre_hook(self._remember)

    def rates(self) -> list[float]:
        """The learning rates in force."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def gradient(self, slopes: Mapping[int, Tensor]) -> Tensor:
        """The formula above, ``[groups]``; ``slopes`` are gradients by ``id`` of the parameter."""
        if self._before is None:
            raise GradientError(
                "the optimizer of LearningRates has taken no step yet; its hypergradient is that "
                "of the last step"
            )
        values = []
        for group, before in zip(self.optimizer.param_groups, self._before, strict=True):
            total = torch.zeros((), dtype=self.log_rates.dtype, device=self.log_rates.device)
            for parameter, old in zip(group["params"], before, strict=True):
                if id(parameter) in slopes:
                    total += ((parameter.detach() - old) * slopes[id(parameter)]).sum()
            values.append(total)
        return torch.stack(values)

    @torch.no_grad()
    def follow(self) -> None:
        """Take up rates that somebody else (a scheduler) has set."""
        for index, (rate, known) in enumerate(zip(self.rates(), self.in_force, strict=True)):
            if rate != known.item():
                self.log_rates[index] = math.log(rate)
                self.in_force[index] = rate

    def write(self) -> None:
        """Put the rates that were learned into the optimizer."""
        self.in_force.copy_(self.log_rates.double().exp())
        self.restore()

    def restore(self) -> None:
        """Put the rates in force into the optimizer."""
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, self.in_force.tolist(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        if self._before is None or [len(g) for g in groups] != [len(b) for b in self._before]:
            self._before = [[p.detach().clone() for p in group] for group in groups]
            return
        for group, before in zip(groups, self._before, strict=True):
            torch._foreach_copy_(before, [p.detach() for p in group])
