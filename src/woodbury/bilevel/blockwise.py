"""What both versions of BSVRB share: many inner problems, few of them sampled at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from woodbury.bilevel.algorithm import (
    OptimizerLike,
    advance,
    as_optimizer,
    require_apart,
    require_positive,
)
from woodbury.bilevel.parts import Tensors, named, or_zeros, write
from woodbury.errors import ArgumentError, DataError, DtypeError, NonFiniteError, ShapeError
from woodbury.spaces import Space

__all__ = ["Blockwise", "BlockwiseStep"]


@dataclass(frozen=True)
class BlockwiseStep:
    r"""What one step of BSVRB saw.

    Attributes:
        outer_value: mean of $f_i$ over the sampled blocks and rows, before the step.
        inner_value: mean of $g_i$, likewise.
        direction_norm: $\|z\|$, the length of the direction taken in ``hyper``.
        blocks: the sampled blocks ``[I]``.

    Example:
        >>> import torch
        >>> from woodbury.bilevel import BSVRBv2
        >>> inner = lambda y, x, blocks, batch: (y - x).square().sum(1)
        >>> outer = lambda y, x, blocks, batch: (y - 1).square().sum(1)
        >>> method = BSVRBv2(inner, outer, torch.zeros(3, 2), torch.ones(2))
        >>> method.step().blocks.tolist()
        [0, 1, 2]
    """

    outer_value: float
    inner_value: float
    direction_norm: float
    blocks: Tensor


@dataclass(frozen=True)
class _Point:
    """Both losses of the sampled blocks to second order, at one point."""

    hyper: dict[str, Tensor]
    rows: Tensor  # [I, p], a leaf
    slopes: Tensor  # gradients of the inner losses, with their graph
    outer_slopes: Tensor
    outer_hyper: Tensor  # summed over the blocks, [h]
    values: tuple[float, float]


class Blockwise:
    """State, samples, trackers and the STORM direction; see :class:`BSVRBv1` and `BSVRBv2`."""

    def __init__(
        self,
        inner_loss: Callable[..., Tensor],
        outer_loss: Callable[..., Tensor],
        params: Tensors,
        hyper: Tensors,
        *,
        inner_data: Any = None,
        outer_data: Any = None,
        blocks: int | None = None,
        batch_size: int | None = None,
        per_block: bool = False,
        tracking: tuple[float, float] = (0.9, 1.0),
        momentum: float = 0.9,
        inner_step: float = 0.5,
        outer: OptimizerLike = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        self.params, self._params_named = named(params, "params")
        self.hyper, self._hyper_named = named(hyper, "hyper")
        require_apart(self.params, self.hyper)
        self._hyper_space = Space.of(self.hyper)
        if any(tensor.dim() < 1 for tensor in self.params.values()):
            raise ShapeError("params hold a scalar; a row for each block is needed, [m, ...]")
        counts = {tensor.shape[0] for tensor in self.params.values()}
        if len(counts) > 1 or 0 in counts:
            raise ShapeError(f"params have {sorted(counts)} rows; they need one m >= 1 for all")
        self.count = counts.pop()
        kind = Space.of({name: tensor[0] for name, tensor in self.params.items()})
        self._space = kind
        if kind.dtype != self._hyper_space.dtype:
            raise DtypeError(
                f"params are {kind.dtype} and hyper {self._hyper_space.dtype}; convert one"
            )
        self.sampled = self.count if blocks is None else blocks
        if not 1 <= self.sampled <= self.count:
            raise ArgumentError(f"blocks is {blocks}; there are {self.count} blocks to sample from")
        a, g = tracking
        if not (0 < a <= 1 and 0 <= g < math.inf):
            raise ArgumentError(f"tracking is {tracking}; it needs 0 < a <= 1 and g >= 0")
        if not 0 < momentum <= 1:
            raise ArgumentError(f"momentum is {momentum}; it must be in (0, 1]")
        self.tracking, self.momentum = (a, g), momentum
        self.inner_step = require_positive(inner_step, "inner_step")
        self.outer_optimizer = as_optimizer(outer, self.hyper, "outer")
        self._losses = {"inner": inner_loss, "outer": outer_loss}
        self._data = {"inner": inner_data, "outer": outer_data}
        self._per_block, self._batch_size = per_block, batch_size
        self._rows = {which: self._rows_of(which) for which in self._data}
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        # Everything below changes from step to step.
        self.steps = 0
        self.samples = 0
        self._order = torch.zeros(0, dtype=torch.int64)
        self._y = self._gather()
        self._visited = torch.zeros(self.count, dtype=torch.bool)
        self._slopes = torch.zeros_like(self._y)
        self._direction = torch.zeros_like(self._hyper_space.flatten(self.hyper).detach())
        self._before: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------- steps

    def step(self) -> BlockwiseStep:
        """Take one step: sample blocks and rows, track, move ``hyper``, then the inner variables.

        Raises:
            NonFiniteError: a loss or a direction is NaN or infinite; nothing was changed but the
                source of the samples.
        """
        blocks, batches = self._draw()
        x = self._hyper_space.flatten(self.hyper).detach().clone()
        now = self._at(x, self._y[blocks], blocks, batches)
        # The same samples at the point before: what changed is free of most of their noise.
        again = bool(self._before) and (self.tracking[1] > 0 or self.momentum < 1)
        then = None
        if again:
            then = self._at(self._before["hyper"], self._before["rows"][blocks], blocks, batches)
        tracked = self._track(
            self._slopes[blocks],
            blocks,
            now.slopes.detach(),
            None if then is None else then.slopes.detach(),
        )
        mean, moves = self._hypergradients(blocks, now, then)
        direction = mean[0]
        if self._before and mean[1] is not None:
            direction = mean[0] + (1 - self.momentum) * (self._direction - mean[1])
        for what, vector in (("hyper", direction), ("params", tracked)):
            if not torch.isfinite(vector).all():
                raise NonFiniteError(
                    f"the direction of {what} is NaN or infinite after {self.steps} steps: reduce "
                    f"the rate of the outer optimizer, or inner_step (now {self.inner_step:g})"
                )
        self._before = {"hyper": x, "rows": self._y.clone(), **self._kept()}
        self._slopes[blocks] = tracked
        self._direction = direction
        self._move(blocks, moves)
        advance(self.outer_optimizer, self.hyper, self._hyper_space.unflatten(direction))
        self._scatter()
        self._visited[blocks] = True
        self.steps += 1
        return BlockwiseStep(
            outer_value=now.values[1] / self.sampled,
            inner_value=now.values[0] / self.sampled,
            direction_norm=direction.norm().item(),
            blocks=blocks,
        )

    def _hypergradients(
        self, blocks: Tensor, now: _Point, then: _Point | None
    ) -> tuple[tuple[Tensor, Tensor | None], Any]:
        """Mean hypergradient of the sampled blocks now and then, and what :meth:`_move` needs."""
        raise NotImplementedError

    def _move(self, blocks: Tensor, moves: Any) -> None:
        """Move the inner variables (and those of the linear systems)."""
        raise NotImplementedError

    def _kept(self) -> dict[str, Tensor]:
        """What has to be known of this step in the next, besides the point."""
        return {}

    def _track(self, old: Tensor, blocks: Tensor, now: Tensor, then: Tensor | None) -> Tensor:
        """MSVR: ``(1 - a) old + a now + g (now - then)``; a block's first visit starts it."""
        a, g = self.tracking
        tracked = (1 - a) * old + a * now
        if then is not None and g:
            tracked = tracked + g * (now - then)
        first = ~self._visited[blocks].to(now.device)
        return torch.where(first.reshape(-1, *[1] * (now.dim() - 1)), now, tracked)

    # ------------------------------------------------------------------------------------ oracles

    def _at(self, x: Tensor, rows: Tensor, blocks: Tensor, batches: dict[str, Any]) -> _Point:
        hyper = {
            name: part.detach().requires_grad_()
            for name, part in self._hyper_space.unflatten(x).items()
        }
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            inner = self._values("inner", leaf, hyper, blocks, batches["inner"])
            (slopes,) = torch.autograd.grad(inner.sum(), [leaf], create_graph=True)
            outer = self._values("outer", leaf, hyper, blocks, batches["outer"])
            inputs = [leaf, *hyper.values()]
            found = torch.autograd.grad(outer.sum(), inputs, allow_unused=True)
        of_hyper = dict(zip(hyper, found[1:], strict=True))
        return _Point(
            hyper,
            leaf,
            slopes,
            or_zeros(found[0], leaf),
            self._flat_hyper(of_hyper),
            (inner.sum().item(), outer.sum().item()),
        )

    def _products(self, point: _Point, V: Tensor, hessian: bool) -> tuple[Tensor | None, Tensor]:
        """``H_i v_i [I, p]`` where asked for, and ``sum_i J_i v_i [h]``, from one backward pass."""
        inputs = [*point.hyper.values(), *([point.rows] if hessian else [])]
        found: Any = [None] * len(inputs)
        if point.slopes.requires_grad:
            found = torch.autograd.grad(
                [point.slopes], inputs, [V], retain_graph=True, allow_unused=True
            )
        of_hyper = dict(zip(point.hyper, found, strict=False))
        product = or_zeros(found[-1], point.rows) if hessian else None
        return product, self._flat_hyper(of_hyper)

    def _values(
        self, which: str, rows: Tensor, hyper: dict[str, Tensor], blocks: Tensor, batch: Any
    ) -> Tensor:
        parts, start = {}, 0
        for name, shape in self._space.shapes.items():
            stop = start + self._space.sizes[name]
            parts[name] = rows[:, start:stop].reshape(len(blocks), *shape)
            start = stop
        y = parts if self._params_named else parts[""]
        x = hyper if self._hyper_named else hyper[""]
        values = self._losses[which](y, x, blocks.to(rows.device), batch)
        if not isinstance(values, Tensor) or values.shape != (len(blocks),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(
                f"the {which} loss returned {got}; it must return one value for each of the "
                f"{len(blocks)} sampled blocks"
            )
        if not torch.isfinite(values.detach()).all():
            raise NonFiniteError(
                f"the {which} loss of block {blocks[int((~torch.isfinite(values)).int().argmax())]}"
                f" is NaN or infinite after {self.steps} steps: check the data, or reduce the steps"
            )
        return values

    def _flat_hyper(self, parts: Mapping[str, Tensor | None]) -> Tensor:
        return self._hyper_space.flatten(
            {name: or_zeros(parts[name], like) for name, like in self.hyper.items()}
        )

    # ------------------------------------------------------------------------------------ samples

    def _rows_of(self, which: str) -> int:
        leaves = [t for t in tree_leaves(self._data[which]) if isinstance(t, Tensor)]
        if self._data[which] is None:
            return 0
        axis = int(self._per_block)
        if not leaves or any(t.dim() <= axis for t in leaves):
            raise DataError(f"{which}_data must hold tensors with a row per example")
        sizes = {t.shape[axis] for t in leaves}
        if len(sizes) > 1 or 0 in sizes:
            raise DataError(f"the tensors of {which}_data have {sorted(sizes)} rows")
        if self._per_block and any(t.shape[0] != self.count for t in leaves):
            raise DataError(
                f"per_block needs {which}_data of shape [m, rows, ...] with m = {self.count}"
            )
        size = self._batch_size
        if size is not None and size < 1:
            raise ArgumentError(f"batch_size is {size}; it must be at least 1, or None for all")
        return sizes.pop()

    def _draw(self) -> tuple[Tensor, dict[str, Any]]:
        if self.sampled == self.count:
            blocks = torch.arange(self.count)
        else:
            if len(self._order) < self.sampled:
                self._order = torch.randperm(self.count, generator=self.generator)
            blocks, self._order = self._order.split([self.sampled, len(self._order) - self.sampled])
        return blocks, {which: self._draw_rows(which, blocks) for which in self._data}

    def _draw_rows(self, which: str, blocks: Tensor) -> Any:
        data, total = self._data[which], self._rows[which]
        if data is None:
            return None
        size = self._batch_size
        if size is None:
            self.samples += len(blocks) * total

            def whole(t: Any) -> Any:
                if not isinstance(t, Tensor):
                    return t
                return (
                    t[blocks.to(t.device)] if self._per_block else t.expand(len(blocks), *t.shape)
                )

            return tree_map(whole, data)
        self.samples += len(blocks) * size
        rows = torch.randint(total, (len(blocks), size), generator=self.generator)

        def pick(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            at = rows.to(t.device)
            return t[blocks.to(t.device)[:, None], at] if self._per_block else t[at]

        return tree_map(pick, data)

    # -------------------------------------------------------------------------------------- state

    def _gather(self) -> Tensor:
        parts = [t.detach().reshape(self.count, -1) for t in self.params.values()]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0].clone()

    def _scatter(self) -> None:
        start = 0
        with torch.no_grad():
            for name, tensor in self.params.items():
                stop = start + self._space.sizes[name]
                tensor.copy_(self._y[:, start:stop].reshape(tensor.shape))
                start = stop

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step: tensors and numbers, copied."""
        return {
            "params": self._y.clone(),
            "hyper": self._hyper_space.flatten(self.hyper).detach().clone(),
            "visited": self._visited.clone(),
            "slopes": self._slopes.clone(),
            "direction": self._direction.clone(),
            "outer_optimizer": copy.deepcopy(self.outer_optimizer.state_dict()),
            "before": {name: tensor.clone() for name, tensor in self._before.items()},
            "order": self._order.clone(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, exactly; writes ``params`` and ``hyper``.

        Raises:
            ArgumentError: an entry is missing.
            ShapeError: a tensor has another shape.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state]
        if missing:
            raise ArgumentError(f"the state lacks {missing}")
        for name, tensor in own.items():
            free = name in ("order", "generator", "before")  # of any length
            given = state[name]
            if isinstance(tensor, Tensor) and not free and given.shape != tensor.shape:
                raise ShapeError(
                    f"{name!r} of the state has shape {tuple(given.shape)}, expected "
                    f"{tuple(tensor.shape)}"
                )
        like = self._y
        self._y = state["params"].to(like, copy=True)
        self._slopes = state["slopes"].to(like, copy=True)
        self._direction = state["direction"].to(like, copy=True)
        self._visited = state["visited"].clone()
        self._before = {k: v.to(like, copy=True) for k, v in state["before"].items()}
        self._order = state["order"].clone()
        self.generator.set_state(state["generator"])
        self.outer_optimizer.load_state_dict(copy.deepcopy(state["outer_optimizer"]))
        self.steps, self.samples = int(state["steps"]), int(state["samples"])
        write(self._hyper_space, self.hyper, state["hyper"].to(like))
        self._scatter()
