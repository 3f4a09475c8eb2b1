"""What a curvature operator asks of an objective: batches, outputs and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from woodbury.curvature.batches import Batch, Batches, Progress, split
from woodbury.curvature.finite import first_bad
from woodbury.curvature.functions import ModuleFunction, output_tensor
from woodbury.curvature.likelihoods import Categorical
from woodbury.curvature.losses import Criterion, reduce_losses, weighted_sum
from woodbury.curvature.probes import some_examples
from woodbury.errors import (
    DataError,
    DeviceError,
    DtypeError,
    GradientError,
    NonDeterministicError,
    NonFiniteError,
    ShapeError,
    StructureError,
)
from woodbury.spaces import Space

__all__ = ["Params", "Problem"]

Params = Mapping[str, Tensor]

# Examples that are enough to see whether a loss is the same twice.
_PROBED = 4


class Problem:
    """The part of :class:`~woodbury.Objective` that operators use; users see the objective only."""

    _predict: Callable[[Params, Batch], Any] | None
    _criterion: Criterion | None
    _loss: Callable[[Params, Any], Any] | None
    _mode: str

    def _setup(
        self,
        params: Params,
        data: Any,
        weights: Tensor | None,
        l2: float | Tensor,
        allow_unused: bool,
        progress: Progress | None,
        *,
        paired: bool,
    ) -> None:
        self.space = Space.of(params)
        dtype = next(iter(params.values())).dtype
        if not dtype.is_floating_point:
            raise DtypeError(
                f"parameters are {dtype}; objectives are of real floating-point numbers"
            )
        self._params = {name: tensor.detach() for name, tensor in params.items()}
        self.allow_unused = allow_unused
        self._batches = Batches(data, self.device, progress, paired=paired)
        self.l2 = self._checked_l2(l2)
        self._weights = self._checked_weights(weights)
        self._verified = False
        self.seen_symmetric = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self._params.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self._params.values())).device

    @property
    def num_examples(self) -> int:
        """``N``; asked first, it costs a pass over the data where that is not in memory."""
        return self._batches.num_examples

    @property
    def known_examples(self) -> int | None:
        """``N`` where it is known without another pass over the data."""
        return self._batches.known_examples

    def share(self, batch: Batch) -> float:
        """About what part of all examples are in ``batch``; 0 where nobody knows."""
        if self.known_examples is not None:
            return batch.size / self.known_examples
        return self._batches.share

    @property
    def criterion(self) -> Criterion:
        """The criterion on outputs.

        Raises:
            StructureError: the objective is functional, and given as a loss only.
        """
        if self._criterion is None:
            raise StructureError(
                "this objective is given as a loss only; outputs, Gauss-Newton and Fisher need "
                "Objective.functional(..., predict=..., criterion=...)"
            )
        return self._criterion

    def params_vector(self) -> Tensor:
        """The parameters as one new flat vector ``[n]``."""
        return self.space.flatten(self._params).clone()

    @property
    def replayed(self) -> bool:
        """Whether examples depend on their batch (batch norm, replayed dropout)."""
        return self._mode == "train"

    def leaves(self) -> dict[str, Tensor]:
        """The parameters as leaves of a new graph, without copies."""
        return {name: p.detach().requires_grad_() for name, p in self._params.items()}

    def versions(self) -> list[int]:
        """Numbers that change when a parameter is changed in place."""
        return [p._version for p in self._params.values()]

    def batches(self, what: str, start: int = 0) -> Iterator[Batch]:
        """One pass over the data, after the first batch was seen to be deterministic once."""
        if not self._verified:
            self._verify()
            self._verified = True
        return self._batches.passes(what, start)

    def identity(self) -> list[Any]:
        """What weighted losses depend on beside the data, as tensors and words to be hashed.

        Functions that the user gave are seen by their names only.
        """
        found: list[Any] = [repr(self.space), self.params_vector(), self._weights, self._mode]
        if isinstance(self._predict, ModuleFunction):
            found += [self._predict.constants, self._predict.buffers]
        if self._criterion is not None:
            found.append(self._criterion.identity())
        return found

    def resident(self, batch: Batch) -> list[Tensor]:
        """Tensors that stay in memory whether or not a linearisation of ``batch`` is kept."""
        tensors = list(self._params.values())
        if isinstance(self._predict, ModuleFunction):
            tensors += [*self._predict.constants.values(), *self._predict.buffers.values()]
        if batch.resident:
            tensors += [leaf for leaf in tree_leaves(batch.data) if isinstance(leaf, Tensor)]
        return tensors

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """The outputs ``[B, ...]`` of a batch."""
        criterion = self.criterion
        assert self._predict is not None  # comes with the criterion
        output, named = output_tensor(self._predict(params, batch), batch.size)
        if named and isinstance(criterion, Categorical):
            criterion.classes_last = True
        return output

    def target(self, batch: Batch) -> Any:
        """What the criterion compares the outputs of a batch with."""
        try:
            return split(batch.data)[2]
        except DataError:
            return batch.data

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Losses ``[B]`` of a batch without weights, or their mean where there is only that."""
        if self._loss is not None:
            return reduce_losses(self._loss(params, batch.data), batch.size)
        return self.criterion.losses(self.outputs(params, batch), self.target(batch), batch.size)

    def batch_loss(self, params: Params, batch: Batch) -> Tensor:
        """``sum_i w_i loss_i`` over a batch, seen to be finite."""
        losses = self.losses(params, batch)
        total = weighted_sum(losses, self.batch_weights(batch), batch.size)
        if not torch.isfinite(total.detach()):
            raise NonFiniteError(
                f"the loss of batch {batch.index} ({batch.size} examples) is {total.item()}"
                f"{first_bad(losses, batch)}; check that batch for NaN or extreme values, and the "
                "parameters"
            )
        return total

    def batch_weights(self, batch: Batch) -> Tensor | None:
        """The weights of the examples of a batch."""
        return batch.select(self._weights)

    def require_used(self, used: set[str]) -> None:
        """Raise if the loss does not depend on a parameter, unless that was allowed."""
        unused = [name for name in self.space.shapes if name not in used]
        if unused and not self.allow_unused:
            raise GradientError(
                f"the loss does not depend on {', '.join(map(repr, unused))}; leave these "
                "parameters out with params=..., or pass allow_unused=True to give them zero rows "
                "and columns"
            )

    def require_rows(self, what: str) -> None:
        """Raise unless it is known which row of the data each example is."""
        self._batches.require_rows(what)

    def require_numbers(self) -> None:
        """Raise unless row numbers that batches carry are those of all examples, each once.

        Cost: a pass over the data without the model, the first time.
        """
        self._batches.require_numbers()

    def in_order(self, pieces: list[tuple[slice | Tensor, Tensor]]) -> Tensor:
        """Rows computed per batch, put into the order of the data."""
        shapes = {piece.shape[1:] for _, piece in pieces}
        if len(shapes) > 1:
            raise ShapeError(
                f"batches have outputs of several shapes {sorted(tuple(s) for s in shapes)}; pad "
                "them to one shape"
            )
        if all(isinstance(rows, slice) for rows, _ in pieces):
            return torch.cat([piece for _, piece in pieces])
        values = torch.cat([piece for _, piece in pieces])
        result = torch.empty_like(values)
        result[self._permutation([rows for rows, _ in pieces])] = values
        return result

    def _permutation(self, rows: list[Any]) -> Tensor:
        order = torch.cat([torch.as_tensor(part, device=self.device) for part in rows])
        if not torch.equal(order.sort().values, torch.arange(len(order), device=self.device)):
            raise DataError(
                f"the indices in the batches are not the numbers 0 to {len(order) - 1}, each once"
            )
        return order

    def _verify(self) -> None:
        """Look at a few examples of the first batch, or at all of it where it cannot be cut."""
        whole = self._batches.first()
        if isinstance(self._predict, ModuleFunction):
            self._predict.require_shifted(whole)
        few = some_examples(whole, 0, min(whole.size, _PROBED))
        try:
            self._verify_on(few)
        except (RuntimeError, ValueError, IndexError):
            self._verify_on(whole)

    def _verify_on(self, batch: Batch) -> None:
        with torch.no_grad():
            first, second = (self.batch_loss(self._params, batch) for _ in range(2))
            scale = 16 * torch.finfo(first.dtype).eps * max(1.0, first.abs().item())
            if (first - second).abs().item() > scale:
                raise NonDeterministicError(
                    f"two evaluations of the first batch gave {first.item()} and {second.item()}; "
                    "products would be inconsistent: take the randomness out, or use mode='train', "
                    "which replays what torch draws"
                )
            if self._loss is None or self._criterion is None:
                return
            other = self._criterion.losses(
                self.outputs(self._params, batch), self.target(batch), batch.size
            )
            third = weighted_sum(other, self.batch_weights(batch), batch.size)
            if not torch.isclose(first, third, rtol=1e-3, atol=scale):
                raise DataError(
                    f"loss and criterion(predict) differ on the first batch: {first.item()} and "
                    f"{third.item()}; leave loss out, and put regularisers into l2"
                )

    def _checked_l2(self, l2: float | Tensor) -> float | Tensor:
        if not bool(torch.isfinite(torch.as_tensor(l2)).all()):
            raise NonFiniteError("l2 holds NaN or infinity")
        if not isinstance(l2, Tensor):
            return float(l2)
        if l2.dim() == 0:
            return l2.item()
        if l2.shape != (self.space.dim,):
            raise ShapeError(
                f"l2 has shape {tuple(l2.shape)}, expected a number or [{self.space.dim}]"
            )
        if l2.dtype != self.dtype:
            raise DtypeError(f"l2 is {l2.dtype}, the parameters are {self.dtype}")
        return l2.detach().to(self.device).clone()

    def _checked_weights(self, weights: Tensor | None) -> Tensor | None:
        if weights is None:
            return None
        self._batches.require_rows("weights per example")
        self._batches.require_numbers()
        if weights.shape != (self.num_examples,):
            raise ShapeError(
                f"weights have shape {tuple(weights.shape)}, expected [{self.num_examples}], one "
                "per example"
            )
        if weights.device != self.device:
            raise DeviceError(f"weights are on {weights.device}, the parameters on {self.device}")
        if not bool(torch.isfinite(weights).all()):
            raise NonFiniteError("weights hold NaN or infinity")
        return weights.detach().to(self.dtype)

    def output_shape(self) -> torch.Size:
        """The shape of the outputs of one example, found on the first batch."""
        with torch.no_grad():
            return self.outputs(self._params, self._batches.first()).shape[1:]
