"""K-FAC and EK-FAC fitted in parts by processes that share nothing but files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woodbury.curvature.capture import FactoredBatch
from woodbury.curvature.factors import Corrections, FactorSums, Sums
from woodbury.curvature.kfac import EKFAC, KFAC
from woodbury.curvature.layer_fit import (
    correct,
    corrections,
    eigenbases,
    factor_sums,
    fit_fingerprint,
    fit_settings,
    require_weights,
)
from woodbury.curvature.layer_store import Keeper, TensorFile, fingerprint
from woodbury.curvature.objective import Objective
from woodbury.curvature.promotion import promoted
from woodbury.curvature.two_passes import TwoPasses
from woodbury.errors import ArgumentError, DataError

__all__ = ["PartitionedFit"]

_ROWS = "rows"
_FACTORS, _CORRECTIONS = "factors", "corrections"


class PartitionedFit:
    r"""A fit of :class:`KFAC` or :class:`EKFAC` in $K$ parts, which are merged from their files.

    For machines or jobs that do not talk to each other (those that do use ``group=``). Each step
    is a call, and what it finds is a file in ``folder``, which the machines share or copy:

    1. ``fit_factors(k)``, for every part: the sums of the factors over batches ``k``, ``k + K``,
       ``k + 2 K``, ...;
    2. ``aggregate_factors()``, once: the sums of all parts added, and their eigenvectors;
    3. ``fit_corrections(k)``, for every part (EK-FAC): sums of squares in these eigenvectors;
    4. ``aggregate_corrections()``, once (EK-FAC);
    5. ``matrix()``, anywhere: the result, which :class:`EKFAC` with the same arguments and
       ``checkpoint=folder / "merged"`` reads, too.

    It equals the fit of one process to rounding: sums are added in another order, and labels belong
    to rows of the data, whoever draws them. A part that is killed goes on where it was, and one
    that is there is not computed again. Files of another model, other data or settings are
    refused; parts that are missing, not finished, of other eigenvectors, or that share a row, are
    named.

    Args:
        objective: with all the data, in the same batches for every part.
        folder: for the files; made where it is missing.
        parts: $K$.
        method: :class:`EKFAC` or :class:`KFAC`.
        kind: as for :class:`KFAC`.
        seed: of the labels, the same for every part; that of a fit without ``generator``.
        save_every: seconds between writes.
        options: the other arguments of :class:`KFAC`: ``sharing``, ``samples``, ``side_limit``,
            ``block_limit``, ``dense``.

    Raises:
        ArgumentError: an argument that is not valid; negative weights.
        DataError: in a step: see above, and :class:`KFAC`.

    Cost: that of :class:`KFAC` over the parts, and a pass over the data (without the model) in
    every process that knows the data again. A file of factors holds ``p^2 + m^2`` numbers for a
    layer, one of corrections ``p m``, both 8 bytes each.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from woodbury import EKFAC, Objective
        >>> from woodbury.curvature import PartitionedFit
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 3).double(), torch.randint(2, (60,))
        >>> data = list(zip(x.split(10), y.split(10)))
        >>> objective = Objective(torch.nn.Linear(3, 2).double(), "cross_entropy", data)
        >>> with TemporaryDirectory() as folder:
        ...     fit = PartitionedFit(objective, folder, parts=2)
        ...     for part in range(2):  # each on a machine of its own
        ...         fit.fit_factors(part)
        ...     fit.aggregate_factors()
        ...     for part in range(2):
        ...         fit.fit_corrections(part)
        ...     fit.aggregate_corrections()
        ...     merged = fit.matrix()
        >>> torch.allclose(merged.to_dense(), EKFAC(objective).to_dense())
        True
    """

    def __init__(
        self,
        objective: Objective,
        folder: str | os.PathLike[str],
        parts: int,
        method: type[KFAC] = EKFAC,
        kind: str = "sampled",
        *,
        seed: int = 0,
        save_every: float = 30.0,
        **options: Any,
    ) -> None:
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
            raise ArgumentError(f"parts is {parts!r}; it is the number of parts, at least 1")
        if not (isinstance(method, type) and issubclass(method, KFAC)):
            raise ArgumentError(f"method is {method!r}; use EKFAC or KFAC")
        self.given, self.objective = objective, promoted(objective)
        require_weights(self.objective)
        self.folder, self.parts, self.method = Path(folder), parts, method
        self.kind, self.seed, self.save_every, self.options = kind, seed, save_every, options
        self.settings = fit_settings(
            kind, corrected=method.corrected, generator=self._generator(), **options
        )

    def fit_factors(self, part: int) -> None:
        """The sums of the factors over the batches of a part."""
        self._check(part)
        keeper = self._keeper(_FACTORS, part)

        def start(known: Sums) -> FactorSums:
            return factor_sums(self.objective, self.settings, self._blocks, known)

        self._fit(part, keeper, start, self._passes.factors)

    def aggregate_factors(self) -> None:
        """Add the factors of all parts and take their eigenvectors; K-FAC is done with this."""
        target = self._bases if self.method.corrected else self._merged
        if target.load(self._mark) is not None:
            return
        sums = self._added(_FACTORS, None)
        tensors = eigenbases(self._blocks, sums, self.objective)
        self._save(target, tensors)

    def fit_corrections(self, part: int) -> None:
        """The sums of squares in the eigenvectors over the batches of a part (EK-FAC)."""
        self._check(part)
        tensors, basis = self._eigenbases()
        keeper = self._keeper(_CORRECTIONS, part, basis)

        def start(known: Sums) -> Corrections:
            return corrections(self.objective, self._blocks, tensors, known)

        self._fit(part, keeper, start, self._passes.corrections)

    def aggregate_corrections(self) -> None:
        """Add the corrections of all parts (EK-FAC)."""
        if self._merged.load(self._mark) is not None:
            return
        tensors, basis = self._eigenbases()
        sums = self._added(_CORRECTIONS, basis)
        correct(tensors, sums, self.objective)
        self._save(self._merged, tensors)

    def matrix(self) -> KFAC:
        """The merged fit.

        Raises:
            DataError: it is not there yet.
        """
        if not self._merged.path.is_file():
            last = "aggregate_corrections" if self.method.corrected else "aggregate_factors"
            raise DataError(f"{self._merged.path} is not there; run {last}() first")
        return self.method(
            self.given,
            self.kind,
            generator=self._generator(),
            checkpoint=self._merged.path,
            **self.options,
        )

    # ----------------------------------------------------------------- one part

    def _fit(
        self,
        part: int,
        keeper: Keeper,
        start: Callable[[Sums], FactorSums | Corrections],
        passes: Callable[[int, tuple[int, int]], Iterator[FactoredBatch]],
    ) -> None:
        known, phase, batch_number = keeper.load()
        if phase == "done":
            return
        rows = [known.pop(_ROWS)] if _ROWS in known else []
        sums = start(known)
        for batch in passes(batch_number, (part, self.parts)):
            sums.add(batch)
            if batch.column + 1 < batch.columns:
                continue
            rows.append(batch.rows.cpu())
            if keeper.due:
                keeper.save({**sums.sums, _ROWS: _joined(rows)}, "begun", batch.index + 1)
        keeper.save({**sums.sums, _ROWS: _joined(rows)}, "done", 0, now=True)

    def _check(self, part: int) -> None:
        if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < self.parts:
            raise ArgumentError(f"part is {part!r}; parts are numbered 0 to {self.parts - 1}")

    # ------------------------------------------------------------------ merging

    def _added(self, what: str, basis: str | None) -> Sums:
        """The sums of all parts, each of which is there once."""
        missing, begun, rows = [], [], []
        total: Sums = {}
        for part in range(self.parts):
            file = self._file(what, part)
            found = file.load(self._mark)
            if found is None:
                missing.append(part)
                continue
            tensors, words = found
            if (words["part"], words["parts"]) != (part, self.parts):
                raise DataError(
                    f"{file.path.name} holds part {words['part']} of {words['parts']}; was it "
                    f"copied over another? remove it and run fit_{what}({part})"
                )
            if words["phase"] != "done":
                begun.append(part)
                continue
            if basis is not None and words["basis"] != basis:
                raise DataError(
                    f"{file.path.name} was computed with other eigenvectors than those in "
                    f"{self._bases.path.name}; remove it and run fit_{what}({part})"
                )
            rows.append(tensors.pop(_ROWS))
            for key, value in tensors.items():
                total[key] = total[key] + value if key in total else value
        if missing or begun:
            lost = [f"missing are {missing}"] if missing else []
            lost += [f"not finished are {begun}"] if begun else []
            raise DataError(
                f"of the {what} in {self.parts} parts in {self.folder} {' and '.join(lost)}; run "
                f"fit_{what}(part) for these parts"
            )
        self._require_rows(what, rows)
        return {key: value.to(self.objective.device) for key, value in total.items()}

    def _require_rows(self, what: str, rows: list[Tensor]) -> None:
        """Every row of the data is in one part."""
        count = self.objective.num_examples
        numbers, times = torch.cat(rows).unique(return_counts=True)
        again = numbers[times > 1].tolist()
        if again:
            where = [part for part, own in enumerate(rows) if bool((own == again[0]).any())]
            trouble = f"row {again[0]} of the data is in more than one batch, of parts {where}"
        elif len(numbers) != count:
            trouble = f"{len(numbers)} of the {count} rows of the data are in a part"
        else:
            return
        raise DataError(
            f"{trouble}, in the {what} in {self.folder}; every part must see the same batches: "
            "remove the files and fit the parts again"
        )

    def _eigenbases(self) -> tuple[Sums, str]:
        """What all parts rotate with, and a word for it."""
        if not self.method.corrected:
            raise ArgumentError("KFAC has no corrections; aggregate_factors() is its last step")
        found = self._bases.load(self._mark)
        if found is None:
            raise DataError(f"{self._bases.path} is not there; run aggregate_factors() first")
        tensors = found[0]
        names = sorted(tensors)
        return (
            {name: tensors[name].to(self.objective.device) for name in names},
            fingerprint([tensors[name] for name in names], names),
        )

    # -------------------------------------------------------------------- files

    @property
    def _bases(self) -> TensorFile:
        return TensorFile(self.folder / "eigenbases")

    @property
    def _merged(self) -> TensorFile:
        return TensorFile(self.folder / "merged")

    def _file(self, what: str, part: int) -> TensorFile:
        return TensorFile(self.folder / f"{what}-{part}-of-{self.parts}")

    def _keeper(self, what: str, part: int, basis: str = "") -> Keeper:
        words = {"part": part, "parts": self.parts, "basis": basis}
        return Keeper(self._file(what, part), self._mark, self.save_every, words)

    def _save(self, file: TensorFile, tensors: Sums) -> None:
        file.save(tensors, {"fingerprint": self._mark, "phase": "done", "next": 0})

    @cached_property
    def _mark(self) -> str:
        """That of the fit of one process, as which the merged file is read."""
        return fit_fingerprint(self.objective, self.settings, 1)

    # -------------------------------------------------------------------- model

    @cached_property
    def _passes(self) -> TwoPasses:
        s = self.settings
        return TwoPasses(self.objective, s.kind, s.samples, s.seeds, s.dense, "off")

    @property
    def _blocks(self) -> dict[str, Any]:
        return self._passes.gradients.blocks

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
