from __future__ import annotations

import json
from pathlib import Path

import pytest

from woodbury.apps.clean.state import RunFolder
from woodbury.errors import DataError

SETTINGS = {"label": "kind", "seed": 0}
SOURCE = {"name": "t.csv", "sha256": "abc", "trusted_sha256": None}


def started(path: Path) -> RunFolder:
    folder = RunFolder.open(path, resume=False)
    folder.begin(SETTINGS, SOURCE)
    return folder


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    folder = started(tmp_path / "a" / "b")
    state = json.loads(folder.state.read_text())
    assert state["settings"] == SETTINGS
    assert state["ended"] == "killed"
    assert not folder.replaces
    started(tmp_path / "a" / "c")


@pytest.mark.parametrize("how", ["finished", "failed"])
def test_a_run_that_ended_is_replaced(tmp_path: Path, how: str) -> None:
    folder = started(tmp_path)
    for name in ("rows.csv", "report.html", "mine.txt"):
        (tmp_path / name).write_text("old")
    folder.checkpoint.mkdir()
    (folder.checkpoint / "a.json").write_text("old")
    folder.end(how)
    again = started(tmp_path)
    assert again.replaces
    assert not folder.checkpoint.exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mine.txt", "state"]


def test_a_killed_run_is_kept(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.checkpoint.write_text("work")
    with pytest.raises(DataError, match=r"unfinished run of t\.csv. Add --resume"):
        RunFolder.open(tmp_path, resume=False)
    (tmp_path / ".rows.1.tmp.csv").write_text("half")
    again = RunFolder.open(tmp_path, resume=True)
    again.begin(SETTINGS, SOURCE)
    assert again.resumed
    assert again.checkpoint.read_text() == "work"
    assert not (tmp_path / ".rows.1.tmp.csv").exists()


def test_resuming_nothing_starts_anew(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, resume=True)
    folder.begin(SETTINGS, SOURCE)
    assert not folder.resumed


@pytest.mark.parametrize(
    ("settings", "source", "words"),
    [
        ({**SETTINGS, "seed": 1}, SOURCE, "seed was 0 and is 1"),
        ({**SETTINGS, "label": "a"}, SOURCE, "label was 'kind' and is 'a'"),
        (SETTINGS, {**SOURCE, "sha256": "xyz"}, "the content of t.csv is not the same"),
        (SETTINGS, {**SOURCE, "trusted_sha256": "1"}, "the trusted rows are not the same"),
    ],
)
def test_resuming_something_else(
    tmp_path: Path, settings: dict[str, object], source: dict[str, object], words: str
) -> None:
    started(tmp_path)
    folder = RunFolder.open(tmp_path, resume=True)
    with pytest.raises(DataError) as caught:
        folder.begin(settings, source)
    assert "Cannot resume" in str(caught.value)
    assert words in str(caught.value)
    assert json.loads(folder.state.read_text())["settings"] == SETTINGS


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    for resume in (False, True):
        with pytest.raises(DataError, match=r"not empty \('thesis.tex', 1 files\)"):
            RunFolder.open(tmp_path, resume=resume)


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/woodbury")):
        with pytest.raises(DataError, match="cannot be written"):
            RunFolder.open(path, resume=False)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)  # the superuser may write everywhere
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        RunFolder.open(tmp_path / "locked", resume=False)


@pytest.mark.parametrize("text", ["", "{", '{"format": 99}', '{"format": 1}', "[]"])
def test_a_broken_state_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "run.json").write_text(text)
    assert RunFolder.open(tmp_path, resume=True).read() is None
