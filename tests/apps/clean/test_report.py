from __future__ import annotations

import base64
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import woodbury
from woodbury.apps.clean.demo import demo_table
from woodbury.apps.clean.report_certificate import certificate_groups
from woodbury.apps.clean.report_charts import histogram, matrix, scatter, thumbnail

pytestmark = pytest.mark.usefixtures("stub_engine")
VOID = {"meta", "img", "br", "line", "rect", "circle"}


class Page(HTMLParser):
    """Collects what the tests ask of a page, and insists that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def page_of(table: Any, tmp_path: Path, **options: Any) -> Page:
    result = woodbury.clean(table, **options)
    return Page(result.report(tmp_path / "report.html").read_text(encoding="utf-8"))


def check_alone_and_accessible(page: Page) -> None:
    for tag, attributes in page.attributes:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/png"), (tag, value)
    assert "script" not in {tag for tag, _ in page.attributes}
    assert "@import" not in page.html
    assert "url(" not in page.html
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in page.all("svg"))
    assert all("scope" in cell for cell in page.all("th"))
    assert len(page.all("h1")) == 1
    assert "prefers-color-scheme: dark" in page.html
    assert "width=device-width" in page.html


@pytest.fixture(scope="module")
def digits() -> tuple[pd.DataFrame, str, np.ndarray]:
    frame, label, truth = demo_table("digits", seed=0)
    return frame.head(300), label, truth[:300]


def test_images(digits: Any, tmp_path: Path) -> None:
    frame, label, truth = digits
    page = page_of(frame, tmp_path, label=label, truth=truth)
    check_alone_and_accessible(page)
    images = page.all("img")
    assert 40 <= len(images) <= 56
    assert re.fullmatch(r"Row \d+, labelled \d", images[0]["alt"] or "")
    for words in ("Top suspects", "Which labels are confused", "Compared with the truth"):
        assert words in page.text
    assert len(page.html) < 300_000


def test_table_rows_say_what_stands_out(
    flowers: pd.DataFrame, flowers_csv: Path, tmp_path: Path
) -> None:
    flowers["wild"] = flowers["petals"] < 15
    flowers["day"] = "2024-05-01"
    flowers.loc[::2, "day"] = "2024-06-01"
    flowers.to_csv(flowers_csv, index=False)
    page = page_of(flowers_csv, tmp_path, label="kind")
    check_alone_and_accessible(page)
    assert "Label check of flowers.csv" in page.text
    assert "usual for tulip is" in page.text
    assert "color is red, as in 9" in page.text
    assert "wild is False, as in 100% of rose" in page.text
    assert f"woodbury clean {flowers_csv} --label kind --trusted checked.txt" in page.text
    assert "Compared with the truth" not in page.text


def test_text_rows_show_the_text(tmp_path: Path) -> None:
    topics = {"sport": ["ball", "goal", "team", "match"], "food": ["oven", "salt", "cake", "egg"]}
    generator = np.random.default_rng(0)
    kinds = ["sport", "food"] * 60
    table = pd.DataFrame(
        {"said": [" ".join(generator.choice(topics[k], 6)) for k in kinds], "kind": kinds}
    )
    table.loc[7, "kind"] = "sport"
    page = page_of(table, tmp_path, label="kind")
    assert table.loc[7, "said"] in page.text


def test_regression(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": np.arange(80) / 7, "y": np.arange(80) * 1.5})
    table.loc[33, "y"] = 500.0
    page = page_of(table, tmp_path, label="y")
    check_alone_and_accessible(page)
    assert "Values in the table against suggested values" in page.text
    assert "Which labels are confused" not in page.text


def test_no_suspects(flowers: pd.DataFrame, tmp_path: Path) -> None:
    page = page_of(flowers.drop(index=4), tmp_path, label="kind")
    check_alone_and_accessible(page)
    assert "looks wrong" in page.text
    assert "Top suspects" not in page.text
    assert page.all("ol")


def test_doubtful_rows_are_shown_where_suspects_are_few(
    flowers: pd.DataFrame, tmp_path: Path, stub_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stub_engine.run

    def scaled(*arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        result.error_probability = 0.1 + result.error_probability * share
        result.suggested[result.error_probability < 0.5] = arguments[1][
            result.error_probability < 0.5
        ]
        return result

    monkeypatch.setattr(stub_engine, "run", scaled)
    share = 0.3
    page = page_of(flowers, tmp_path, label="kind")
    assert "The most doubtful rows" in page.text
    assert "None of them is a suspect" in page.text
    assert len(re.findall(r'data-name="Row"', page.html)) == 10
    pairs = re.findall(r'swap kept">(\w+)<.*?swap suggested">(\w+)<', page.html, re.S)
    assert len(pairs) == 10
    assert all(given != other for given, other in pairs)
    share = 0.7
    page = page_of(flowers, tmp_path, label="kind")
    assert page.html.count("swap given") == 1
    assert "The suspect, then the most doubtful of the other rows." in page.text


def test_what_users_write_is_escaped(flowers: pd.DataFrame, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    flowers = flowers.rename(columns={"kind": evil, "size": evil + "2"})
    flowers[evil] = flowers[evil].map({"rose": evil, "tulip": "<b>"})
    page = page_of(flowers, tmp_path, label=evil)
    check_alone_and_accessible(page)
    assert evil in page.text


def test_empty_column_notes_are_shown(flowers: pd.DataFrame, tmp_path: Path) -> None:
    page = page_of(flowers.assign(nothing=None), tmp_path, label="kind")
    assert "Column 'nothing' is empty in every row" in page.text


def test_thumbnail_is_the_image() -> None:
    image = np.array([[0.0, 0.5], [1.0, 2.0]])
    data = base64.b64decode(thumbnail(image, 0.0, 1.0).split(",")[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    start = data.index(b"IDAT") + 4
    size = struct.unpack(">I", data[start - 8 : start - 4])[0]
    assert zlib.decompress(data[start : start + size]) == bytes([0, 0, 128, 0, 255, 255])
    color = base64.b64decode(thumbnail(np.zeros((2, 3, 3)), 0, 1).split(",")[1])
    assert struct.unpack(">IIBB", color[16:26]) == (3, 2, 8, 2)


def test_matrix_counts_and_limits() -> None:
    table = matrix(np.array(["a", "a", "b"]), np.array(["b", "b", "c"]), ["a", "b", "c", "d"])
    assert table is not None
    assert table["classes"] == ["a", "b", "c"]
    assert [[cell["count"] for cell in cells] for _, cells in table["rows"]] == [
        [0, 2, 0],
        [0, 0, 1],
        [0, 0, 0],
    ]
    assert matrix(np.array([]), np.array([]), ["a", "b"]) is None
    many = np.arange(40)
    big = matrix(many, (many + 1) % 40, list(range(40)))
    assert big is not None
    assert (len(big["classes"]), big["left_out"]) == (15, 25)


def test_charts_count_every_row() -> None:
    chart = histogram(np.array([0.05, 0.06, 0.95, 2.0]), 0, 1, title="t", label="l", mark_from=0.5)
    assert "0 to 0.1: 2, 0.9 to 1: 2" in chart
    assert chart.count("bar suspect") == 1
    dots = scatter(np.arange(5000.0), np.arange(5000.0) + 1, np.arange(5000) == 7)
    assert dots.count("<circle") <= 1252
    assert dots.count("dot suspect") == 1


def test_certificates_of_any_depth() -> None:
    groups = certificate_groups(
        {
            "a_b": 1e-9,
            "c": {"d": True, "e": [1.0, 2]},
            "f": None,
            "solve_status": "ALL_GOOD",
            "size": 12345,
            "method": "exact Cholesky",
            "held_out_score_by_model": {"linear": 0.5, "kernel": 0.25},
            "noise": {"labels_kept_by_class": [0.9, 0.8]},
        }
    )
    assert [[(line["name"], line["value"]) for line in lines] for lines in groups.values()] == [
        [
            ("method", "exact Cholesky"),
            ("size", "12,345"),
            ("solve", "all good"),
            ("a b", "1e-09"),
            ("c: d", "yes"),
            ("c: e", "1, 2"),
            ("f", "–"),
        ],
        [("held-out loss", "linear 0.5, kernel 0.25")],
    ]
    assert "exact up to rounding" in next(iter(groups.values()))[0]["meaning"]
    assert certificate_groups({}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (390, 1600)])
def test_in_a_real_browser(digits: Any, tmp_path: Path, width: int, height: int) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(names)})")
    frame, label, truth = digits
    woodbury.clean(frame, label=label, truth=truth).report(tmp_path / "report.html")
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    # A page that may not connect anywhere, and says how wide its content turned out to be.
    page = tmp_path / "report.html"
    html = (
        page.read_text(encoding="utf-8")
        .replace(
            "</body>",
            "<script>document.title = 'wide ' + document.documentElement.scrollWidth + ' images ' +"
            "[...document.images].filter(i => i.naturalWidth > 0).length</script></body>",
        )
        .replace('loading="lazy"', "")
    )
    page.write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *quiet.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},{height}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>wide (\d+) images (\d+)</title>", done.stdout)
    assert found, done.stdout[:500]
    assert int(found[1]) <= max(width, 500)  # headless Chromium is at least 500 pixels wide
    assert int(found[2]) >= 40
