"""The command as users meet it: what it prints, its exit codes, and every kind of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from woodbury.cli.app import app
from woodbury.errors import SingularError

pytestmark = pytest.mark.usefixtures("stub_engine")


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def one_line(text: str) -> str:
    return " ".join(text.split())


def refused(result: Result, *words: str) -> None:
    """The user's mistake: exit code 2, the words in the message, and no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    said = one_line(result.stderr)
    for word in words:
        assert word in said
    assert "Traceback" not in result.output


def test_a_table(flowers_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("clean", flowers_csv, "--label", "kind", "--out", out)
    assert result.exit_code == 0, result.output
    assert "1 of 60 rows have a label in kind that is probably wrong (1.7%)." in result.stdout
    assert f"Report: {out / 'report.html'}" in result.stdout
    assert "tulip" in result.stdout
    assert "Judged by the kernel model on 11 numbers a row, scaled column by column" in one_line(
        result.stdout
    )
    assert "Wrote rows.csv, cleaned.csv, summary.json" in result.stdout
    assert "fitting ..." in result.stderr
    assert pd.read_csv(out / "rows.csv").loc[4, "suggested_label"] == "rose"


def test_default_folder_is_named_after_the_table(
    flowers_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("clean", "flowers.csv", "--label", "kind").exit_code == 0
    again = command("clean", "flowers.csv", "--label", "kind")
    assert again.exit_code == 0
    assert "results of an earlier run in this folder were replaced" in again.stdout
    assert (tmp_path / "woodbury-report" / "flowers" / "report.html").exists()


def test_every_option(flowers: pd.DataFrame, tmp_path: Path) -> None:
    flowers["said"] = ["a b c", "d e f"] * 30
    flowers.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "checked.txt").write_text("4\n")
    result = command(
        *("clean", tmp_path / "t.parquet", "--label", "kind", "--out", tmp_path / "out"),
        *("--trusted", tmp_path / "checked.txt", "--text", "said", "--task", "classification"),
        *("--model", "linear", "--seed", 3, "--budget", "1GiB", "--format", "csv", "--resume"),
    )
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert settings == {
        "label": "kind",
        "text": ["said"],
        "task": "classification",
        "model": "linear",
        "seed": 3,
        "budget_bytes": 1024**3,
        "format": "csv",
        "version": settings["version"],
    }
    assert "0 of 60 rows" in result.stdout


def test_notes_are_printed(flowers: pd.DataFrame, tmp_path: Path) -> None:
    flowers.assign(nothing=None).to_csv(tmp_path / "t.csv", index=False)
    result = command("clean", tmp_path / "t.csv", "--label", "kind", "--out", tmp_path / "out")
    assert "Note: Column 'nothing' is empty in every row" in one_line(result.stdout)


def test_demo(tmp_path: Path) -> None:
    result = command("clean", "--demo", "digits", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Against the truth: average precision 0.9" in result.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("average_precision", "auc", "precision", "recall", "expected_calibration_error"):
        assert 0 <= summary[name] <= 1
    assert summary["table"]["name"] == "digits"
    assert summary["preparation"]["image_shape"] == [8, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clean"], "Give one table"),
        (["clean", "t.csv", "--demo", "digits"], "Give one table"),
        (["clean", "--demo", "cats"], "There is no demonstration 'cats'. There is: digits"),
        (["clean", "--demo", "digits", "--label", "x"], "leave --label away"),
        (["clean", "none.csv", "--label", "x"], "There is no file none.csv"),
        (["clean", "t.csv"], "with --label COLUMN"),
        (["clean", "t.csv", "--label", "b", "--task", "guess"], "task must be one of"),
        (["clean", "t.csv", "--label", "b", "--model", "guess"], "model must be one of"),
        (["clean", "t.csv", "--label", "b", "--budget", "tiny"], "not an amount of memory"),
        (["clean", "t.csv", "--label", "b", "--seed", "-1"], "seed must be"),
        (["clean", "t.csv", "--label", "b", "--seed", "x"], "Invalid value"),
        (["clean", "t.csv", "--label", "b", "--trusted", "no.txt"], "There is no file no.txt"),
        (["clean", "t.csv", "--label", "b", "--text", "no"], "no column 'no' (--text)"),
        (["clean", "t.csv", "--lable", "b"], "No such option"),
        (["clean", "t.csv", "u.csv"], "unexpected extra argument"),
        (["scrub"], "No such command"),
    ],
)
def test_mistaken_commands(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("a,b\n" + "1.5,x\n2.5,y\n" * 20)
    refused(command(*words), said)


ROWS = "".join(f"{i / 7},{i % 5},{'rose' if i % 2 else 'tulip'}\n" for i in range(60))


def table(text: str, name: str = "t.csv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def cut_parquet(folder: Path) -> Path:
    pd.DataFrame({"a": range(60), "kind": ["x", "y"] * 30}).to_parquet(folder / "t.parquet")
    content = (folder / "t.parquet").read_bytes()
    (folder / "t.parquet").write_bytes(content[: len(content) // 2])
    return folder / "t.parquet"


def infinite_npz(folder: Path) -> Path:
    rows = np.ones((40, 3))
    rows[7, 1] = np.inf
    np.savez(folder / "t.npz", X=rows, kind=np.arange(40) % 2)
    return folder / "t.npz"


BAD_TABLES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing label column": (
        table("a,b,Kind\n" + ROWS),
        ["t.csv has no column 'kind'", "Did you mean 'Kind'?"],
    ),
    "empty label column": (table("a,kind\n" + "1,\n2,\n" * 20), ["'kind' is empty"]),
    "constant label": (table("a,kind\n" + "1,x\n2,x\n" * 20), ["same label 'x'"]),
    "class with one row": (
        table("a,b,kind\n" + ROWS + "1,2,lily\n"),
        ["a class with one: 'lily' (row 60)", "merge the class"],
    ),
    "all columns missing": (
        table("a,b,kind\n" + ",,x\n,,y\n" * 20),
        ["no column that could tell one label from another"],
    ),
    "infinite value": (
        table("a,b,kind\n" + ROWS + "inf,2,rose\n"),
        ["column 'a' is infinite in row 60", "leave the cell empty"],
    ),
    "infinite value in NPZ": (infinite_npz, ["X holds inf in row 7, column 1"]),
    "duplicate column names": (
        table("a,a,kind\n" + ROWS),
        ["columns 1 and 2 share the name 'a'"],
    ),
    "empty file": (table(""), ["t.csv is empty"]),
    "header only": (table("a,b,kind\n"), ["has a header but no rows"]),
    "too few rows": (table("a,kind\n1,x\n2,y\n"), ["2 labelled rows", "at least 10"]),
    "50,000 distinct labels": (
        table("a,kind\n" + "".join(f"{i % 7},name{i}\n" for i in range(50_000))),
        ["50,000 different values", "--label"],
    ),
    "cut CSV": (table("a,b,kind\n" + ROWS[:-9]), ["line 61", "cut off"]),
    "open quotation mark": (table('a,b,kind\n1,"2,rose\n' + ROWS), ["line 2", "quotation mark"]),
    "cut Parquet": (cut_parquet, ["t.parquet cannot be read as Parquet", "cut off"]),
    "binary file named CSV": (table("a,b\0,kind\n"), ["t.csv is not a text file"]),
    "spreadsheet": (table("x", "t.xlsx"), ["t.xlsx is a spreadsheet", "CSV"]),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_bad_tables(what: str, tmp_path: Path) -> None:
    make, words = BAD_TABLES[what]
    out = tmp_path / "out"
    refused(command("clean", make(tmp_path), "--label", "kind", "--out", out), *words)
    assert not list(out.glob("*.html"))


def test_text_where_a_number_is_declared(tmp_path: Path) -> None:
    path = table("a,kind\n" + "1,2.5\n2,3.5\n" * 20 + "3,many\n")(tmp_path)
    result = command(
        "clean", path, "--label", "kind", "--task", "regression", "--out", tmp_path / "out"
    )
    refused(result, "regression needs numbers", "row 40 holds 'many'")


def test_a_mistake_can_be_corrected_in_the_same_folder(flowers_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(command("clean", flowers_csv, "--label", "kinds", "--out", out), "no column 'kinds'")
    assert command("clean", flowers_csv, "--label", "kind", "--out", out).exit_code == 0


def test_unwritable_folder_is_found_before_work(
    flowers_csv: Path, tmp_path: Path, stub_engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub_engine, "run", lambda *_, **__: pytest.fail("worked in vain"))
    (tmp_path / "file").write_text("")
    result = command("clean", flowers_csv, "--label", "kind", "--out", tmp_path / "file" / "out")
    refused(result, "cannot be written", "--out")


def test_folder_with_other_files(flowers_csv: Path, tmp_path: Path) -> None:
    result = command("clean", flowers_csv, "--label", "kind", "--out", tmp_path)
    refused(result, "not empty", "'flowers.csv'", "--out")


def fail_with(error: BaseException) -> Callable[..., None]:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


def test_interruption_says_how_to_go_on(
    flowers_csv: Path, tmp_path: Path, stub_engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("clean", flowers_csv, "--label", "kind", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(stub_engine, "run", fail_with(KeyboardInterrupt()))
        result = command(*words)
    assert result.exit_code == 130
    assert "Add --resume" in result.stderr
    refused(command(*words), "unfinished run of flowers.csv", "--resume")
    refused(command(*words, "--resume", "--seed", 5), "seed was 0 and is 5")
    assert command(*words, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("8 GiB"), "Out of memory: MemoryError: 8 GiB"),
        (OSError(28, "No space left on device"), "Failed: OSError: [Errno 28] No space left"),
        (RuntimeError(""), "Failed: RuntimeError: no message"),
        (SingularError("no inverse"), "SingularError: no inverse Another --model may do"),
    ],
)
def test_failures_are_one_line(
    error: Exception,
    words: str,
    flowers_csv: Path,
    tmp_path: Path,
    stub_engine: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stub_engine, "run", fail_with(error))
    call = ("clean", flowers_csv, "--label", "kind", "--out")
    result = command(*call, tmp_path / "out")
    assert result.exit_code == 1
    assert words in one_line(result.stderr)
    assert "WOODBURY_DEBUG=1" in result.stderr
    assert "Traceback" not in result.output
    monkeypatch.setenv("WOODBURY_DEBUG", "1")
    assert command(*call, tmp_path / "other").exception is error


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    path = table("a,[bold]k[/x]\n" + "1,[red]\n2,[/]\n3,[/]\n" * 20)(tmp_path)
    result = command("clean", path, "--label", "[bold]k[/x]", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "[bold]k[/x]" in result.stdout
    refused(command("clean", path, "--label", "[/]", "--out", tmp_path / "o"), "no column '[/]'")
