"""BSVRB, version 2: many inner problems, each with a tracked linear system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from woodbury.bilevel.algorithm import OptimizerLike, require_positive
from woodbury.bilevel.blockwise import Blockwise, _Point
from woodbury.bilevel.parts import Tensors

__all__ = ["BSVRBv2"]


class BSVRBv2(Blockwise):
    r"""Blockwise stochastic variance reduction for $m$ inner problems, without Hessians in memory.

    The problem, the samples and the trackers are those of :class:`BSVRBv1`. Instead of $H_i$,
    each block has $v_i \approx H_i^{-1} \nabla_y f_i$, moved by the tracker
    $u_i \approx \nabla^2_{yy} g_i\, v_i - \nabla_y f_i$, and

    $$G = \frac1I \sum_{i\text{ sampled}} \nabla_x f_i - \nabla^2_{xy} g_i\, v_i,\qquad
      z \leftarrow G + (1 - b)(z - G^-),\qquad x \leftarrow x - \eta z.$$

    Only sampled blocks move: $y_i \leftarrow y_i - \tau(1 + d_i) s_i$ and
    $v_i \leftarrow P_R[v_i - \tau_v(1 + d_i) u_i]$, where $d_i$ is the number of steps that missed
    the block since its last visit and $P_R$ the projection onto the ball of radius $R$. Blocks are
    drawn in random order, pass after pass, which keeps $d_i$ below ``2 m / I``; the steps have to
    be stable with that factor.

    Args:
        inner_loss: ``inner_loss(params, hyper, blocks, batch)``, the values $g_i$ ``[I]`` of
            ``blocks`` (int64 ``[I]``), each a mean over its rows. ``params`` come with a leading
            ``I``, and entry ``i`` of the values may depend on row ``i`` only.
        outer_loss: ``outer_loss(params, hyper, blocks, batch)``, the values $f_i$ ``[I]``.
        params: where the $y_i$ start, a tensor ``[m, ...]`` or a mapping of them; changed in place.
        hyper: $x$, a tensor or a mapping; changed in place.
        inner_data: tensors (a tuple, a mapping, one) with rows ``[N, ...]``, of which every block
            draws its own: ``batch`` has the same structure with ``[I, B, ...]``. ``None``: the
            loss takes ``batch=None``.
        outer_data: likewise for the outer loss.
        blocks: $I$; default all.
        batch_size: $B$, rows drawn with replacement; ``None`` for all rows.
        per_block: the data has one part for each block, ``[m, N, ...]``.
        tracking: $(a, g)$, as in :class:`BSVRBv1`.
        momentum: $b$.
        inner_step: $\tau$.
        adjoint_step: $\tau_v$; default $\tau$.
        outer: optimizer of ``hyper``, which is given $z$ for a gradient: a learning rate $\eta$, a
            factory, or an optimizer, as for :class:`BilevelAlgorithm`.
        radius: $R$.
        generator: source of the samples; default seed 0.

    Attributes:
        params: the tensors of the $y_i$, by name (``""`` for a single tensor).
        hyper: those of $x$.
        adjoints: the $v_i$ ``[m, p]``.
        steps: number of steps done.
        samples: number of rows that the losses were asked for, each counted once where it serves
            at two points.

    Raises:
        ArgumentError: a setting makes no sense.
        DataError: the data has no rows, or tensors of different lengths.
        DtypeError: ``params`` and ``hyper`` differ in dtype.
        ShapeError: ``params`` without a row for each block, or a loss that is not ``[I]``.
        NonFiniteError: in a step, a loss or a direction is NaN or infinite.

    Cost: a step takes gradients of both losses and one product with the Hessians of the sampled
    blocks, at two points (at one where ``g = 0`` and ``b = 1``). Memory ``O(m p)``.

    Source: Hu, Qiu, Guo, Zhang and Yang, "Blockwise Stochastic Variance-Reduced Methods with
    Parallel Speedup for Multi-Block Bilevel Optimization" (ICML 2023), version 2; defaults from
    the authors' code.

    Example:
        Three problems with one hyperparameter, $y_i^* = c_i x$ and $f_i = (y_i - 1)^2 / 2$, two of
        them at a time:

        >>> import torch
        >>> from woodbury.bilevel import BSVRBv2
        >>> c = torch.tensor([1.0, 2.0, 3.0]).double()
        >>> x = torch.zeros(1).double()
        >>> method = BSVRBv2(
        ...     lambda y, x, blocks, batch: 0.5 * (y - c[blocks, None] * x).square().sum(1),
        ...     lambda y, x, blocks, batch: 0.5 * (y - 1).square().sum(1),
        ...     torch.zeros(3, 1).double(), x, blocks=2, outer=0.01, inner_step=0.3,
        ... )
        >>> for _ in range(2000):
        ...     last = method.step()
        >>> bool((x - c.sum() / c.square().sum()).abs() < 0.02)
        True
    """

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
        inner_step: float = 1.0,
        adjoint_step: float | None = None,
        outer: OptimizerLike = 1e-3,
        radius: float = 10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            inner_loss,
            outer_loss,
            params,
            hyper,
            inner_data=inner_data,
            outer_data=outer_data,
            blocks=blocks,
            batch_size=batch_size,
            per_block=per_block,
            tracking=tracking,
            momentum=momentum,
            inner_step=inner_step,
            outer=outer,
            generator=generator,
        )
        adjoint_step = inner_step if adjoint_step is None else adjoint_step
        self.adjoint_step = require_positive(adjoint_step, "adjoint_step")
        self.radius = require_positive(radius, "radius")
        self.adjoints = torch.zeros_like(self._y)
        self._misfits = torch.zeros_like(self._y)
        self._missed = torch.zeros(self.count, dtype=torch.int64)

    def _hypergradients(
        self, blocks: Tensor, now: _Point, then: _Point | None
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        mean, misfit = self._mean(now, self.adjoints[blocks])
        before, earlier = (None, None)
        if then is not None:
            before, earlier = self._mean(then, self._before["adjoints"][blocks])
        return (mean, before), self._track(self._misfits[blocks], blocks, misfit, earlier)

    def _mean(self, point: _Point, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        product, mixed = self._products(point, adjoints, hessian=True)
        assert product is not None  # asked for
        return (point.outer_hyper - mixed) / self.sampled, product - point.outer_slopes

    def _kept(self) -> dict[str, Tensor]:
        return {"adjoints": self.adjoints.clone()}

    def _move(self, blocks: Tensor, moves: Tensor) -> None:
        self._misfits[blocks] = moves
        delay = (1 + self._missed[blocks]).to(self._y)[:, None]
        self._y[blocks] -= self.inner_step * delay * self._slopes[blocks]
        moved = self.adjoints[blocks] - self.adjoint_step * delay * moves
        length = moved.norm(dim=1, keepdim=True)
        self.adjoints[blocks] = moved * (self.radius / length.clamp_min(self.radius))
        self._missed += 1
        self._missed[blocks] = 0

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step: tensors and numbers, copied."""
        return {
            **super().state_dict(),
            "adjoints": self.adjoints.clone(),
            "misfits": self._misfits.clone(),
            "missed": self._missed.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, exactly; writes ``params`` and ``hyper``.

        Raises:
            ArgumentError: an entry is missing.
            ShapeError: a tensor has another shape.
        """
        super().load_state_dict(state)
        self.adjoints = state["adjoints"].to(self._y, copy=True)
        self._misfits = state["misfits"].to(self._y, copy=True)
        self._missed = state["missed"].clone()
