"""A bilevel problem as its user states it, and the oracles that algorithms ask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from woodbury.bilevel.linearization import BatchLinearization, DataLinearization, Linearization
from woodbury.bilevel.oracles import Gradients, Joint, OracleCounts
from woodbury.bilevel.parts import (
    Parts,
    Tensors,
    add_scaled,
    detached,
    leaves,
    named,
    or_zeros,
    rows_of,
    vector,
    write,
)
from woodbury.bilevel.sampling import BatchSize, Sampler
from woodbury.curvature import Objective
from woodbury.curvature.batches import Batch, Batches
from woodbury.errors import GradientError, NonFiniteError
from woodbury.spaces import Space

__all__ = ["Bilevel"]

Loss = Callable[..., Tensor]
Level = Literal["inner", "outer"]


class Bilevel:
    r"""$\min_\lambda f(w^*(\lambda), \lambda)$ with $w^*(\lambda) = \arg\min_w g(w, \lambda)$.

    ``inner`` is $g$, ``outer`` is $f$, ``params`` are $w$ and ``hyper`` $\lambda$. The tensors are
    those of the caller, and algorithms change them **in place**: pass
    ``dict(model.named_parameters())``, and the model is what is trained. Evaluations never touch
    ``.grad`` and never build a graph on the tensors themselves.

    The oracles take a ``batch`` that a :meth:`sampler` has drawn, or ``None`` for the mean over all
    of the data. Vectors are flat: ``[p]`` for ``params``, ``[h]`` for ``hyper``, in the order of
    ``space`` and ``hyper_space``. With $u = \nabla_w g$, $H = \nabla^2_{ww} g$ and
    $J = \nabla^2_{\lambda w} g$ ($h \times p$):

    | oracle | gives |
    | --- | --- |
    | ``value(level, batch)`` | the loss |
    | ``gradients(level, batch)`` | the loss and both of its gradients |
    | ``params_gradient(level, batch)`` | the gradient in ``params`` alone |
    | ``hessian_product(v, batch)`` | $H v$ |
    | ``mixed_product(v, batch)`` | $J v$ |
    | ``joint(v, batch)`` | $g, u, H v, J v$, from one forward pass |
    | ``linearize(batch)`` | $u$, $H$ as an operator and $v \mapsto J v$, sharing one graph |
    | ``at(params, hyper)`` | the same problem at another point |

    Args:
        inner: ``inner(params, hyper, batch)``, the mean inner loss of a batch, a scalar; called
            without ``batch`` where ``inner_data`` is ``None``. ``params`` and ``hyper`` come in the
            structure in which they were given here.
        outer: ``outer(params, hyper, batch)``, the same for the outer loss and ``outer_data``.
        params: a tensor or a mapping from name to tensor, of one dtype on one device.
        hyper: a tensor or a mapping.
        inner_data: one batch, a list of batches, a ``DataLoader``, or anything that can be iterated
            over again and again; means are weighted by the number of rows of each batch.
        outer_data: likewise for the outer loss.
        reduce: applied to every gradient and product: where processes hold parts of the data, the
            mean over processes.

    Attributes:
        params: the inner variables by name (``""`` for a single tensor).
        hyper: the hyperparameters by name.
        space: how ``params`` are laid end to end.
        counts: an :class:`OracleCounts` of all that was asked so far.

    Raises:
        GradientError: a tensor is not of floating point, or a mapping is empty. At an oracle: a
            loss that is no scalar, an outer loss that does not depend on ``params``, an inner loss
            that does not depend on one of them.
        DtypeError, DeviceError: ``params`` of several dtypes or on several devices.
        DataError: data without batches, a batch without rows, or data that can be iterated over
            only once.
        NonFiniteError: at an oracle: a loss or a gradient is NaN or infinite.

    Cost: a pass over data that is not in memory, to count its rows. Of an oracle: a gradient is
    one, a product with $H$ about 1.5 more once linearised, ``joint`` about 3.5 in all.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import Bilevel
        >>> inner = lambda w, a: 0.5 * (a * w.square()).sum() - w.sum()
        >>> outer = lambda w, a: 0.5 * w.square().sum()
        >>> problem = Bilevel(inner, outer, torch.ones(2), torch.tensor([1.0, 2.0]))
        >>> problem.joint(torch.ones(2)).hessian_product
        tensor([1., 2.])
        >>> problem.mixed_product(torch.ones(2))
        tensor([1., 1.])
        >>> problem.counts.hessian_products
        1
    """

    def __init__(
        self,
        inner: Loss,
        outer: Loss,
        params: Tensors,
        hyper: Tensors,
        *,
        inner_data: Iterable[Any] | None = None,
        outer_data: Iterable[Any] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.losses: dict[str, Loss] = {"inner": inner, "outer": outer}
        self.params, self.params_named = named(params, "params")
        self.hyper, self.hyper_named = named(hyper, "hyper")
        self.space = Space.of(self.params)
        self.data = {
            "inner": _batches(inner_data, self.space),
            "outer": _batches(outer_data, self.space),
        }
        self._inner_data = inner_data
        self.counts = OracleCounts()
        self.reduce = _same if reduce is None else reduce
        self._objective: Objective | None = None

    # ------------------------------------------------------------------------------ where it is

    @cached_property
    def hyper_space(self) -> Space:
        """How ``hyper`` is laid end to end."""
        return Space.of(self.hyper)

    def params_vector(self) -> Tensor:
        """A copy of ``params``, flat ``[p]``."""
        return self.space.flatten(detached(self.params)).clone()

    def hyper_vector(self) -> Tensor:
        """A copy of ``hyper``, flat ``[h]``."""
        return self.hyper_space.flatten(detached(self.hyper)).clone()

    def set_params(self, flat: Tensor) -> None:
        """Write a flat ``[p]`` into the caller's tensors."""
        write(self.space, self.params, flat)

    def set_hyper(self, flat: Tensor) -> None:
        """Write a flat ``[h]`` into the caller's tensors."""
        write(self.hyper_space, self.hyper, flat)

    def at(self, params: Tensor | None = None, hyper: Tensor | None = None) -> Bilevel:
        """The same problem at flat ``params [p]`` and ``hyper [h]``, by default those it has.

        Data and counters are shared; the tensors given are used as they are, without a copy.

        Raises:
            ShapeError, DtypeError, DeviceError: a vector is not of its space.
        """
        other = copy.copy(self)
        other._objective = None
        if params is not None:
            other.params = self.space.unflatten(vector(params, "params").detach())
        if hyper is not None:
            other.hyper = self.hyper_space.unflatten(vector(hyper, "hyper").detach())
        return other

    def structured(self, which: Literal["params", "hyper"], parts: Mapping[str, Tensor]) -> Tensors:
        """Named tensors in the structure in which ``params`` or ``hyper`` were given."""
        is_named = self.params_named if which == "params" else self.hyper_named
        return dict(parts) if is_named else parts[""]

    # ---------------------------------------------------------------------------------- oracles

    def value(self, level: Level, batch: Batch | None = None) -> float:
        """The mean loss, without a gradient."""
        total = 0.0
        with torch.no_grad():
            for part, share in self.batches(level, batch):
                result = self.call(level, detached(self.params), detached(self.hyper), part)
                total += result.item() * share
                self.counts.values += rows_of(part)
        return total

    def gradients(self, level: Level, batch: Batch | None = None) -> Gradients:
        """The mean loss and its gradients in ``params`` and ``hyper``."""
        value, of_params, of_hyper = self.gradient_parts(level, batch)
        return Gradients(value, of_params, self.flat_hyper(of_hyper))

    def params_gradient(self, level: Level, batch: Batch | None = None) -> Tensor:
        """The gradient in ``params`` alone, flat ``[p]``."""
        return self.gradient_parts(level, batch, of_hyper=False)[1]

    def hessian_product(self, v: Tensor, batch: Batch | None = None) -> Tensor:
        """$H v$, flat ``[p]``."""
        total = torch.zeros_like(v)
        for part, share in self.batches("inner", batch):
            total.add_(BatchLinearization(self, part).hessian_product(v), alpha=share)
        return total

    def mixed_product(self, v: Tensor, batch: Batch | None = None) -> Tensor:
        r"""$J v = \partial_\lambda \langle\nabla_w g, v\rangle$, flat ``[h]``."""
        return self.flat_hyper(self.mixed_parts(v, batch))

    def joint(self, v: Tensor, batch: Batch | None = None) -> Joint:
        """$g$, $u$, $H v$ and $J v$ from one forward and two backward passes for each batch."""
        found = None
        for part, share in self.batches("inner", batch):
            one = BatchLinearization(self, part).joint(v) * share
            found = one if found is None else found + one
        assert found is not None  # data without a batch is refused
        return found

    def linearize(
        self, batch: Batch | None = None, *, cache: int | str | None = "auto"
    ) -> Linearization:
        r"""$u$, $H$ as an operator and $v \mapsto J v$ at this point.

        With a batch they share its graph, which is kept until the linearisation is dropped.
        Without one, $H$ is a :class:`~woodbury.Hessian` over the data, which keeps the graphs of as
        many batches as ``cache`` has room for.
        """
        if batch is None:
            return DataLinearization(self, cache)
        return BatchLinearization(self, batch)

    def sampler(
        self, level: Level, batch_size: BatchSize = None, generator: torch.Generator | None = None
    ) -> Sampler:
        """A :class:`Sampler` of the batches of a loss; ``generator`` by default with seed 0."""
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        return Sampler(self.data[level], batch_size, generator)

    # ------------------------------------------------------------------- what oracles are made of

    def call(
        self,
        level: Level,
        params: Mapping[str, Tensor],
        hyper: Mapping[str, Tensor],
        batch: Batch | None,
    ) -> Tensor:
        """The loss on one batch, as a checked scalar."""
        arguments = [self.structured("params", params), self.structured("hyper", hyper)]
        value = self.losses[level](*arguments, *(() if batch is None else (batch.data,)))
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise GradientError(
                f"the {level} loss returned {shape}; it must return a scalar tensor"
            )
        if not torch.isfinite(value.detach()):
            raise NonFiniteError(
                f"the {level} loss is {value.item()}; check params, hyper and data for NaN"
            )
        return value

    def batches(
        self, level: Level, batch: Batch | None = None
    ) -> Iterator[tuple[Batch | None, float]]:
        """``batch`` alone, or all there are, each with its share of the rows."""
        data = self.data[level]
        if batch is not None or data is None:
            yield batch, 1.0
            return
        total = data.num_examples
        for part in data.passes(f"{level} loss"):
            yield part, part.size / total

    def mean(
        self,
        level: Level,
        params: Mapping[str, Tensor],
        hyper: Mapping[str, Tensor],
        batch: Batch | None = None,
    ) -> Tensor:
        """The mean loss as a differentiable scalar."""
        parts = []
        for part, share in self.batches(level, batch):
            parts.append(self.call(level, params, hyper, part) * share)
            self._count_gradient(level, part)
        return torch.stack(parts).sum()

    def gradient_parts(
        self, level: Level, batch: Batch | None = None, *, of_hyper: bool = True
    ) -> tuple[float, Tensor, Parts]:
        """The loss, its gradient in ``params`` (flat), and in ``hyper`` by name (``None``: unused).

        Without ``of_hyper`` the last is empty, and costs nothing.

        Raises:
            GradientError: the outer loss depends on none of ``params``, or the inner loss does not
                on one of them.
            NonFiniteError: the gradient holds NaN or infinity.
        """
        params = leaves(self.params)
        hyper = leaves(self.hyper) if of_hyper else detached(self.hyper)
        inputs = [*params.values(), *(hyper.values() if of_hyper else ())]
        value = 0.0
        sums: list[Tensor | None] = [None] * len(inputs)
        for part, share in self.batches(level, batch):
            with torch.enable_grad():
                result = self.call(level, params, hyper, part)
            value += result.item() * share
            self._count_gradient(level, part)
            if not result.requires_grad:
                continue
            found = torch.autograd.grad(result, inputs, allow_unused=True)
            sums = [add_scaled(s, piece, share) for s, piece in zip(sums, found, strict=True)]
        of_params = dict(zip(params, sums[: len(params)], strict=True))
        self.require_used(level, of_params)
        flat = self.flat_params(of_params)
        # A sum is finite where all entries are, but for an overflow: then they are looked at.
        bad = 0 if torch.isfinite(flat.sum()) else int((~torch.isfinite(flat)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {flat.numel()} entries of the {level} gradient are NaN or infinite"
            )
        if not of_hyper:
            return value, flat, {}
        parts = dict(zip(hyper, sums[len(params) :], strict=True))
        return value, flat, self.reduced(parts)

    def mixed_parts(self, v: Tensor, batch: Batch | None = None) -> Parts:
        r"""$J v$ by name, ``None`` where the inner gradient does not depend on it."""
        sums: Parts = dict.fromkeys(self.hyper)
        for part, share in self.batches("inner", batch):
            found = BatchLinearization(self, part).mixed_parts(v)
            sums = {name: add_scaled(sums[name], found[name], share) for name in sums}
        return sums

    def require_used(self, level: Level, of_params: Parts) -> None:
        """Raise where a gradient would be zero for a reason that nobody can have meant."""
        unused = [name for name, part in of_params.items() if part is None]
        if level == "outer" and len(unused) == len(of_params):
            raise GradientError(
                "the outer loss does not depend on params, so the inner problem does not matter to "
                "it; use the params given to the loss as its first argument, not tensors or a "
                "model from outside (for a module torch.func.functional_call)"
            )
        if level == "inner" and unused:
            raise GradientError(
                f"the inner loss does not depend on the parameters {unused}: its Hessian is "
                "singular there; leave them out of params"
            )

    def inner_objective(self) -> Objective:
        """The inner loss as an objective of ``params`` at fixed ``hyper``; it follows both."""
        if self._objective is None:
            data = self.data["inner"]

            def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
                part = None if data is None else Batch(0, batch, 0, slice(0))
                return self.call("inner", params, detached(self.hyper), part)

            rows = [torch.zeros(1)] if data is None else self._inner_data
            self._objective = Objective.functional(loss, self.params, rows)
        return self._objective

    def flat_params(self, parts: Parts) -> Tensor:
        """Parts by name as one flat ``[p]``, zeros for ``None``, reduced over processes."""
        filled = {name: or_zeros(parts[name], like) for name, like in self.params.items()}
        return self.reduce(self.space.flatten(filled))

    def flat_hyper(self, parts: Parts) -> Tensor:
        """Parts by name as one flat ``[h]``, zeros for ``None``."""
        filled = {name: or_zeros(parts[name], like) for name, like in self.hyper.items()}
        return self.hyper_space.flatten(filled)

    def reduced(self, parts: Parts) -> Parts:
        """Parts by name, reduced over processes."""
        return {name: None if p is None else self.reduce(p) for name, p in parts.items()}

    def _count_gradient(self, level: Level, part: Batch | None) -> None:
        if level == "inner":
            self.counts.inner_gradients += rows_of(part)
        else:
            self.counts.outer_gradients += rows_of(part)


def _batches(data: Iterable[Any] | None, space: Space) -> Batches | None:
    if data is None:
        return None
    device = torch.device("cpu") if space.device is None else space.device
    batches = Batches(data, device)
    _ = batches.num_examples  # refuses empty data before any work
    return batches


def _same(x: Tensor) -> Tensor:
    return x
