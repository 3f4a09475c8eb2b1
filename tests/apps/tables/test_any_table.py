"""Whatever a table holds, it becomes finite numbers or a sentence about what is wrong with it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from woodbury.apps.tables import prepare, read_table
from woodbury.errors import DataError

ROWS = 30
POOLS: list[list[Any]] = [
    [None],
    [0, 1],
    [1, 2, 3],
    [0.5, -2.25, 1e12, None],
    [float("nan"), float("inf"), 1.0],
    [1e300, -1e300],
    [True, False, None],
    ["yes", "no"],
    ["a", "b", "c", "", None],
    ["1", "2", "x"],
    ["1,5", "2,5"],
    ["2024-01-01", "2024-02-30", "2024-03-01"],
    ["31/12/2020", "01/02/2021", "13/13/2021"],
    ["2024-01-01T10:00:00Z", "2024-01-02 11:00:00+02:00"],
    [datetime.date(2024, 1, 1), datetime.date(1900, 1, 1), None],
    [datetime.datetime(2024, 1, 1, 5), datetime.datetime(2024, 1, 2)],
    [pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2025-01-01", tz="UTC")],
    [datetime.timedelta(1), datetime.timedelta(2)],
    ["the quick brown fox", "jumps over a lazy dog", "!!! ??? ...", "日本 語 の テキスト"],
    ["a\nb", 'say "hi"', "x,y", "tab\there", "🙂"],
    [1, "mixed", 2.5, None],
    [10**30, 5],
    [complex(1, 2), complex(3, 4)],
    [b"bytes", b"more"],
    [[1], [2, 3]],
    [{"a": 1}, {}],
]


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns: dict[str, Any] = {}
    for i in range(draw(st.integers(1, 4))):
        pool = draw(st.sampled_from(POOLS))
        columns[f"c{i}"] = [pool[k] for k in generator.integers(0, len(pool), ROWS)]
        if draw(st.booleans()):
            columns[f"d{i}"] = [f"{value}{k}" for k, value in enumerate(columns[f"c{i}"])]
    labels = draw(st.sampled_from([["p", "q"], [0, 1, None], [0.5, 1.5], [True, False]]))
    columns["label"] = (labels * ROWS)[:ROWS]
    return pd.DataFrame(columns)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(frame=frames(), task=st.sampled_from(["auto", "regression", "classification"]))
def test_frames(frame: pd.DataFrame, task: str) -> None:
    try:
        prepared = prepare(read_table(frame, "label"), task=task)
    except DataError:
        return
    assert prepared.X.shape[0] == ROWS
    assert prepared.X.dtype == np.float32
    assert np.isfinite(prepared.X).all()
    assert (prepared.X.std(axis=0) < 30).all()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(frame=frames(), ending=st.sampled_from(["csv", "parquet"]))
def test_files(frame: pd.DataFrame, ending: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path: Path = tmp_path_factory.mktemp("t") / f"t.{ending}"
    if ending == "csv":
        frame.to_csv(path, index=False)
    else:
        try:
            frame.to_parquet(path)
        except Exception:  # what Parquet cannot hold
            return
    try:
        table = read_table(path, "label")
        assert len(table) == ROWS
        prepared = prepare(table)
    except DataError:
        return
    assert np.isfinite(prepared.X).all()


@settings(max_examples=100)
@given(content=st.binary(max_size=200), ending=st.sampled_from(["csv", "tsv", "parquet", "npz"]))
def test_garbage(content: bytes, ending: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / f"t.{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\."):
        prepare(read_table(path, "label"))


@settings(max_examples=100)
@given(text=st.text(max_size=120))
def test_garbage_below_a_header(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_text("a,label\n" + text, encoding="utf-8", errors="replace", newline="")
    with pytest.raises(DataError, match=r"t\.csv"):
        prepare(read_table(path, "label"))
