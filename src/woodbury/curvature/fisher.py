"""The Fisher information matrix of an objective: exact, sampled and empirical."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from woodbury.curvature.backprop import Backprop
from woodbury.curvature.batches import Batch
from woodbury.curvature.draws import make_seed
from woodbury.curvature.finite import finite_outputs
from woodbury.curvature.linearization import Cache
from woodbury.curvature.losses import Product, per_example
from woodbury.curvature.matrix import (
    OutputCurvature,
    Params,
    Setting,
    semidefinite_tags,
)
from woodbury.curvature.objective import Objective

__all__ = ["Fisher"]


class Fisher(OutputCurvature):
    r"""The Fisher information matrix of the mean objective.

    $$ \frac1N \sum_i w_i \sum_e a_e\,\mathbb{E}_{y \sim p(\cdot\mid f_e)} [s_e(y) s_e(y)^T]
    + \operatorname{diag}(\lambda), \qquad s_e(y) = \nabla_\theta \log p(y \mid f_e). $$

    The criterion is read as a weighted negative log-likelihood $\sum_e a_e (-\log p(y_e \mid f_e))$
    over the elements $e$ of an example (tokens, pixels, targets):

    - cross-entropy: $p$ is the softmax; $a_e = 1$ for a single label, one over the number of
      counted elements where the loss is their mean; times the weight of the label's class.
    - mean squared error: $p$ is normal with variance 1 and $a_e = 2 / K$ over $K$ elements (2 for
      ``reduction="sum"``), so that loss and negative log-likelihood differ by a constant.
    - binary cross-entropy on logits: $p$ is Bernoulli.

    With this reading the exact Fisher matrix **equals the Gauss-Newton matrix**. Like that it is of
    the *mean* objective and **includes the regulariser**.

    Args:
        objective: what is approximated, at its parameters of this moment.
        kind: ``"exact"``: the expectation in closed form. ``"sampled"``: over ``samples`` labels
            drawn for every example, the same at every product; unbiased. ``"empirical"``: the
            labels of the data, $\frac1N \sum_i w_i \nabla\ell_i \nabla\ell_i^T$ with the gradients
            of the losses as they are; works for every criterion that gives losses per example.
        samples: for ``"sampled"``.
        generator: for ``"sampled"``; default torch's own. It gives a seed: labels belong to the
            rows of the data, however these are cut into batches.
        cache: as for :class:`GaussNewton`.

    Raises:
        ArgumentError: ``kind``, ``samples`` or ``cache`` is not valid.
        StructureError: the criterion is no likelihood (exact, sampled).
        DataError: the loss is a scalar per batch (empirical), at a product.

    Cost: exact: as :class:`GaussNewton`. Sampled and empirical: one output per sample, which makes
    signals cheap: about 0.9 gradients a column for networks of linear layers.

    Source: S. Amari, "Natural gradient works efficiently in learning" (1998); J. Martens, "New
    insights and perspectives on the natural gradient method" (2020), sections 5 and 11 on its
    relation to Gauss-Newton and to the empirical matrix.

    Example:
        >>> import torch
        >>> from woodbury import Fisher, Objective
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> Fisher(Objective(model, "cross_entropy", (x, y))).to_dense()
        tensor([[ 0.6250, -0.6250],
                [-0.6250,  0.6250]])
    """

    def __init__(
        self,
        objective: Objective,
        kind: str = "exact",
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
        cache: Cache = "auto",
    ) -> None:
        seed = make_seed(generator) if kind == "sampled" else 0
        self._backprop = Backprop(objective, kind, samples, seed)
        self.kind = kind
        self.samples = samples
        super().__init__(objective, cache, semidefinite_tags(objective, convex=True))

    def _setting(self, batch: Batch) -> Setting:
        return {"exact": self._exact, "sampled": self._sampled, "empirical": self._empirical}[
            self.kind
        ](batch)

    def _exact(self, batch: Batch) -> Setting:
        objective = self.objective

        def evaluate(params: Params) -> Tensor:
            return finite_outputs(objective.outputs(params, batch), batch)

        def middle(z: Tensor) -> Product:
            target, weights = objective.target(batch), objective.batch_weights(batch)
            return objective.criterion.curvature(z, target, weights)

        return evaluate, middle

    def _sampled(self, batch: Batch) -> Setting:
        """``z`` is the product of every score with the outputs, ``[B, samples]``."""
        objective = self.objective

        def evaluate(params: Params) -> Tensor:
            outputs = finite_outputs(objective.outputs(params, batch), batch)
            plain = forward_ad.unpack_dual(outputs).primal.detach()
            scores = self._scores(plain, batch).flatten(2)
            return (scores * outputs.flatten(1).unsqueeze(1)).sum(2)

        return evaluate, lambda z: self._scaled(batch, 1 / self.samples)

    def _scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        """``sqrt(a) * score`` for every sample, ``[B, samples, ...]``."""
        return torch.stack(list(self._backprop.scores(outputs, batch)), dim=1)

    def _empirical(self, batch: Batch) -> Setting:
        """``z`` is the loss of every example, ``[B]``."""
        objective = self.objective

        def evaluate(params: Params) -> Tensor:
            losses = per_example(objective.losses(params, batch), "the empirical Fisher matrix")
            return finite_outputs(losses, batch)

        return evaluate, lambda z: self._scaled(batch, 1.0)

    def _scaled(self, batch: Batch, factor: float) -> Product:
        weights = self.objective.batch_weights(batch)
        if weights is None:
            return lambda U: U * factor

        def product(U: Tensor) -> Tensor:
            return U * (weights * factor).view(-1, *[1] * (U.dim() - 2))

        return product
