"""What scores can be asked for: tops, groups, frames, files and the page."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from woodbury.errors import ArgumentError, DataError, ShapeError
from woodbury.influence import Scores, SelfInfluence

VALUES = torch.tensor([[0.5, -2.0, 1.0, 0.0], [-1.0, 3.0, -0.25, 0.75]], dtype=torch.float64)


def scores(support: int = 1) -> Scores:
    return Scores(
        VALUES,
        torch.tensor([2, 5, 6, 9]),
        support,
        torch.tensor([0.1, 0.2], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        proven=True,
        modules=torch.stack([VALUES / 4, 3 * VALUES / 4]),
        module_names=("a", "b"),
        settings={"matrix": "Gauss-Newton"},
        solves={"ok": True},
    )


def test_top_by_side() -> None:
    assert scores().top(2).rows.tolist() == [[6, 2], [5, 9]]
    assert scores().top(2).values.tolist() == [[1.0, 0.5], [3.0, 0.75]]
    assert scores().top(1, "oppose").rows.tolist() == [[5], [2]]
    assert scores(-1).top(1).rows.tolist() == [[5], [2]]  # a lower loss speaks for it
    assert scores(-1).top(1, "oppose").rows.tolist() == [[6], [5]]
    assert scores().top(9, "either").rows.tolist() == [[5, 6, 2, 9], [5, 2, 9, 6]]
    with pytest.raises(ArgumentError, match="k is 0"):
        scores().top(0)
    with pytest.raises(ArgumentError, match="side is 'for'"):
        scores().top(1, "for")  # type: ignore[arg-type]


def test_groups_are_sums() -> None:
    by_label = scores().grouped(torch.tensor([0, 1, 0, -1]))
    torch.testing.assert_close(by_label, torch.tensor([[1.5, -2.0], [-1.25, 3.0]]).double())
    by_rows = scores().grouped([[2, 6], [5], [2, 5, 6, 9]])
    torch.testing.assert_close(by_rows[:, :2], by_label)
    torch.testing.assert_close(by_rows[:, 2], VALUES.sum(1))
    with pytest.raises(ArgumentError, match="group 1 holds row 3"):
        scores().grouped([[2], [3]])
    with pytest.raises(ShapeError, match="4 columns"):
        scores().grouped(torch.tensor([0, 1]))


def test_error_and_certificate() -> None:
    torch.testing.assert_close(
        scores().error(), torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8]]).double()
    )
    words = scores().certificate()
    assert words["error_over_largest_score"] == pytest.approx(max(0.4 / 2.0, 0.8 / 3.0))
    assert words["error_guarantee"] == "bound"
    assert words["matrix"] == "Gauss-Newton"
    with pytest.raises(ArgumentError, match="no bound"):
        Scores(VALUES, torch.arange(4)).error()
    with pytest.raises(ShapeError, match=r"\[Q, N\]"):
        Scores(VALUES, torch.arange(3))
    with pytest.raises(ArgumentError, match="support is 2"):
        Scores(VALUES, torch.arange(4), support=2)


def test_frame_and_parquet(tmp_path: Path) -> None:
    frame = scores().to_frame(2)
    assert frame["query"].tolist() == [0, 0, 1, 1]
    assert frame["row"].tolist() == [6, 2, 5, 9]
    assert frame["score"].tolist() == [1.0, 0.5, 3.0, 0.75]
    assert len(scores().to_frame()) == 8
    scores().to_parquet(tmp_path / "scores.parquet", 2)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), frame)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.parquet"]
    half = Scores(VALUES.to(torch.bfloat16), torch.arange(4)).to_frame(1)
    assert half["score"].tolist() == [1.0, 3.0]


def test_saved_and_loaded(tmp_path: Path) -> None:
    scores(-1).save(tmp_path / "scores.safetensors")
    found = Scores.load(tmp_path / "scores.safetensors")
    for name in ("values", "rows", "solve_error", "gradient_norms", "modules"):
        assert torch.equal(getattr(found, name), getattr(scores(), name))
    assert (found.support, found.proven, found.module_names) == (-1, True, ("a", "b"))
    assert found.certificate() == scores().certificate()
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("missing", "broken"):
        with pytest.raises(DataError, match="cannot be read"):
            Scores.load(tmp_path / f"{name}.safetensors")


def test_report_says_what_the_signs_mean(tmp_path: Path) -> None:
    names = [f"<row {i}>" for i in range(10)]
    scores(-1).report(tmp_path / "r.html", k=2, queries=["first", "second"], examples=names)
    page = (tmp_path / "r.html").read_text()
    assert "&lt;row 5&gt;" in page
    assert "<row 5>" not in page
    assert "negative scores lower it" in page
    assert "http" not in page  # it opens offline
    assert page.index("&lt;row 5&gt;") < page.index("&lt;row 6&gt;")  # supports come first
    assert "row 9" not in page.split("Query 1")[0]  # a score of zero speaks for nothing
    scores().report(tmp_path / "r.html")
    assert "Positive scores raise" in (tmp_path / "r.html").read_text()
    with pytest.raises(ArgumentError, match="1 descriptions are given for 2 queries"):
        scores().report(tmp_path / "r.html", queries=["first"])
    with pytest.raises(ArgumentError, match="rows up to 9"):
        scores().report(tmp_path / "r.html", examples=names[:4])


def test_self_influence_of_nothing() -> None:
    found = SelfInfluence(torch.zeros(0), torch.zeros(0), True)
    assert found.certificate()["error_over_largest_score"] == 0
    with pytest.raises(ArgumentError, match="k is 0"):
        found.top(0)
