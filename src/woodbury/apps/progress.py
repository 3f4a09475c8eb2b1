"""Progress of long jobs: bars on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Display", "ProgressCallback"]

ProgressCallback = Callable[[str, float], None]
SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows stages of a job and how far each has come.

    Call it with ``(stage, fraction)``; a stage appears with its first call and is finished by
    ``fraction >= 1`` or by the first call of another. On a terminal stages are bars; elsewhere
    each gets a line when it begins and another every ten seconds, so that logs stay short.

    Args:
        stream: where to write, standard error by default, so that output can be piped.
        forward: called with the same arguments, for those who show progress themselves.
        quiet: show nothing.

    Example:
        >>> with Display(quiet=True) as display:
        ...     display("fitting", 0.5)
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        forward: ProgressCallback | None = None,
        quiet: bool = False,
    ) -> None:
        self._stream = stream or sys.stderr
        self._forward = forward
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._last_line = 0.0

    def __enter__(self) -> Display:
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            if kind is None:
                self._finish(self._stage)
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, fraction: float) -> None:
        """Report that ``stage`` has come to ``fraction`` (0 to 1)."""
        if self._forward is not None:
            self._forward(stage, fraction)
        if self._quiet:
            return
        if self._bars is not None:
            self._draw(stage, fraction)
        else:
            self._print(stage, fraction)
        self._stage = stage

    def _draw(self, stage: str, fraction: float) -> None:
        assert self._bars is not None
        if stage != self._stage:
            self._finish(self._stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=1.0)
        self._bars.update(self._tasks[stage], completed=min(fraction, 1.0))

    def _finish(self, stage: str) -> None:
        if self._bars is not None and stage in self._tasks:
            self._bars.update(self._tasks[stage], completed=1.0)
            self._bars.stop_task(self._tasks[stage])

    def _print(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        if stage != self._stage:
            print(f"{stage} ...", file=self._stream, flush=True)
        elif now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        else:
            print(f"{stage} ... {100 * fraction:.0f}%", file=self._stream, flush=True)
        self._last_line = now
