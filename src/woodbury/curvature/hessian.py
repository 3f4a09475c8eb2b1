"""The Hessian of an objective."""

from __future__ import annotations

import torch
from torch import Tensor

from woodbury.curvature.batches import Batch
from woodbury.curvature.graphs import GraphHessian, Linearized, Room
from woodbury.curvature.linearization import Cache
from woodbury.curvature.matrix import BatchedCurvature
from woodbury.curvature.objective import Objective
from woodbury.errors import GradientError

__all__ = ["Hessian"]


class Hessian(BatchedCurvature):
    r"""The Hessian of the mean objective.

    $$ \nabla^2 F(\theta) = \frac1N \sum_i w_i \nabla^2\ell_i(\theta) +
    \operatorname{diag}(\lambda). $$

    It is the Hessian of the *mean* objective **with** its regulariser. Tag: symmetric (a Hessian is
    definite at no price; :class:`GaussNewton` is).

    Args:
        objective: what is differentiated, at its parameters of this moment.
        cache: what may be kept between products: ``"auto"`` (half of the memory available at the
            first product), a number of bytes, or ``None``, 0 or ``"off"``. Results agree to
            rounding whatever it is.

    Raises:
        ArgumentError: ``cache`` is none of these.
        GradientError: at a product: the loss does not depend on a parameter, or a parameter was
            changed in place since the operator was made, or an operation of the model has a wrong
            second derivative (seen by a check of symmetry, once per objective).
        NonDeterministicError, NonFiniteError, DataError: at a product; see
            :class:`~woodbury.Objective`.

    Cost: the first product builds the graph of the gradient of each batch (one gradient and its
    memory, 2 to 3 times that of a gradient); every column then costs about 1.5 gradients, or 2.5
    for batches beyond the budget.

    Source: B. Pearlmutter, "Fast exact multiplication by the Hessian" (1994).

    Example:
        >>> import torch
        >>> from woodbury import Hessian, Objective
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> loss = lambda params, x: 0.5 * (x @ params["w"]) ** 2
        >>> H = Hessian(Objective.functional(loss, {"w": torch.ones(2)}, [x], l2=0.25))
        >>> H.to_dense()
        tensor([[0.7500, 0.0000],
                [0.0000, 2.2500]])
        >>> print(H.cache_report())
        1 of 1 batches are kept linearised, in ... of a budget of ...
    """

    def __init__(self, objective: Objective, cache: Cache = "auto") -> None:
        super().__init__(objective, cache, frozenset({"symmetric"}))

    def _linearize(self, batch: Batch, room: Room, columns: int) -> Linearized:
        leaves = self.objective.leaves()
        result = GraphHessian(self.objective.batch_loss(leaves, batch), leaves, self._layout)
        result.measure(self.objective.resident(batch))
        if not self.objective.seen_symmetric:
            self._require_symmetry(result)
            self.objective.seen_symmetric = True
        return result

    def _require_symmetry(self, batch: GraphHessian) -> None:
        """Second derivatives are written by hand somewhere, and a wrong one shows here."""

        def apply(row: Tensor) -> Tensor:
            out = torch.empty_like(row)
            batch.apply(row, out, 1.0, add=False)
            return out

        def probe() -> Tensor:
            generator = torch.Generator(self.device).manual_seed(0)
            shape = (1, self.shape[1])
            return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

        # If H is symmetric, then u^T H (H u) = |H u|^2; u is drawn twice to save its memory.
        once = apply(probe())
        twice = apply(once)
        square = once.square().sum().item()
        u = probe()
        other = (u * twice).sum().item()
        gap = abs(other - square)
        scale = square + (u.norm() * twice.norm()).item()
        if gap > torch.finfo(self.dtype).eps ** 0.5 * scale:
            raise GradientError(
                "second derivatives of this loss are not symmetric: for a random u, u^T H H u is "
                f"{other:.4g} and |H u|^2 is {square:.4g}. An operation of the model has a wrong "
                "second derivative (its backward is not differentiable as written, or torch is "
                "mistaken): check it with torch.autograd.gradgradcheck, or use GaussNewton"
            )

    def _method(self) -> str:
        return "differentiate the kept graph of the gradient"
