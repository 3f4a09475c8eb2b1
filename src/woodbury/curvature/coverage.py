"""Which share of the parameters a curvature represents, and how."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Coverage", "CoverageRow"]


@dataclass(frozen=True)
class CoverageRow:
    """One block.

    Attributes:
        name: of the block.
        parameters: names of the parameters in it.
        entries: how many numbers they are.
        form: ``"Kronecker"``, ``"block"``, ``"diagonal"`` or ``"zero"`` (unused parameters).
        detail: sizes in words.

    Example:
        >>> from woodbury.curvature import CoverageRow
        >>> CoverageRow("0", ("0.weight", "0.bias"), 10, "Kronecker", "2 x 5").form
        'Kronecker'
    """

    name: str
    parameters: tuple[str, ...]
    entries: int
    form: str
    detail: str


@dataclass(frozen=True)
class Coverage:
    """All blocks; ``print`` it for a table.

    Attributes:
        rows: one for each block.
        note: what else there is to know.

    Example:
        >>> from woodbury.curvature import Coverage, CoverageRow
        >>> rows = (CoverageRow("0", ("0.weight",), 6, "Kronecker", "2 x 3"),
        ...         CoverageRow("1", ("1.weight", "1.bias"), 4, "block", "4 x 4"))
        >>> Coverage(rows).shares
        {'Kronecker': 0.6, 'block': 0.4}
    """

    rows: tuple[CoverageRow, ...]
    note: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """The share of the parameters' entries that has each form."""
        total = sum(row.entries for row in self.rows)
        shares: dict[str, float] = {}
        for row in self.rows:
            shares[row.form] = shares.get(row.form, 0.0) + row.entries / total
        return shares

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=0)
        lines = [
            f"{row.name:<{width}}  {row.entries:>12,}  {row.form:<9}  {row.detail}"
            for row in self.rows
        ]
        shares = ", ".join(f"{form} {share:.1%}" for form, share in self.shares.items())
        return "\n".join([*lines, f"of all entries: {shares}", *([self.note] if self.note else [])])
