r"""Gradients per example in factored form: inputs of layers and gradients at their outputs.

For a weight $W$ used at positions $t$, the gradient of one example is $\sum_t g_t a_t^T$. One pass
forward and one backward *to the outputs of the layers* give all $a_t$ and $g_t$ of a batch; no
gradient of a weight is formed. How parameters enter is seen by watching the functions of torch that
the model calls (``woodbury.curvature.layers``), so it does not matter how the modules are called,
tied weights are one block with several uses, and a use of unknown form is noticed.

Which axis holds the examples is found on a few examples of the first batch, and that everything
was seen is *verified* there: a random combination of the gradients per example must be what
automatic differentiation says.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woodbury.curvature.backprop import Backprop, pulled_back
from woodbury.curvature.batches import Batch
from woodbury.curvature.draws import make_seed
from woodbury.curvature.layers import (
    Block,
    MatrixGradients,
    Plan,
    VectorBlock,
    VectorGradients,
    Watch,
    make_plan,
)
from woodbury.curvature.layers.plan import references_of
from woodbury.curvature.layers.uses import Arrangement, Use, arrangement
from woodbury.curvature.objective import Objective
from woodbury.curvature.probes import require_examplewise, some_examples
from woodbury.curvature.single import gradients_one_by_one
from woodbury.errors import ArgumentError, DataError, GradientError, StructureError

__all__ = ["FactoredBatch", "FactoredGradients"]

# Blocks are found on this many examples of a batch, and batches of one example are passed over.
_PROBED, _LOOKED_AT = 4, 8
_AGREEMENT = {torch.float64: 1e-5, torch.float32: 2e-3}  # norms of Llama are always float32


@dataclass
class FactoredBatch:
    """Gradients per example of one batch, block by block.

    Attributes:
        index: of the batch in a pass.
        size: number of examples ``b``.
        rows: their places in the data, ``[b]``.
        weights: their weights in the objective ``[b]``, which are *not* in the gradients; ``None``
            where all are 1.
        blocks: gradients of each block; one that this batch does not use is missing.
        column: which of the gradients of these examples: 0 unless there are several.
        columns: how many there are.

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import FactoredGradients
        >>> data = torch.randn(4, 3), torch.randint(2, (4,))
        >>> objective = Objective(torch.nn.Linear(3, 2), "cross_entropy", data)
        >>> for batch in FactoredGradients(objective, "exact"):
        ...     print(batch.rows, f"{batch.column + 1} of {batch.columns}", list(batch.blocks))
        tensor([0, 1, 2, 3]) 1 of 2 ['weight']
        tensor([0, 1, 2, 3]) 2 of 2 ['weight']
    """

    index: int
    size: int
    rows: Tensor
    weights: Tensor | None
    blocks: dict[str, MatrixGradients | VectorGradients]
    column: int = 0
    columns: int = 1


class FactoredGradients:
    r"""The gradients of every example, batch by batch, as factors of layers.

    Of the losses $\ell_i$ **without** weights and regulariser, or of scores whose outer products
    make a Fisher matrix.

    Args:
        objective: whose examples.
        kind: ``"empirical"``: of the losses. ``"sampled"``: of the log-likelihood of labels drawn
            from the model (:class:`~woodbury.Fisher`). ``"exact"``: as many gradients for each
            example as it has outputs, whose outer products add up to the exact Fisher matrix.
        samples: labels drawn per example (sampled).
        generator: for the labels; default torch's own. The same labels are drawn in every pass,
            and however the data is cut into batches: a label belongs to its row.
        dense: names of parameters whose gradients are taken one by one, whatever their form.
        principal: with ``"exact"``: gradients of an example belong to orthogonal changes of its
            outputs, the largest first, where there are at most 128 outputs.

    Raises:
        ArgumentError: a ``kind``, ``samples`` or name that is not valid.
        StructureError: the criterion is no likelihood (exact, sampled); in a pass: a use of a
            parameter that was not seen, or examples that depend on each other.
        DataError: in a pass: a loss that is a scalar per batch, or that is not the loss of its
            example; a batch that uses other parameters than those before.
        GradientError, NonDeterministicError, NonFiniteError: in a pass; see
            :class:`~woodbury.Objective`.

    Cost: a pass takes one forward and one backward pass for every column, about two thirds of a
    gradient each, and the memory of a gradient and the layers' inputs. Parameters without a known
    form cost as much as in :meth:`~woodbury.Objective.per_example_gradients`.

    Source: I. Goodfellow, "Efficient per-example gradient computations" (2015).

    Example:
        >>> import torch
        >>> from woodbury import Objective
        >>> from woodbury.curvature import FactoredGradients
        >>> x, y = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> for batch in FactoredGradients(Objective(model, "mse", (x, y))):
        ...     layer = batch.blocks["weight"]
        ...     print(layer.inputs.squeeze(1), layer.grads.squeeze(), layer.dense())
        tensor([[1., 2., 1.],
                [0., 1., 1.]]) tensor([6., 2.]) tensor([[ 6., 12.,  6.],
                [ 0.,  2.,  2.]])
    """

    def __init__(
        self,
        objective: Objective,
        kind: str = "empirical",
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
        dense: Iterable[str] = (),
        principal: bool = False,
    ) -> None:
        self.objective = objective
        seed = make_seed(generator) if kind == "sampled" else 0
        self.backprop = Backprop(objective, kind, samples, seed, principal=principal)
        names = {dense} if isinstance(dense, str) else set(dense)
        unknown = sorted(names - set(objective.space.shapes))
        if unknown:
            raise ArgumentError(
                f"dense names {unknown}; the parameters are {list(objective.space.shapes)}"
            )
        self._asked = names
        self._plan: Plan | None = None
        self._shared: frozenset[int] = frozenset()
        self._arranged: dict[int, tuple[int, Arrangement]] = {}

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks by name; the first time this is asked it runs the first batch."""
        return dict(self.plan.blocks)

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients are taken one by one."""
        return self.plan.dense

    @property
    def plan(self) -> Plan:
        """Blocks and how to get at their gradients, found on a few examples and verified there."""
        if self._plan is None:
            self._prepare()
        assert self._plan is not None  # made just now
        return self._plan

    def __iter__(self) -> Iterator[FactoredBatch]:
        return self.passes("gradients per layer")

    def passes(
        self, what: str, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[FactoredBatch]:
        """One pass over the data from batch ``start`` on; ``what`` is told to the progress.

        With ``part = (r, w)`` only every ``w``-th batch from batch ``r`` on: the share of one of
        ``w`` processes.
        """
        for batch in self.selected(what, start, part):
            yield from self.columns(batch, self.run(batch))

    def selected(self, what: str, start: int, part: tuple[int, int]) -> Iterator[Batch]:
        """The batches of such a pass."""
        self.objective.require_rows(what)
        seen = {name for block in self.plan.blocks.values() for name in block.parameters}
        self.objective.require_used(seen)
        for batch in self.objective.batches(what, start):
            if batch.index % part[1] == part[0]:
                yield batch

    def redrawn(self, generator: torch.Generator) -> FactoredGradients:
        """The same with other labels, of a model of which everything is known already."""
        assert self.plan is not None  # found now, for both
        other = copy.copy(self)
        kind, samples = self.backprop.kind, self.backprop.samples
        other.backprop = Backprop(self.objective, kind, samples, make_seed(generator))
        return other

    # ------------------------------------------------------------- one batch

    def columns(
        self, batch: Batch, graph: tuple[Watch, Tensor], *, keep: bool = False
    ) -> Iterator[FactoredBatch]:
        """The gradients of a batch that was run; ``keep`` where the graph is needed once more."""
        watch, root = graph
        plan = self.plan
        if not plan.knows(watch.uses, watch.other | self._asked):
            raise DataError(
                f"batch {batch.index} uses parameters in another way than the batches before; name "
                "those that not every batch uses in dense=[...]"
            )
        uses = plan.relevant(watch.uses)
        where = self._arrangements(uses, root, batch)
        columns = self.backprop.columns(root)
        for column, cotangent in enumerate(self.backprop.cotangents(root, batch)):
            more = keep or column + 1 < columns
            blocks = self._gradients(uses, where, root, cotangent, batch, keep=more)
            yield FactoredBatch(
                batch.index,
                batch.size,
                batch.places().to(self.objective.device),
                self.objective.batch_weights(batch),
                blocks,
                column,
                columns,
            )

    def run(self, batch: Batch) -> tuple[Watch, Tensor]:
        """Forward, and what was seen of it."""
        leaves = self.objective.leaves()
        with torch.enable_grad(), Watch(leaves, self._shared, batch.size) as watch:
            root = self.backprop.root(leaves, batch)
        if not root.requires_grad:
            raise GradientError("the loss does not depend on any of the selected parameters")
        return watch, root

    def _gradients(
        self,
        uses: Sequence[Use],
        where: Sequence[Arrangement],
        root: Tensor,
        cotangent: Tensor,
        batch: Batch,
        *,
        keep: bool,
    ) -> dict[str, MatrixGradients | VectorGradients]:
        plan = self.plan
        edges = [use.edge for use in uses]
        result: dict[str, MatrixGradients | VectorGradients] = {}
        if edges:
            found = pulled_back(root, edges, cotangent, keep=keep)
            result = plan.gradients(uses, found, where, batch.size)
        if plan.dense:
            rows = gradients_one_by_one(self.backprop, plan.dense, batch, cotangent)
            for name, values in rows.items():
                block = plan.blocks[name]
                assert isinstance(block, VectorBlock)  # a parameter without known form
                result[name] = VectorGradients(block, values)
        return {name: result[name] for name in plan.blocks if name in result}

    # ------------------------------------------------- seen on the first batch

    def _prepare(self) -> None:
        """Find blocks and arrangements on a few examples, and verify them there."""
        found = None
        for batch in itertools.islice(self.objective.batches("blocks of parameters"), _LOOKED_AT):
            found = batch
            if batch.size > 1:  # or it could not be told which axis holds the examples
                break
        assert found is not None  # data without a batch raises
        try:
            self._prepare_on(some_examples(found, 0, min(found.size, _PROBED)))
        except (RuntimeError, ValueError, IndexError):
            if found.size <= _PROBED:
                raise
            self._plan, self._shared, self._arranged = None, frozenset(), {}
            self._prepare_on(found)  # the data does not split, or the mistake is shown once more

    def _prepare_on(self, batch: Batch) -> None:
        require_examplewise(self.objective, batch)
        watch, root = self.run(batch)
        dense = set(self._asked)
        shared = self._unarranged(watch.uses, root, batch)
        if shared:
            watch, root, failed = self._repeat(shared, watch, root, batch)
            if failed and self.objective.replayed:
                raise StructureError(
                    f"examples depend on each other at {', '.join(sorted(failed))} (batch norm "
                    "with the statistics of the batch?); use Objective(..., mode='eval')"
                )
            dense |= failed
        space = self.objective.space
        self._plan = make_plan(watch.uses, watch.other | dense, space, watch.packed)
        self._verify(watch, root, batch)

    def _unarranged(self, uses: Sequence[Use], root: Tensor, batch: Batch) -> list[int]:
        """Numbers of uses whose outputs do not belong to one example each; the others are noted."""
        if batch.size == 1:
            return []
        first, last = self._supports(uses, root, batch)
        missing = []
        for use, a, b in zip(uses, first, last, strict=True):
            found = arrangement(use, a, b, batch.size)
            if found is None:
                missing.append(use.number)
            else:
                self._arranged[use.number] = len(use.shape), found
        return missing

    def _repeat(
        self, shared: list[int], watch: Watch, root: Tensor, batch: Batch
    ) -> tuple[Watch, Tensor, set[str]]:
        """Run again with outputs that all examples share repeated for each of them."""
        names = {ref.name for number in shared for ref in references_of(watch.uses[number])}
        self._shared, self._arranged = frozenset(shared), {}
        try:
            again, repeated = self.run(batch)
            same = repeated.shape == root.shape and torch.allclose(
                repeated, root, rtol=1e-3, atol=1e-6
            )
            if same and not self._unarranged(again.uses, repeated, batch):
                return again, repeated, set()
        except (RuntimeError, ValueError, IndexError):  # the model needs the shape it had
            pass
        self._shared = frozenset()
        return watch, root, names

    def _supports(
        self, uses: Sequence[Use], root: Tensor, batch: Batch
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Gradients at the outputs of all uses of the first example alone, and of the last."""
        result = []
        probe, edges = self.backprop.probe(root), [use.edge for use in uses]
        for row in (0, batch.size - 1):
            cotangent = torch.zeros_like(probe)
            cotangent[row] = probe[row]
            result.append(pulled_back(root, edges, cotangent, keep=True))
        return result[0], result[1]

    def _arrangements(self, uses: Sequence[Use], root: Tensor, batch: Batch) -> list[Arrangement]:
        """Where the examples are in the output of every use."""
        if batch.size == 1:
            return [Arrangement(order="one")] * len(uses)
        missing = [u for u in uses if not self._remembered(u, batch.size)]
        if missing:
            first, last = self._supports(missing, root, batch)
            for use, a, b in zip(missing, first, last, strict=True):
                found = arrangement(use, a, b, batch.size)
                if found is None:
                    names = sorted({ref.name for ref in references_of(use)})
                    raise StructureError(
                        f"in batch {batch.index} the outputs of the layer with {', '.join(names)} "
                        "do not belong to one example each: examples depend on each other (batch "
                        "norm with the statistics of the batch?), or the layer is the same for all "
                        f"of them; leave its parameters out, or pass dense={names}"
                    )
                self._arranged[use.number] = len(use.shape), found
        return [self._arranged[use.number][1] for use in uses]

    def _remembered(self, use: Use, size: int) -> bool:
        rank, where = self._arranged.get(use.number, (0, Arrangement()))
        return rank == len(use.shape) and where.fits(use.shape, size)

    def _verify(self, watch: Watch, root: Tensor, batch: Batch) -> None:
        """Compare a random combination of the gradients with automatic differentiation."""
        space, uses = self.objective.space, self.plan.relevant(watch.uses)
        where = self._arrangements(uses, root, batch)
        generator = torch.Generator(root.device).manual_seed(1)
        mix = torch.randn(batch.size, dtype=root.dtype, device=root.device, generator=generator)
        cotangent = self.backprop.probe(root)
        blocks = self._gradients(uses, where, root, cotangent, batch, keep=True)
        mine = torch.zeros(space.dim, dtype=root.dtype, device=root.device)
        for gradients in blocks.values():
            mine[gradients.block.positions(space).to(mine.device)] = gradients.total(mix)
        leaves = self.objective.leaves()
        with torch.enable_grad():
            plain = self.backprop.root(leaves, batch)
        weighted = cotangent * mix.view(-1, *[1] * (cotangent.dim() - 1))
        truth = pulled_back(plain, list(leaves.values()), weighted, keep=False)
        tolerance, finfo = _AGREEMENT.get(root.dtype, 0.1), torch.finfo(root.dtype)
        # A gradient that is zero but for rounding (the bias of keys in attention) agrees with any.
        whole = float(torch.stack([t.norm() for t in truth if t is not None]).norm())
        noise = max(1e3 * finfo.eps * whole, finfo.tiny)
        for (name, part), true in zip(space.unflatten(mine).items(), truth, strict=True):
            true = torch.zeros_like(part) if true is None else true
            scale = max(float(true.norm()), float(part.norm()))
            gap = float((part - true).norm())
            if not gap <= tolerance * scale + noise:
                raise StructureError(
                    f"gradients per example of {name!r} do not add up to its gradient (relative "
                    f"difference {gap / scale:.1e} in batch {batch.index}): the model uses it in a "
                    "way that was not seen (a compiled or scripted part, a custom autograd "
                    f"function), or examples depend on each other; pass dense=[{name!r}] to take "
                    "its gradients one by one, or leave it out with params=..."
                )
