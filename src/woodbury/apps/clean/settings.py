"""What a run is told to do, checked before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from woodbury import __version__
from woodbury.apps.settings import check_seed, parse_bytes
from woodbury.errors import DataError

__all__ = ["Settings"]

TASKS = ("auto", "classification", "regression")
MODELS = ("auto", "linear", "kernel", "mlp")
FORMATS = ("auto", "csv", "parquet")


@dataclass(frozen=True)
class Settings:
    """Everything besides the table that the result depends on."""

    label: str | None
    text: tuple[str, ...]
    task: str
    model: str
    seed: int
    budget_bytes: int
    format: str
    version: str = __version__

    @classmethod
    def check(
        cls,
        *,
        label: str | None,
        text: str | Sequence[str] | None,
        task: str,
        model: str,
        seed: Any,
        budget: str | int,
        format: str,
    ) -> Settings:
        """Build the settings, or raise :class:`DataError` with the values that are allowed."""
        for name, value, allowed in (
            ("task", task, TASKS),
            ("model", model, MODELS),
            ("format", format, FORMATS),
        ):
            if value not in allowed:
                raise DataError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
        check_seed(seed)
        columns = (text,) if isinstance(text, str) else tuple(text or ())
        return cls(label, columns, task, model, seed, parse_bytes(budget), format)

    def as_json(self) -> dict[str, Any]:
        """As JSON values, to be stored and compared."""
        return {**asdict(self), "text": list(self.text)}
