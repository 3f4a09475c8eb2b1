from __future__ import annotations

import io

import pytest

from woodbury.apps import progress
from woodbury.apps.progress import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 2.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    with Display(stream) as display:
        display("reading", 0.0)
        display("fitting", 0.0)
        display("fitting", 0.4)  # too soon for another line
        display("fitting", 0.9)
    assert stream.getvalue().splitlines() == ["reading ...", "fitting ...", "fitting ... 90%"]


def test_bars_on_a_terminal() -> None:
    stream = Terminal()
    with Display(stream) as display:
        display("reading", 0.3)
        display("fitting", 0.5)
    text = stream.getvalue()
    assert "reading" in text
    assert text.count("100%") >= 2  # the last frame shows both stages finished


def test_bars_stop_where_they_were_on_failure() -> None:
    stream = Terminal()

    def fail() -> None:
        with Display(stream) as display:
            display("fitting", 0.5)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert "100%" not in stream.getvalue()


def test_forwarding_and_silence(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, float]] = []
    with Display(forward=lambda stage, share: seen.append((stage, share)), quiet=True) as display:
        display("fitting", 0.5)
    assert seen == [("fitting", 0.5)]
    assert capsys.readouterr().err == ""
