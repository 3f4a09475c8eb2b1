"""A training objective: a mean over examples plus a regulariser, as a function of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from woodbury.curvature.batches import Batch, Batches, Progress, batch_size
from woodbury.curvature.criteria import make_criterion
from woodbury.curvature.functions import (
    ModuleFunction,
    Selection,
    select_parameters,
)
from woodbury.curvature.losses import Criterion, per_example
from woodbury.curvature.problem import Params, Problem
from woodbury.errors import (
    ArgumentError,
    ShapeError,
)

__all__ = ["Objective"]


class Objective(Problem):
    r"""A mean loss over examples plus a quadratic regulariser.

    $$ F(\theta) = \frac1N \sum_{i=1}^N w_i\,\ell_i(\theta) + \frac12 \sum_j \lambda_j \theta_j^2.
    $$

    The mean is over **examples**, whatever the sizes of the batches. An example whose target has
    several elements (tokens, pixels) has for loss the mean over its own elements, or their sum
    where the criterion says ``reduction="sum"``; elements with ``ignore_index`` do not count, and
    weights per class multiply and are not divided out. The weights $w_i$ are not normalised.

    The objective is a pure function of the selected parameters. The model is never changed: not its
    parameters, gradients, buffers or training modes. Parameters that are not selected are
    constants; tied weights are one parameter under the first of their names; buffers are those of
    the moment the objective is made.

    Args:
        model: any module. It returns a tensor ``[B, ...]``, a tuple that starts with one, or an
            object or mapping with ``logits`` (whose classes are then on the last axis).
        criterion: ``"cross_entropy"``, ``"mse"``, a loss module of torch with any reduction, or a
            callable ``(output, target)`` that returns losses ``[B]`` or their mean, a scalar.
        data: one batch (a tuple of tensors, a mapping, a ``TensorDataset``), a list of batches, a
            ``DataLoader``, or any object that can be iterated over again and again. A batch is
            ``(inputs, targets)``, ``(inputs, targets, indices)``, or a mapping with ``labels``
            whose other entries are keyword arguments of the model (and ``indices`` says which rows
            these are). Batches are moved to the device of the parameters. A shuffling loader is
            replayed in the order of its first pass; whatever needs to know which row is which then
            needs ``indices``.
        weights: ``[N]``, one per example in the order of the data; default 1.
        l2: $\lambda$: a number, or a flat tensor ``[n]`` with one per parameter entry.
        params: names, a list of parameters, or a function ``(name, parameter) -> bool`` of those
            that require a gradient; default all that require a gradient.
        mode: ``"eval"``: dropout and batch norm frozen. ``"train"``: dropout draws the same numbers
            for a batch at every evaluation, batch norm uses the statistics of the batch.
        seed: of the random numbers in mode ``"train"``.
        allow_unused: treat parameters that the loss does not depend on as such, with zero rows and
            columns, instead of raising.
        progress: called as ``progress(what, batches_done, batches_in_all_or_None)`` after each
            batch.

    Raises:
        ArgumentError: a criterion, mode or parameter that is not known.
        DataError: the data cannot be iterated over twice, or not in a form that is known; weights
            per row with a shuffling loader.
        ShapeError: ``weights`` or ``l2`` of another size.
        DtypeError, DeviceError: parameters of several dtypes or on several devices.
        GradientError: nothing is selected; at use, a parameter that the loss does not depend on, or
            a model with activation checkpointing, which would recompute with its own parameters.
        NonDeterministicError: at the first use, two evaluations of the first batch differ.
        NonFiniteError: at use, the loss of a batch is NaN or infinite.

    Cost: nothing but copies of the buffers, and with ``weights`` a pass over the data to count it.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, "mse", (x, y), l2=0.5)
        >>> objective.value()  # (1 + 4) / 2 + 0.25 * 2
        tensor(3.)
        >>> objective.gradient()
        tensor([1.5000, 4.5000])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        data: Any,
        *,
        weights: Tensor | None = None,
        l2: float | Tensor = 0.0,
        params: Selection = None,
        mode: str = "eval",
        seed: int = 0,
        allow_unused: bool = False,
        progress: Progress | None = None,
    ) -> None:
        selected = select_parameters(model, params)
        self._predict: Callable[[Params, Batch], Any] | None = ModuleFunction(
            model, selected, mode, seed
        )
        self._criterion: Criterion | None = make_criterion(criterion)
        self._loss: Callable[[Params, Any], Any] | None = None
        self._mode = mode
        self._setup(selected, data, weights, l2, allow_unused, progress, paired=True)

    @classmethod
    def functional(
        cls,
        loss: Callable[[Params, Any], Tensor] | None,
        params: Params,
        data: Any,
        *,
        predict: Callable[[Params, Any], Tensor] | None = None,
        criterion: Any = None,
        weights: Tensor | None = None,
        l2: float | Tensor = 0.0,
        allow_unused: bool = False,
        progress: Progress | None = None,
    ) -> Objective:
        r"""An objective given by functions instead of a module.

        Args:
            loss: ``(params, batch)`` to losses ``[B]`` or their mean, a scalar. May be ``None``
                where ``predict`` and ``criterion`` are given.
            params: named tensors of one dtype on one device.
            data: as for :class:`Objective`; batches may have any form, and ``B`` is the length of
                the first tensor in them.
            predict: ``(params, batch)`` to outputs ``[B, ...]``; needed for Gauss-Newton and
                Fisher.
            criterion: as for :class:`Objective`. Its target is the second part of a batch that is a
                tuple, ``labels`` of a mapping, the batch itself otherwise.
            weights: as for :class:`Objective`.
            l2: as for :class:`Objective`.
            allow_unused: as for :class:`Objective`.
            progress: as for :class:`Objective`.

        Returns:
            The objective.

        Raises:
            ArgumentError: neither ``loss`` nor ``predict`` with ``criterion``.
            DataError: at the first use, ``loss`` and ``criterion`` of ``predict`` differ.

        Cost: nothing but a pass over the data with ``weights``.

        Example:
            >>> import torch
            >>> from woodbury import Objective
            >>> def loss(params, x):
            ...     return ((x @ params["w"]) ** 2).mean()
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> Objective.functional(loss, {"w": torch.tensor([2.0])}, [x]).gradient()
            tensor([20.])
        """
        if (predict is None) != (criterion is None):
            raise ArgumentError("predict and criterion belong together; one of them is missing")
        if loss is None and predict is None:
            raise ArgumentError("give a loss, or predict and criterion")
        if not isinstance(params, Mapping) or not params:
            raise ArgumentError("params must be a mapping from names to tensors, with at least one")
        objective = cls.__new__(cls)
        objective._loss = loss
        objective._predict = None
        if predict is not None:
            objective._predict = lambda values, batch: predict(values, batch.data)
        objective._criterion = None if criterion is None else make_criterion(criterion)
        objective._mode = "functional"
        objective._setup(params, data, weights, l2, allow_unused, progress, paired=False)
        return objective

    # ------------------------------------------------------------ what it is

    @property
    def weights(self) -> Tensor | None:
        """``[N]``, or ``None`` where all are 1."""
        return self._weights

    def with_params(self, flat: Tensor) -> Objective:
        """The same objective at other parameter values ``[n]`` (copied)."""
        self.space.check(flat, "params")
        if flat.dim() != 1:
            raise ShapeError(f"params have shape {tuple(flat.shape)}, expected [{self.space.dim}]")
        other = copy.copy(self)
        other._params = self.space.unflatten(flat.detach().clone())
        return other

    def with_weights(self, weights: Tensor | None) -> Objective:
        """The same objective with other weights ``[N]``."""
        other = copy.copy(self)
        other._weights = self._checked_weights(weights)
        return other

    @property
    def data(self) -> Any:
        """What gives the batches, the same at every pass."""
        return self._batches.source

    def with_data(self, data: Any) -> Objective:
        """The same model, criterion and parameters on other data, without weights per example."""
        other = copy.copy(self)
        before = self._batches
        other._batches = Batches(data, self.device, before.progress, paired=before.paired)
        other._weights, other._verified = None, False
        return other

    def measuring(self, measurement: Callable[[Tensor, Any], Tensor], data: Any) -> Objective:
        """What is measured of the outputs on ``data``, in the place of the loss.

        Args:
            measurement: ``(outputs, batch)`` to one number for each example, ``[B]``.
            data: as for :class:`Objective`.

        Raises:
            StructureError: at use, the objective is given as a loss only.
        """
        other = self.with_data(data)

        def measure(params: Params, raw: Any) -> Tensor:
            size = batch_size(raw)
            return measurement(self.outputs(params, Batch(0, raw, size, slice(0, size))), raw)

        other._loss, other._predict, other._criterion = measure, None, None
        return other

    # ------------------------------------------------------- what it is worth

    def value(self) -> Tensor:
        """``F(theta)``, a scalar. Cost: a forward pass over the data."""
        total = 0.0
        with torch.no_grad():
            for batch in self.batches("value"):
                total += self.batch_loss(self._params, batch).item()
            theta = self.params_vector()
            penalty = 0.5 * (theta.square() * self.l2).sum().item()
        return torch.tensor(
            total / self.num_examples + penalty, dtype=self.dtype, device=self.device
        )

    def gradient(self) -> Tensor:
        """The gradient of ``F``, flat ``[n]``. Cost: a forward and a backward pass."""
        total = torch.zeros(self.space.dim, dtype=self.dtype, device=self.device)
        parts = self.space.unflatten(total)
        used: set[str] = set()
        for batch in self.batches("gradient"):
            leaves = self.leaves()
            with torch.enable_grad():
                loss = self.batch_loss(leaves, batch)
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    used.add(name)
                    parts[name].add_(gradient)
        self.require_used(used)
        total /= self.num_examples
        return total.add_(self.params_vector().mul_(self.l2))

    def per_example_losses(self) -> Tensor:
        """The losses ``[N]`` without weights and regulariser. Cost: a forward pass."""
        self._batches.require_rows("losses per example")
        with torch.no_grad():
            pieces = [
                (batch.rows, per_example(self.losses(self._params, batch), "losses per example"))
                for batch in self.batches("losses")
            ]
        return self.in_order(pieces)

    def predict(self) -> Tensor:
        """The outputs ``[N, ...]``. Cost: a forward pass.

        Raises:
            StructureError: the objective is functional, and given as a loss only.
            ShapeError: batches have outputs of several shapes.
        """
        self._batches.require_rows("outputs per example")
        with torch.no_grad():
            pieces = [
                (batch.rows, self.outputs(self._params, batch)) for batch in self.batches("outputs")
            ]
        return self.in_order(pieces)

    def per_example_gradients(self, rows: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        r"""The gradients $\nabla\ell_i$ of the losses without weights and regulariser, in chunks.

        Args:
            rows: examples in a chunk; default as many as take 64 MiB.

        Returns:
            An iterator over pairs: places in the data ``[b]`` and gradients ``[b, n]``.

        Raises:
            ArgumentError: ``rows`` is not positive.
            DataError: a shuffling loader, or a loss that is a scalar per batch.

        Cost: about one gradient where torch can vectorise the model over examples, ``N`` small
        backward passes otherwise and in mode ``"train"``.

        Example:
            >>> import torch
            >>> from woodbury import Objective
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> objective = Objective.functional(
            ...     lambda p, x: (x @ p["w"]) ** 2, {"w": torch.tensor([2.0])}, [x]
            ... )
            >>> for rows, gradients in objective.per_example_gradients():
            ...     print(rows, gradients)
            tensor([0, 1]) tensor([[ 4.],
                                   [36.]])
        """
        from woodbury.curvature.per_example import per_example_gradients

        return per_example_gradients(self, rows)
