"""Kronecker-factored curvature: K-FAC and its eigenvalue-corrected form EK-FAC."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature.coverage import Coverage, CoverageRow
from woodbury.curvature.damping import PAPER, Damping, damping_of
from woodbury.curvature.layer_fit import LayerFit, fit_layers, fit_settings
from woodbury.curvature.layer_matrix import LayerMatrix
from woodbury.curvature.layers import Block, MatrixBlock, VectorBlock
from woodbury.curvature.layers.references import Reference
from woodbury.curvature.linearization import Cache
from woodbury.curvature.objective import Objective
from woodbury.curvature.promotion import HALF, promoted
from woodbury.errors import StructureError
from woodbury.operators import (
    Dense,
    Eigendecomposed,
    Identity,
    Kronecker,
    LinearOperator,
    Permutation,
)
from woodbury.spaces import Space

__all__ = ["EKFAC", "KFAC", "regularizers"]


class KFAC(LayerMatrix):
    r"""The Kronecker-factored approximation of the Fisher matrix of the mean objective.

    For a layer with weight $[W, b]$ (``[p, m]``, biases as last columns), inputs $a$ and gradients
    $g$ at its outputs the block is

    $$ \frac{T}{N}\; \mathbb{E}[g g^T] \otimes \mathbb{E}[a a^T] + \lambda_2 I, $$

    with means over all $T$ positions (``sharing="expand"``; without sequences or images, $T = N$).
    Like :class:`Fisher` it is of the *mean* objective, **with** the regulariser of the objective
    (``l2`` must be one number per layer), and **without** any damping: that is added when it is
    asked for, per layer, and reported. Parameters without Kronecker form (norms, scales, recurrent
    layers) get the exact block of the Fisher matrix, or its diagonal.

    Used several times, a weight has the positions of all uses. ``"expand"`` takes positions as
    independent examples and is exact where they are (deep linear networks with squared error, one
    loss for each position); ``"reduce"`` takes the mean of the inputs and the sum of the gradients
    of an example, and is exact where the outputs are averaged over positions.

    Args:
        objective: what is approximated, at its parameters of this moment. Half precision is
            computed, and kept, in float32.
        kind: of Fisher matrix: ``"sampled"`` (labels drawn from the model, as in the paper on
            influence), ``"exact"`` (as many backward passes as outputs) or ``"empirical"`` (the
            gradients of the losses).
        sharing: ``"expand"`` or ``"reduce"``.
        samples: labels drawn per example (sampled).
        generator: for the labels; the same ones every time if not given. It gives a seed: a label
            belongs to its row of the data, however the data is cut into batches and shared.
        side_limit: a side of a layer with more entries than this gets the diagonal of its factor
            (a vocabulary). The inputs of an embedding always do: theirs is diagonal.
        block_limit: parameters of other layers get the exact block up to this many entries, the
            exact diagonal beyond; 0 for diagonals always.
        dense: names of parameters that are treated as having no Kronecker form.
        checkpoint: a path: what is computed is written there as it goes, a run that was killed goes
            on from there, and a finished one is read from there.
        save_every: seconds between writes.
        group: a group of ``torch.distributed``: each process takes a share of the batches, and all
            end with the same result.
        cache: what EK-FAC may keep of its first pass for the second, which then runs the model for
            the rest of the batches only: bytes; ``"auto"``: 1 GiB, or a quarter of the memory that
            is available if that is less; ``"off"``. The result is the same.

    Attributes:
        blocks: an :class:`~woodbury.operators.Eigendecomposed` for each layer, by name.
        layers: what is in each block, by name.

    Raises:
        ArgumentError: an argument that is not valid; negative weights.
        StructureError: the criterion is no likelihood (sampled, exact); a use of a parameter that
            was not seen; ``l2`` differs within a layer.
        DataError: a checkpoint of another model or of other data; a loss that is not the loss of
            its example; data that changes between passes.
        GradientError: a parameter that the loss does not depend on (``allow_unused=True`` gives it
            a block of zeros).
        NonFiniteError: NaN in a batch.

    Cost: one pass of about two thirds of a gradient per column plus ``T (p^2 + m^2)``
    multiplications for a layer, then eigendecompositions in float64; memory ``p^2 + m^2 + p m``
    numbers for a layer.

    Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored
    approximate curvature" (2015); R. Eschenhagen et al., "Kronecker-factored approximate curvature
    for modern neural network architectures" (2023), for weights that are shared.

    Example:
        >>> import torch
        >>> from woodbury import KFAC, Objective
        >>> from woodbury.curvature import RelativeDamping
        >>> x, y = torch.randn(64, 3), torch.randint(2, (64,))
        >>> layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> K = KFAC(Objective(model, "cross_entropy", (x, y)), "exact")
        >>> print(K.coverage())
        0            16  Kronecker  4 x 4
        2            10  Kronecker  2 x 5
        of all entries: Kronecker 100.0%
        >>> step = K.damped_inverse(RelativeDamping(0.1)) @ torch.ones(26)
        >>> step.shape
        torch.Size([26])
    """

    corrected = False

    def __init__(
        self,
        objective: Objective,
        kind: str = "sampled",
        *,
        sharing: str = "expand",
        samples: int = 1,
        generator: torch.Generator | None = None,
        side_limit: int = 8192,
        block_limit: int = 1024,
        dense: Iterable[str] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: float = 30.0,
        group: Any = None,
        cache: Cache = "auto",
    ) -> None:
        settings = fit_settings(
            kind,
            corrected=self.corrected,
            generator=generator,
            sharing=sharing,
            samples=samples,
            side_limit=side_limit,
            block_limit=block_limit,
            dense=dense,
        )
        self.settings = settings
        self.objective = wide = promoted(objective)
        self.note = ""
        if objective.dtype in HALF:
            name = str(objective.dtype).removeprefix("torch.")
            self.note = f"computed and kept in float32: in {name} sums of squares would be noise"
        keeping: dict[str, Any] = {"checkpoint": checkpoint, "save_every": save_every}
        fit = fit_layers(wide, settings, **keeping, group=group, cache=cache)
        self.layers = dict(fit.blocks)
        space = wide.space
        places = [block.positions(space) for block in self.layers.values()]
        blocks: dict[str, LinearOperator] = {}
        blocks |= {name: _operator(fit, name) for name in fit.blocks}
        unused = _unused(fit.blocks, space)
        if unused is not None:
            self.layers[unused.name] = unused
            places.append(unused.positions(space))
            blocks[unused.name] = _zero(unused.size(space), wide)
        for name, l2 in regularizers(self.layers, wide).items():
            blocks[name] = blocks[name] + l2 * Identity(blocks[name].shape[0])
        permutation = Permutation(
            torch.cat(places).to(wide.device), dtype=wide.dtype, out_space=space
        )
        super().__init__(permutation, blocks)

    def mean_eigenvalues(self) -> dict[str, float]:
        """The mean eigenvalue of every block: its trace over its size."""
        return {name: float(op.trace()) / op.shape[0] for name, op in self.blocks.items()}

    def damped(self, damping: Damping = PAPER) -> LayerMatrix:
        r"""The matrix with $\lambda_l I$ added to each block; ``.damping`` says how much.

        Args:
            damping: :class:`~woodbury.curvature.RelativeDamping` (the paper's rule by default: 0.1
                of the mean eigenvalue of the layer), one number for all layers, or a number for
                each layer by name.

        Raises:
            ArgumentError: a negative number, or names that are not the layers'.
        """
        found = damping_of(damping, self.mean_eigenvalues())
        blocks: dict[str, LinearOperator] = {
            name: block + found[name] * Identity(block.shape[0])
            for name, block in self.blocks.items()
        }
        return LayerMatrix(self.permutation, blocks, found)

    def damped_inverse(self, damping: Damping = PAPER) -> LayerMatrix:
        """The inverse of :meth:`damped`, ready to precondition ``CG(preconditioner=...)``.

        Raises:
            SingularError: a layer is singular without more damping.
        """
        inverse = self.damped(damping).inverse()
        assert isinstance(inverse, LayerMatrix)  # each block has an inverse
        return inverse

    def coverage(self) -> Coverage:
        """Which share of the parameters is represented how; ``print`` it for a table."""
        rows = []
        for name, layer in self.layers.items():
            block = self.blocks[name]
            assert isinstance(block, Eigendecomposed)  # made by _operator
            n, basis = block.shape[0], block.basis
            form, detail = "diagonal", f"{n}"
            if isinstance(basis, Kronecker):
                assert isinstance(layer, MatrixBlock)  # what has a Kronecker form
                form, detail = "Kronecker", f"{layer.p} x {layer.m}"
                for side, factor in zip(("outputs", "inputs"), basis.factors, strict=True):
                    if isinstance(factor, Identity):
                        detail += f", diagonal factor of the {side}"
            elif isinstance(basis, Dense):
                form, detail = "block", f"{n} x {n}"
            elif name == _UNUSED:
                form, detail = "zero", "unused"
            rows.append(CoverageRow(name, layer.parameters, n, form, detail))
        return Coverage(tuple(rows), self.note)


class EKFAC(KFAC):
    r"""K-FAC in its eigenbasis with corrected eigenvalues.

    With the eigenvectors $Q_A$ and $Q_S$ of the two factors the block of a layer is

    $$ (Q_S \otimes Q_A)\, \operatorname{diag}(\Lambda)\, (Q_S \otimes Q_A)^T + \lambda_2 I, \qquad
    \Lambda = \frac1N \sum_i w_i\, (Q_S^T D_i Q_A)^{\odot 2}, $$

    with the gradient matrix $D_i$ of an example, summed over its positions *before* it is squared.
    This is the diagonal closest to the block of the Fisher matrix in that basis: its error in the
    Frobenius norm is never larger than that of :class:`KFAC`.

    Everything else is as for :class:`KFAC`: arguments, scales, damping, coverage. The labels of
    the second pass are drawn anew (sampled).

    Cost: a second pass; per example with ``T`` positions ``T (p^2 + m^2 + p m)`` multiplications
    for a layer, or ``p m`` in one product of matrices where ``T = 1``.

    Source: T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis" (2018); R. Grosse et al., "Studying large language model generalization with
    influence functions" (2023), section 3.2, for damping and sums over positions.

    Example:
        >>> import torch
        >>> from woodbury import CG, EKFAC, GaussNewton, Objective, solve
        >>> from woodbury.operators import Identity
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(200, 8) * torch.logspace(0, 2, 8), torch.randint(4, (200,))
        >>> layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
        >>> model = torch.nn.Sequential(*layers).double()
        >>> objective = Objective(model, "cross_entropy", (x.double(), y))
        >>> A = GaussNewton(objective) + 1e-4 * Identity(212)
        >>> M = EKFAC(objective, "exact").damped_inverse(1e-4)
        >>> b = torch.ones(212).double()
        >>> plain, ours = (solve(A, b, CG(preconditioner=P)) for P in (None, M))
        >>> ours.steps < plain.steps
        True
    """

    corrected = True


_UNUSED = "(unused)"


def _operator(fit: LayerFit, name: str) -> Eigendecomposed:
    """The block of a layer."""
    block, tensors = fit.blocks[name], fit.tensors
    values = tensors[f"{name}/values"]
    if isinstance(block, MatrixBlock):
        sides = []
        for side, size in (("S", block.p), ("A", block.m)):
            sides.append(_basis(tensors.get(f"{name}/Q_{side}"), size, fit.dtype, values.device))
        return Eigendecomposed(Kronecker(*sides), values)
    return Eigendecomposed(
        _basis(tensors.get(f"{name}/Q"), len(values), fit.dtype, values.device), values
    )


def _basis(Q: Tensor | None, size: int, dtype: torch.dtype, device: torch.device) -> LinearOperator:
    if Q is None:
        return Identity(size, dtype=dtype, device=device)
    return Dense._derived(Q.to(dtype), {"unitary"})


def _zero(size: int, objective: Objective) -> Eigendecomposed:
    values = torch.zeros(size, dtype=objective.dtype, device=objective.device)
    return Eigendecomposed(Identity(size, dtype=values.dtype, device=values.device), values)


def _unused(layers: Mapping[str, Block], space: Space) -> VectorBlock | None:
    """The parameters that are in no block."""
    seen = {name for layer in layers.values() for name in layer.parameters}
    parts = tuple(
        Reference(name, 0, shape[0] if shape else 1)
        for name, shape in space.shapes.items()
        if name not in seen
    )
    return VectorBlock(_UNUSED, parts) if parts else None


def regularizers(layers: Mapping[str, Block], objective: Objective) -> dict[str, float]:
    """The objective's ``l2`` for each layer, where there is one."""
    l2 = objective.l2
    if not isinstance(l2, Tensor):
        return dict.fromkeys(layers, l2) if l2 else {}
    found = {}
    for name, layer in layers.items():
        own = l2[layer.positions(objective.space).to(l2.device)]
        low, high = float(own.min()), float(own.max())
        if low != high:
            raise StructureError(
                f"l2 runs from {low:.3g} to {high:.3g} within the layer {name!r}, whose block has "
                "no Kronecker form then; give one number for each layer (biases included)"
            )
        found[name] = low
    return found
