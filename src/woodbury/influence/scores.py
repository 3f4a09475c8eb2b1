"""Scores of training examples for queries, with what is known of their error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from woodbury.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Scores", "Top"]

Side = Literal["support", "oppose", "either"]


@dataclass(frozen=True, eq=False)
class Top:
    """The strongest training examples of every query, strongest first.

    Attributes:
        rows: which training examples, ``[Q, k]``.
        values: their scores, ``[Q, k]``.

    Example:
        >>> import torch
        >>> from woodbury.influence import Scores
        >>> top = Scores(torch.tensor([[1.0, -3.0, 2.0]]), torch.arange(3), support=-1).top(1)
        >>> top.rows, top.values
        (tensor([[1]]), tensor([[-3.]]))
    """

    rows: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    r"""What adding a training example with weight $1/N$ does to what is measured of a query.

    $$ s_{qi} = -\frac1N \nabla m_q^T A^{-1} \nabla\ell_i \approx
       m_q(\text{refit with } F + \tfrac1N\ell_i) - m_q. $$

    A positive score raises the measurement, a negative one lowers it; leaving example $i$ out does
    $-w_i s_{qi}$. Where a *loss* is measured, examples with negative scores speak for the
    prediction: :meth:`top` knows that by ``support``.

    Attributes:
        values: $s$, ``[Q, N]``; in the unit of the measurement.
        rows: which training examples the columns are, ``[N]``.
        support: sign of the scores that speak for the prediction: -1 where a loss is measured.
        solve_error: bound (or estimate) of $\|x_q - A^{-1}\nabla m_q\|$ of every query, ``[Q]``;
            ``None`` where the error is known for all scores together only. Of scores from a
            :class:`GradientStore`: norms of several parts of the query, ``[Q, R]``. With
            ``query_rank``: $\|X_q^l - U_q^l V_q^{lT}\|_F$ of the layers it approximates.
        gradient_norms: $\|\nabla\ell_i\| / N$, ``[N]``. From a store: norms of the errors of
            these parts of the example, over $N$, ``[N, R]``. With ``query_rank``:
            $\|\nabla_l \ell_i\| / N$ of these layers.
        proven: whether ``solve_error`` is a bound.
        modules: scores by module, ``[M, Q, N]``, where they were asked for; they add up to
            ``values``.
        module_names: of the ``M`` modules.
        settings: matrix, damping, recipe and measurement, in words.
        solves: certificate of the linear solves.

    Example:
        >>> import torch
        >>> from woodbury.influence import Scores
        >>> scores = Scores(torch.tensor([[0.2, -0.1]]), torch.arange(2), support=-1)
        >>> scores.top(1).rows  # what lowers the loss of the query most
        tensor([[1]])
        >>> scores.to_frame()
           query  row  score
        0      0    1   -0.1
        1      0    0    0.2
    """

    values: Tensor
    rows: Tensor
    support: int = 1
    solve_error: Tensor | None = None
    gradient_norms: Tensor | None = None
    proven: bool = False
    modules: Tensor | None = None
    module_names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    solves: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.dim() != 2 or self.rows.shape != self.values.shape[1:]:
            raise ShapeError(
                f"values have shape {tuple(self.values.shape)} and rows {tuple(self.rows.shape)}; "
                "expected [Q, N] and [N]"
            )
        if self.support not in (-1, 1):
            raise ArgumentError(f"support is {self.support}; it must be -1 or 1")

    def __repr__(self) -> str:
        queries, examples = self.values.shape
        words = "".join(
            f", {name}={self.settings[name]!r}"
            for name in ("measurement", "method", "matrix")
            if name in self.settings
        )
        return f"Scores({queries} queries x {examples} examples{words})"

    def error(self) -> Tensor:
        r"""How far each score may be off because of the solve or a store, ``[Q, N]``.

        $|\hat s_{qi} - s_{qi}| \le \|x_q - A^{-1}\nabla m_q\|\,\|\nabla\ell_i\| / N$, a bound where
        ``proven``, to the rounding of the inner product. From a store: the sum of such products
        over its parts (see :class:`GradientStore`), and with ``query_rank`` over layers.

        Raises:
            ArgumentError: the scores carry no certificate.
        """
        if self.solve_error is None or self.gradient_norms is None:
            raise ArgumentError(
                "these scores carry no bound for each of them; certificate() says what is known of "
                "their error"
            )
        norms = self.gradient_norms.double().cpu()
        if norms.dim() == 2:
            return self.solve_error @ norms.T
        return torch.outer(self.solve_error, norms)

    def certificate(self) -> dict[str, Any]:
        """What a reader needs to trust the scores: plain numbers and words."""
        found: dict[str, Any] = {"queries": self.values.shape[0], "examples": self.values.shape[1]}
        if self.solve_error is not None and self.values.numel():
            largest = self.values.abs().amax(1).double().cpu()
            error = self._largest_errors()
            ratio = (error / largest).where(largest > 0, 0).amax().item()
            found["error_over_largest_score"] = ratio
            found["error_guarantee"] = "bound" if self.proven else "estimate"
        return {**found, **self.settings, **self.solves}

    def _largest_errors(self) -> Tensor:
        """Of each query, ``[Q]``; an upper limit where there are several parts."""
        assert self.solve_error is not None  # seen by the caller
        assert self.gradient_norms is not None
        norms = self.gradient_norms.double().amax(0).cpu()
        return self.solve_error @ norms if norms.dim() else self.solve_error * norms

    def top(self, k: int, side: Side = "support") -> Top:
        """The ``k`` strongest training examples for every query.

        Args:
            k: how many; all there are where it is more.
            side: ``"support"``: those that speak for the prediction (that lower a loss, raise a
                margin). ``"oppose"``: the other end. ``"either"``: by magnitude.

        Raises:
            ArgumentError: ``k`` is not positive, or ``side`` is not known.
        """
        if k < 1:
            raise ArgumentError(f"k is {k}; ask for at least one example")
        if side not in ("support", "oppose", "either"):
            raise ArgumentError(f"side is {side!r}; use 'support', 'oppose' or 'either'")
        sign = self.support if side == "support" else -self.support
        keyed = self.values.abs() if side == "either" else sign * self.values
        index = keyed.topk(min(k, self.values.shape[1]), dim=1).indices
        return Top(self.rows.to(index.device)[index], self.values.gather(1, index))

    def grouped(self, groups: Tensor | Sequence[Sequence[int]]) -> Tensor:
        r"""Scores of groups: what adding all examples of one does, to first order; ``[Q, G]``.

        Args:
            groups: the number of the group of every column, ``[N]`` integers (negative: of none),
                or a list of lists of row numbers, which may overlap.

        Raises:
            ArgumentError: a row that was not scored.
            ShapeError: there is not one number for each column.
        """
        member = membership(groups, self.rows).to(self.values)
        return self.values @ member.T

    def to_frame(self, k: int | None = None, side: Side = "support") -> pd.DataFrame:
        """A data frame with one line for each query and row, strongest first.

        Args:
            k: rows of each query; all by default.
            side: see :meth:`top`.
        """
        import pandas as pd

        top = self.top(self.values.shape[1] if k is None else k, side)
        queries, width = top.rows.shape
        return pd.DataFrame(
            {
                "query": torch.arange(queries).repeat_interleave(width).numpy(),
                "row": top.rows.flatten().cpu().numpy(),
                "score": top.values.flatten().cpu().float().numpy()
                if self.values.dtype in (torch.float16, torch.bfloat16)
                else top.values.flatten().cpu().numpy(),
            }
        )

    def to_parquet(self, path: str | Path, k: int | None = None, side: Side = "support") -> None:
        """Write :meth:`to_frame` as a Parquet file, whole or not at all.

        Args:
            path: where.
            k: rows of each query; all by default.
            side: see :meth:`top`.
        """
        from woodbury._files import atomic

        frame = self.to_frame(k, side)
        with atomic(Path(path)) as temporary:
            frame.to_parquet(temporary, index=False)

    def report(
        self,
        path: str | Path,
        *,
        k: int = 10,
        queries: Sequence[str] | None = None,
        examples: Sequence[str] | None = None,
    ) -> None:
        """Write an HTML page that opens offline: the strongest examples of every query.

        Args:
            path: where.
            k: examples on each side.
            queries: a description of every query.
            examples: a description of every training example, by its row number.
        """
        from woodbury.influence.report import write_report

        write_report(self, Path(path), k, queries, examples)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all; :meth:`load` reads it."""
        from woodbury.influence.files import save_tensors

        tensors = {"values": self.values, "rows": self.rows}
        for name in ("solve_error", "gradient_norms", "modules"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        words = {
            "support": self.support,
            "proven": self.proven,
            "module_names": list(self.module_names),
            "settings": dict(self.settings),
            "solves": dict(self.solves),
        }
        save_tensors(Path(path), tensors, words)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """What :meth:`save` wrote.

        Raises:
            DataError: the file is missing or was not written by :meth:`save`.
        """
        from woodbury.influence.files import load_tensors

        tensors, words = load_tensors(Path(path))
        words["module_names"] = tuple(words["module_names"])
        fields: dict[str, Any] = {**tensors, **words}
        return cls(**fields)


def membership(groups: Tensor | Sequence[Sequence[int]], rows: Tensor) -> Tensor:
    """Which group holds which column, ``[G, N]`` booleans."""
    if isinstance(groups, Tensor):
        if groups.shape != rows.shape or groups.is_floating_point():
            raise ShapeError(
                f"groups have shape {tuple(groups.shape)} and are {groups.dtype}; expected the "
                f"number of a group for each of {len(rows)} columns, integers"
            )
        count = int(groups.amax()) + 1 if groups.numel() else 0
        return (
            groups.to(rows.device)[None, :]
            == torch.arange(max(count, 0), device=rows.device)[:, None]
        )
    place = {int(row): column for column, row in enumerate(rows.tolist())}
    result = torch.zeros(len(groups), len(rows), dtype=torch.bool, device=rows.device)
    for number, group in enumerate(groups):
        for row in group:
            if int(row) not in place:
                raise ArgumentError(f"group {number} holds row {int(row)}, which has no score")
            result[number, place[int(row)]] = True
    return result
