"""BSVRB, version 1: many inner problems, each with a tracked Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from woodbury.bilevel.algorithm import OptimizerLike, require_positive
from woodbury.bilevel.blockwise import Blockwise, _Point
from woodbury.bilevel.parts import Tensors
from woodbury.implicit import project_semidefinite
from woodbury.operators import BlockDiagonal
from woodbury.solvers import Recipe, solve

__all__ = ["BSVRBv1"]


class BSVRBv1(Blockwise):
    r"""Blockwise stochastic variance reduction for $m$ inner problems, with tracked Hessians.

    $$\min_x F(x) = \frac1m \sum_{i=1}^m f_i(x, y_i^*(x)),\qquad
      y_i^*(x) = \arg\min_y g_i(x, y),$$

    with every $g_i$ strongly convex in $y$. A step samples $I$ blocks, and $B$ rows of the data
    for each. For a sampled block, $q$ at the point and $q^-$ at the point before, on the same
    samples, a tracker moves to $(1 - a)\,q_i + a\,q + g\,(q - q^-)$ (MSVR), where those of the
    other blocks stay. Tracked are $s_i \approx \nabla_y g_i$ and $H_i \approx \nabla^2_{yy} g_i$,
    the latter projected onto $\{H \succeq \mu I\}$. Then

    $$G = \frac1I \sum_{i\text{ sampled}} \nabla_x f_i
        - \nabla^2_{xy} g_i\, H_i^{-1} \nabla_y f_i,\qquad
      z \leftarrow G + (1 - b)(z - G^-),$$

    $x \leftarrow x - \eta z$, and $y_i \leftarrow y_i - \tau s_i$ for all blocks. A tracker starts
    with what its block's first visit sees.

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
        tracking: $(a, g)$. The theory sets $g = (m - I) / (I(1 - a)) + (1 - a)$, the authors' code
            1.
        momentum: $b$.
        inner_step: $\tau$.
        outer: optimizer of ``hyper``, which is given $z$ for a gradient: a learning rate $\eta$, a
            factory, or an optimizer, as for :class:`BilevelAlgorithm`.
        min_curvature: $\mu$.
        recipe: how to solve with the blocks of $H$; default by their factors.
        generator: source of the samples; default seed 0.

    Attributes:
        params: the tensors of the $y_i$, by name (``""`` for a single tensor).
        hyper: those of $x$.
        steps: number of steps done.
        samples: number of rows that the losses were asked for, each counted once where it serves
            at two points.

    Raises:
        ArgumentError: a setting makes no sense.
        DataError: the data has no rows, or tensors of different lengths.
        DtypeError: ``params`` and ``hyper`` differ in dtype.
        ShapeError: ``params`` without a row for each block, or a loss that is not ``[I]``.
        NonFiniteError: in a step, a loss or a direction is NaN or infinite.

    Cost: a step takes gradients of both losses, $p$ products with the Hessians of the sampled
    blocks, and their factors, ``O(I p^3)``, all at two points (at one where ``g = 0``, ``b = 1``).
    Memory ``m p^2``; :class:`BSVRBv2` takes ``m p``.

    Source: Hu, Qiu, Guo, Zhang and Yang, "Blockwise Stochastic Variance-Reduced Methods with
    Parallel Speedup for Multi-Block Bilevel Optimization" (ICML 2023), version 1; defaults from
    the authors' code. Here $G$ uses the Hessian tracked up to this step.

    Example:
        Three problems with one hyperparameter, $y_i^* = c_i x$ and $f_i = (y_i - 1)^2 / 2$:

        >>> import torch
        >>> from woodbury.bilevel import BSVRBv1
        >>> c = torch.tensor([1.0, 2.0, 3.0]).double()
        >>> x = torch.zeros(1).double()
        >>> method = BSVRBv1(
        ...     lambda y, x, blocks, batch: 0.5 * (y - c[blocks, None] * x).square().sum(1),
        ...     lambda y, x, blocks, batch: 0.5 * (y - 1).square().sum(1),
        ...     torch.zeros(3, 1).double(), x, outer=0.1,
        ... )
        >>> for _ in range(200):
        ...     last = method.step()
        >>> x, c.sum() / c.square().sum()
        (tensor([0.4286], dtype=torch.float64), tensor(0.4286, dtype=torch.float64))
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
        inner_step: float = 0.5,
        outer: OptimizerLike = 1e-3,
        min_curvature: float = 1e-5,
        recipe: Recipe | None = None,
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
        self.min_curvature = require_positive(min_curvature, "min_curvature")
        self.recipe = recipe
        p = self._y.shape[1]
        self._hessians = self._y.new_zeros(self.count, p, p)

    def _hypergradients(
        self, blocks: Tensor, now: _Point, then: _Point | None
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        old = self._hessians[blocks]
        earlier = self._curvature(then) if then is not None and self.tracking[1] else None
        tracked = self._track(old, blocks, self._curvature(now), earlier)
        tracked = self._projected((tracked + tracked.mT) / 2)
        mean = self._mean(now, tracked)
        mean_before = None
        if then is not None and self.momentum < 1:
            visited = self._visited[blocks].to(old.device)[:, None, None]
            mean_before = self._mean(then, torch.where(visited, old, tracked))
        return (mean, mean_before), tracked

    def _mean(self, point: _Point, hessians: Tensor) -> Tensor:
        operator = BlockDiagonal(hessians, tags={"positive_definite"})
        solved = solve(operator, point.outer_slopes.reshape(-1), self.recipe).value
        _, mixed = self._products(point, solved.reshape(point.rows.shape), hessian=False)
        return (point.outer_hyper - mixed) / self.sampled

    def _curvature(self, point: _Point) -> Tensor:
        count, p = point.rows.shape
        if not point.slopes.requires_grad:
            return point.rows.new_zeros(count, p, p)
        units = torch.eye(p, dtype=point.rows.dtype, device=point.rows.device)
        (rows,) = torch.autograd.grad(
            [point.slopes],
            [point.rows],
            [units[:, None].expand(p, count, p)],
            retain_graph=True,
            is_grads_batched=True,
        )
        return rows.transpose(0, 1)

    def _projected(self, hessians: Tensor) -> Tensor:
        """The nearest whose eigenvalues are at least ``min_curvature``."""
        shift = self.min_curvature * torch.eye(
            hessians.shape[-1], dtype=hessians.dtype, device=hessians.device
        )
        _, failed = torch.linalg.cholesky_ex(hessians - shift)
        bad = failed > 0
        if bool(bad.any()):
            hessians = hessians.clone()
            hessians[bad] = project_semidefinite(hessians[bad] - shift) + shift
        return hessians

    def _move(self, blocks: Tensor, moves: Tensor) -> None:
        self._hessians[blocks] = moves
        self._y = self._y - self.inner_step * self._slopes

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step: tensors and numbers, copied."""
        return {**super().state_dict(), "hessians": self._hessians.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, exactly; writes ``params`` and ``hyper``.

        Raises:
            ArgumentError: an entry is missing.
            ShapeError: a tensor has another shape.
        """
        super().load_state_dict(state)
        self._hessians = state["hessians"].to(self._y, copy=True)
