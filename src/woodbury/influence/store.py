"""``GradientStore``: gradients of training examples on disk, compressed, to be asked many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature import EKFAC, KFAC, FactoredGradients, Objective, RelativeDamping
from woodbury.curvature.damping import Damping
from woodbury.curvature.promotion import promoted
from woodbury.errors import ArgumentError, ShapeError, StructureError
from woodbury.influence.files import load_tensors, save_tensors
from woodbury.influence.measurements import Measurement, measured, support
from woodbury.influence.projection import (
    BlockProjection,
    Eigenbasis,
    EigenProjection,
    RandomProjection,
    digest_of,
    eigen_projections,
    random_projections,
    row_of,
)
from woodbury.influence.runs import Run, fingerprint
from woodbury.influence.scores import Scores
from woodbury.influence.self_influence import SelfInfluence
from woodbury.influence.shards import (
    Chunk,
    RowType,
    Shard,
    chunks,
    quantize,
    read_shard,
    write_shard,
)
from woodbury.influence.store_forecast import StoreForecast, store_forecast
from woodbury.influence.stored import Reader

__all__ = ["GradientStore"]

_SHARE = 0.1
_CHUNK_BYTES = 32 * 2**20
_TYPES = ("float64", "float32", "float16", "int8")


class GradientStore:
    r"""Projected gradients of all training examples in a folder, and scores from them.

    Of each layer's gradient $D_i$ a piece $P_S D_i P_A^T$ is kept, computed from the factors of
    $D_i$ without forming it; the pieces of an example are a row. Scores of queries that are
    projected in the same way are products with the rows, without a pass over the training data
    through the model; signs and scale are those of :class:`woodbury.Influence`,

    $$ s_{qi} = -\frac1N \sum_l x_{q,l}^T z_{i,l} . $$

    With :class:`EigenProjection` the rows are whitened, $z = W^{1/2} \odot (Q_S^T D_i Q_A)$ in the
    kept directions, and $x$ is the same of the query: scores of
    ``Influence(objective, matrix="ekfac", tolerance=0)`` restricted to these directions, and the
    same where all are kept. With :class:`RandomProjection` $x_l = (M_l + \rho_l I)^{-1} z_{q,l}$,
    $M_l = \frac1N\sum_i w_i z_{i,l} z_{i,l}^T + \lambda_2 I$: the empirical Fisher matrix of the
    stored rows, layer by layer, by Cholesky in float64.

    **How far off.** ``scores.error()`` has for every score the sum over layers of

    * rounding: $\|x_{q,l}\| \, \|z_{i,l} - \hat z_{i,l}\| / N$ by Cauchy and Schwarz, with the norm
      that was measured when the row was written;
    * what an eigenbasis projection left out: $|q^T A_l^{-1} r| \le \|q\|_{A_l^{-1}}
      \|r\|_{A_l^{-1}}$ over the dropped directions, of which each row keeps the norm. Both together
      are a bound of the difference to exact EK-FAC scores, up to rounding in the arithmetic;
    * a random projection: $\sqrt{(1+2/k_S)(1+2/k_A)-1}\;\|q\|\,\|r\|$ in the norm of the damped
      inverse, the standard error of Johnson and Lindenstrauss for products. It is an estimate, not
      a bound, and says nothing of the curvature that the projection does not see.

    Args:
        objective: of the training data, in mode ``"eval"``.
        folder: where the store is, or will be. What was written by a killed process is kept; the
            files have the same bytes in the end.
        projection: :class:`EigenProjection` (default) or :class:`RandomProjection`.
        dtype: of the rows: ``"float32"``, ``"float16"`` or ``"int8"`` (both with a scale for each
            layer of each row), or ``"float64"``.
        matrix: :class:`~woodbury.KFAC` or :class:`~woodbury.EKFAC` of the objective for the
            eigenbasis; default ``EKFAC`` with labels drawn from the model, fitted at need, once.
        damping: $\rho$, as for EK-FAC in :class:`woodbury.Influence`: a number, one for each layer,
            or :class:`~woodbury.curvature.RelativeDamping`. Default 0.1 of the mean eigenvalue of
            each layer. The rows of an eigenbasis projection depend on it.
        shard: bytes of rows in a file, at least; files end where batches do.
        progress: called as ``progress(stage, fraction)``.

    Raises:
        ArgumentError: an argument that is not valid.
        StructureError: the examples depend on each other (mode ``"train"``).
        ShapeError: the matrix is of other parameters.
        DataError: the folder holds a store of another model, other data or other settings; at use,
            a damaged file, queries that use other parameters.
        NonFiniteError: at use, a gradient that is NaN or infinite, with its rows.

    Cost: to write: one pass of about a gradient; for each layer with :class:`EigenProjection` a
    rotation ``t (p^2 + m^2)`` and ``p m`` (times ``t`` for sequences) to measure what is dropped,
    with :class:`RandomProjection` ``t (p k_S + m k_A)`` and nothing of size ``p m``. On disk
    ``N K`` numbers. Scores: ``Q N K`` multiplications, the rows read through a memory map in chunks
    of 32 MiB.

    Source: S. K. Choe et al., "What is your data worth to GPT? LLM-scale data valuation with
    influence functions" (LoGra, 2024), section 3; W. Johnson and J. Lindenstrauss, "Extensions of
    Lipschitz mappings into a Hilbert space" (1984).

    Example:
        >>> import tempfile, torch
        >>> from woodbury import Objective
        >>> from woodbury.influence import EigenProjection, GradientStore
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        >>> objective = Objective(torch.nn.Sequential(*layers), "cross_entropy", (x, y))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = GradientStore(objective, folder, EigenProjection(4, 4), dtype="int8")
        ...     scores = store.scores((x[:2], y[:2]))
        ...     store.width, scores.certificate()["error_guarantee"]
        (28, 'bound')
    """

    def __init__(
        self,
        objective: Objective,
        folder: str | Path,
        projection: EigenProjection | RandomProjection | None = None,
        *,
        dtype: RowType = "float32",
        matrix: KFAC | None = None,
        damping: Damping | None = None,
        shard: int = 64 * 2**20,
        progress: Callable[[str, float], object] | None = None,
    ) -> None:
        if objective.replayed:
            raise StructureError(
                "in mode 'train' the loss of an example depends on its batch; use "
                "Objective(..., mode='eval')"
            )
        self.projection = EigenProjection() if projection is None else projection
        if not isinstance(self.projection, EigenProjection | RandomProjection):
            raise ArgumentError(
                f"projection is {projection!r}; give an EigenProjection or a RandomProjection"
            )
        if dtype not in _TYPES:
            raise ArgumentError(f"dtype is {dtype!r}; use one of {', '.join(_TYPES)}")
        if shard < 1:
            raise ArgumentError(f"shard is {shard}; give a positive number of bytes")
        if matrix is not None and not isinstance(self.projection, EigenProjection):
            raise ArgumentError("a matrix is for EigenProjection; random projections take none")
        n = objective.space.dim
        if matrix is not None and matrix.shape != (n, n):
            raise ShapeError(f"the matrix is {matrix.shape}, the objective has {n} parameters")
        self.objective = promoted(objective)
        self.objective.require_numbers()
        self.dtype, self.matrix, self._shard = dtype, matrix, shard
        self.damping = RelativeDamping(_SHARE) if damping is None else damping
        self._damping_chosen = damping is None
        self._progress = progress
        self._folder = Path(folder)
        dense = () if matrix is None else matrix.settings.dense
        self._factored = FactoredGradients(self.objective, dense=dense)
        self._run = Run(folder, self._words())

    def _words(self) -> dict[str, Any]:
        words = {
            "kind": "gradient store",
            "projection": type(self.projection).__name__,
            **asdict(self.projection),
            "dtype": self.dtype,
            "shard": self._shard,
            "computed_in": str(self.objective.dtype),
            "model_and_data": fingerprint(self.objective),
        }
        if isinstance(self.projection, EigenProjection):
            words["damping"] = repr(self.damping)
            words["matrix"] = "EK-FAC" if self.matrix is None else digest_of(self.matrix)
        return words

    # ------------------------------------------------------------ projections

    @cached_property
    def projections(self) -> dict[str, BlockProjection]:
        """Of every block, by name; the first time for an eigenbasis this fits the matrix."""
        objective = self.objective
        if isinstance(self.projection, RandomProjection):
            like = torch.zeros((), dtype=objective.dtype, device=objective.device)
            blocks = self._factored.blocks
            return dict(random_projections(blocks, self.projection, objective.space, like))
        file = self._folder / "basis.safetensors"
        if not file.is_file():
            self._say("fitting the eigenbasis", 0.0)
            matrix = self.matrix
            if matrix is None:
                matrix = EKFAC(objective, generator=torch.Generator().manual_seed(0))
            found = eigen_projections(matrix, self.damping, self.projection)
            tensors = {
                f"{name}/{key}": value
                for name, one in found.items()
                for key, value in vars(one).items()
                if value is not None
            }
            save_tensors(file, tensors, {"names": list(found)})
        tensors, words = load_tensors(file)
        device = objective.device
        result: dict[str, BlockProjection] = {}
        for name in words["names"]:
            parts = (
                tensors.get(f"{name}/{key}")
                for key in ("left", "right", "inverse", "rows", "columns")
            )
            left, right, weights, rows, columns = (
                None if part is None else part.to(device) for part in parts
            )
            assert weights is not None  # written above
            assert rows is not None
            result[name] = Eigenbasis(left, right, weights, rows, columns)
        return result

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each piece of a row."""
        return tuple(one.size for one in self.projections.values())

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(self.sizes)

    # ---------------------------------------------------------------- writing

    def write(self) -> GradientStore:
        """Write what is not written yet, and return the store; scores do it by themselves."""
        total = self.objective.num_examples
        shards = self._written()
        done = sum(shard.count for shard in shards)
        if done >= total:
            return self
        projections, sizes = self.projections, self.sizes
        pending: list[tuple[Tensor, Tensor, Tensor]] = []
        held, number = 0, len(shards)
        for batch in self._factored.passes("gradient store", shards[-1].batches if shards else 0):
            values, dropped = row_of(projections, batch)
            pending.append((batch.rows.cpu(), values, dropped))
            held += values.numel() * getattr(torch, self.dtype).itemsize
            done += len(values)
            self._say("writing gradients", done / total)
            if held >= self._shard or done == total:
                places, rows, rest = (torch.cat(part) for part in zip(*pending, strict=True))
                stored = quantize(rows, sizes, self.dtype)
                write_shard(self._path(number), places, stored, rest, batch.index + 1)
                pending, held, number = [], 0, number + 1
        return self

    def _path(self, number: int) -> Path:
        return self._folder / f"rows-{number:05d}.safetensors"

    def _written(self) -> list[Shard]:
        found: list[Shard] = []
        while (path := self._path(len(found))).is_file():
            found.append(read_shard(path))
        return found

    # ---------------------------------------------------------------- reading

    def chunks(self, rows: int | None = None) -> Iterator[Chunk]:
        """All rows in the order of the files, so many at a time, read through a memory map.

        Args:
            rows: in a chunk, at most; default as many as take 32 MiB.
        """
        self.write()
        dtype, device = self.objective.dtype, self.objective.device
        step = rows or max(1, _CHUNK_BYTES // max(1, self.width * dtype.itemsize))
        for shard in self._written():
            yield from chunks(shard, self.sizes, dtype, step, device)

    def scores(
        self, queries: Any = None, measurement: Measurement = "loss", *, modules: bool = False
    ) -> Scores:
        """The score of every training example for every query.

        Args:
            queries: data in a form that :class:`~woodbury.Objective` takes; by default the training
                data themselves.
            measurement: as for :class:`woodbury.Influence`.
            modules: give the parts of the layers, too. The error of the part of layer $l$ is the
                sum of the products of columns $l$ and $L + l$ of ``solve_error`` and
                ``gradient_norms``.

        Returns:
            :class:`Scores` ``[Q, N]``; its ``error()`` is a bound for an eigenbasis projection, an
            estimate for a random one.
        """
        objective = self.objective
        self.write()
        asked = measured(objective, measurement, objective.data if queries is None else queries)
        reader = self._reader("scoring the training examples")
        z, dropped = reader.rows(asked)
        values, parts, left, right = reader.scores(z, dropped, modules)
        return Scores(
            values=values,
            rows=torch.arange(objective.num_examples),
            support=support(measurement),
            solve_error=left.double().cpu(),
            gradient_norms=right.cpu(),
            proven=reader.eigen,
            modules=parts,
            module_names=tuple(self.projections) if modules else (),
            settings=self._settings(measurement),
            solves={"ok": True},
        )

    def self_influence(self, *, modules: bool = False) -> SelfInfluence:
        r"""$s_{ii} = -\frac1N \nabla\ell_i^T A^{-1}\nabla\ell_i$ of every training example.

        With an eigenbasis projection nothing is missing: the squares of what was dropped are in the
        store, and only rounding is an error, with its bound.

        Args:
            modules: give the parts of the layers, too.

        Returns:
            :class:`SelfInfluence`, ``[N]``; ``error`` is a bound for an eigenbasis projection, an
            estimate for a random one.

        Cost: ``N K`` multiplications, and the rows read once (twice for random projections).
        """
        self.write()
        reader = self._reader("self-influence")
        parts, errors = reader.self_scores()
        dtype = self.objective.dtype
        return SelfInfluence(
            values=parts.sum(0).to(dtype),
            error=errors.sum(0).cpu(),
            proven=reader.eigen,
            settings=self._settings("loss"),
            solves={"ok": True},
            modules=parts.to(dtype) if modules else None,
            module_names=tuple(self.projections) if modules else (),
        )

    def forecast(self) -> StoreForecast:
        """Disk, memory and time of :meth:`write`, before it runs, and without what is written.

        Cost: the gradients of one batch, twice; no matrix is fitted.
        """
        done, kept = self._written(), (self._folder / "basis.safetensors").is_file()
        return store_forecast(
            self.objective,
            self._factored,
            self.projection,
            self.dtype,
            shard=self._shard,
            fitted=self.matrix is not None or kept,
            kept=kept,
            left=self.objective.num_examples - sum(shard.count for shard in done),
        )

    def _reader(self, stage: str) -> Reader:
        count = self.objective.num_examples
        return Reader(
            self.objective,
            self._factored,
            self.projections,
            self.damping,
            self.chunks,
            lambda done: self._say(stage, done / count),
        )

    def _settings(self, measurement: Measurement) -> dict[str, Any]:
        eigen = isinstance(self.projection, EigenProjection)
        default = "EK-FAC" if self.matrix is None else type(self.matrix).__name__
        return {
            "measurement": measurement if isinstance(measurement, str) else "function",
            "matrix": default if eigen else "empirical Fisher of the projected gradients",
            "damping": repr(self.damping),
            "damping_chosen": self._damping_chosen,
            "projection": repr(self.projection),
            "stored_as": self.dtype,
            "numbers_per_example": self.width,
            "examples_in_the_mean": self.objective.num_examples,
        }

    def _say(self, stage: str, fraction: float) -> None:
        if self._progress is not None:
            self._progress(stage, min(1.0, fraction))
