from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

import woodbury
from woodbury.errors import BudgetError, DataError

pytestmark = pytest.mark.usefixtures("stub_engine")


def test_from_a_frame(flowers: pd.DataFrame) -> None:
    before = flowers.copy()
    result = woodbury.clean(flowers, label="kind")
    assert result.suspects["row"].tolist() == [4]
    assert result.rows.loc[4, "suggested_label"] == "rose"
    assert result.cleaned.loc[4, "kind"] == "rose"
    assert result.cleaned["woodbury_changed"].sum() == 1
    assert result.summary["suspects"] == result.summary["changed"] == 1
    assert result.probabilities is not None
    assert result.probabilities.shape == (60, 2)
    assert result.folder is None
    pd.testing.assert_frame_equal(flowers, before)


def test_index_of_the_frame_is_kept(flowers: pd.DataFrame) -> None:
    flowers.index = pd.Index([f"flower{i}" for i in range(60)])
    result = woodbury.clean(flowers, label="kind")
    assert result.cleaned.index.tolist() == flowers.index.tolist()
    assert result.cleaned.loc["flower4", "kind"] == "rose"
    assert result.rows["row"].tolist() == list(range(60))


@pytest.mark.parametrize("format", ["auto", "parquet"])
def test_files(flowers_csv: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    result = woodbury.clean(flowers_csv, label="kind", out=out, format=format)
    suffix = "csv" if format == "auto" else "parquet"
    assert sorted(item.name for item in out.iterdir()) == [
        f"cleaned.{suffix}",
        "report.html",
        f"rows.{suffix}",
        "state",
        "summary.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert summary["files"]["rows"] == f"rows.{suffix}"
    assert summary["table"]["rows"] == 60
    assert summary["classes"] == ["rose", "tulip"]
    assert summary["preparation"]["scaling"] == "per column"
    assert summary["certificate"]["relative_residual"] == 1e-9
    assert summary["peak_memory_bytes"] > 1e6
    assert json.loads((out / "state" / "run.json").read_text())["ended"] == "finished"


def test_trusted_rows_are_passed_on_and_counted(flowers: pd.DataFrame) -> None:
    result = woodbury.clean(flowers, label="kind", trusted=[4])
    assert len(result.suspects) == 0
    assert result.summary["rows_trusted"] == 1


def test_rows_without_label(flowers: pd.DataFrame) -> None:
    flowers.loc[10, "kind"] = None
    result = woodbury.clean(flowers, label="kind")
    assert result.suspects["row"].tolist() == [4]
    assert result.rows.loc[10, "rank"] == 60
    assert result.summary["rows_without_label"] == 1
    assert pd.isna(result.cleaned.loc[10, "kind"])


def test_regression(flowers: pd.DataFrame) -> None:
    table = pd.DataFrame({"x": np.arange(80) / 7, "y": np.arange(80) * 1.5})
    table.loc[33, "y"] = 500.0
    result = woodbury.clean(table, label="y")
    assert result.summary["task"] == "regression"
    assert result.suspects["row"].iloc[0] == 33
    assert 40 < result.cleaned.loc[33, "y"] < 60
    with pytest.raises(DataError, match="truth scores classification"):
        woodbury.clean(table, label="y", truth=table["y"])


def test_truth_is_scored(flowers: pd.DataFrame) -> None:
    truth = flowers["kind"].where(flowers.index != 4, "rose")
    summary = woodbury.clean(flowers, label="kind", truth=truth).summary
    assert summary["average_precision"] == 1
    assert summary["wrong_labels"] == 1
    with pytest.raises(DataError, match=r"truth has shape \[3\]; the table has 60 rows"):
        woodbury.clean(flowers, label="kind", truth=["a", "b", "c"])


def test_progress_can_be_followed(flowers: pd.DataFrame, capsys: Any) -> None:
    seen: list[str] = []
    woodbury.clean(flowers, label="kind", progress=lambda stage, _: seen.append(stage))
    assert list(dict.fromkeys(seen)) == [
        "reading the table",
        "preparing columns",
        "fitting",
        "writing",
    ]
    assert capsys.readouterr().err == ""
    for quiet in (False, None):  # the tests' standard error is no terminal
        woodbury.clean(flowers, label="kind", progress=quiet)
        assert capsys.readouterr().err == ""
    woodbury.clean(flowers, label="kind", progress=True)
    assert "fitting" in capsys.readouterr().err


def test_a_new_run_replaces_a_finished_one(flowers_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    woodbury.clean(flowers_csv, label="kind", out=out, format="parquet")
    result = woodbury.clean(flowers_csv, label="kind", out=out)
    assert result.summary["replaced_an_earlier_run"]
    assert not (out / "rows.parquet").exists()


def test_an_interrupted_run_is_resumed(
    flowers_csv: Path, tmp_path: Path, stub_engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    woodbury.clean(flowers_csv, label="kind", out=whole)
    run, calls = stub_engine.run, []

    def fail(*_: Any, **options: Any) -> None:
        options["checkpoint"].write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(stub_engine, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        woodbury.clean(flowers_csv, label="kind", out=out)

    def go_on(*arguments: Any, **options: Any) -> Any:
        calls.append((options["resume"], options["checkpoint"].read_text()))
        return run(*arguments, **options)

    monkeypatch.setattr(stub_engine, "run", go_on)
    with pytest.raises(DataError, match="Add --resume"):
        woodbury.clean(flowers_csv, label="kind", out=out)
    with pytest.raises(DataError, match="seed was 0 and is 1"):
        woodbury.clean(flowers_csv, label="kind", out=out, resume=True, seed=1)
    woodbury.clean(flowers_csv, label="kind", out=out, resume=True)
    assert calls == [(True, "half")]
    for name in ("rows.csv", "cleaned.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_failed_run_can_be_tried_again_with_other_settings(
    flowers_csv: Path, tmp_path: Path, stub_engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stub_engine, "run", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            woodbury.clean(flowers_csv, label="kind", out=tmp_path / "out")
    woodbury.clean(flowers_csv, label="kind", out=tmp_path / "out", model="linear")


def test_a_changed_table_is_not_resumed(
    flowers_csv: Path, tmp_path: Path, stub_engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(stub_engine, "run", fail)
    with pytest.raises(MemoryError):
        woodbury.clean(flowers_csv, label="kind", out=tmp_path / "out")
    with flowers_csv.open("a") as handle:
        handle.write("1.0,20,red,rose\n")
    with pytest.raises(DataError, match=r"content of flowers\.csv is not the same"):
        woodbury.clean(flowers_csv, label="kind", out=tmp_path / "out", resume=True)


def test_the_output_folder_is_checked_before_the_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        woodbury.clean(tmp_path / "none.csv", label="kind", out=tmp_path / "file")


def test_budget(tmp_path: Path) -> None:
    rows = np.zeros((300, 60_000), dtype=np.uint8)
    np.savez_compressed(tmp_path / "t.npz", X=rows, y=np.arange(300) % 2)
    with pytest.raises(BudgetError, match="Raise --budget"):
        woodbury.clean(tmp_path / "t.npz", budget="64MiB")


def test_a_table_that_says_nothing_is_doubted(flowers: pd.DataFrame) -> None:
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"x": generator.normal(size=90), "kind": generator.integers(0, 3, 90)})
    notes = woodbury.clean(table, label="kind").summary["notes"]
    assert len(notes) == 1
    assert "say too little about 'kind'" in notes[0]
    assert "--task regression" in notes[0]
    assert woodbury.clean(flowers, label="kind").summary["notes"] == []
