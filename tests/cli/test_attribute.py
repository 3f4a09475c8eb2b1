"""``woodbury attribute`` as users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.apps.attribute.small_models import saved
from typer.testing import CliRunner

from woodbury.cli.app import app


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    rows = [{"text": text} for text in ("to be or not", "hello", "a man walks in")]
    for name, lines in (("train", rows), ("query", rows[:1])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    model = saved(tmp_path / "model", "causal")
    return [
        "attribute",
        *("--model", str(model)),
        *("--train", str(tmp_path / "train.jsonl")),
        *("--query", str(tmp_path / "query.jsonl")),
        *("--out", str(tmp_path / "out")),
    ]


def run(words: list[str]):
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def test_it_says_what_it_will_take_and_what_it_found(given, tmp_path):
    done = run(given)
    assert done.exit_code == 0, done.output
    assert "1 queries x 3 training rows" in done.output
    assert "3 passes over the gradients of" in done.output
    assert "speaks for it" in done.output
    assert str(tmp_path / "out" / "attribution.html") in done.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "attribution.html",
        "scores.parquet",
        "summary.json",
        "work",
    }


def test_help_says_what_happens_by_default():
    said = " ".join(run(["attribute", "--help"]).output.replace("│", " ").split())
    for default in (
        "what its config says",
        "a tenth of the mean eigenvalue, for each layer",
        "(all)",
        "what the model takes",
        "[default: ekfac]",
    ):
        assert default in said


def test_another_matrix_in_the_same_folder_is_refused_before_anything_is_fitted(given):
    assert run(given).exit_code == 0
    done = run([*given, "--matrix", "identity"])
    assert done.exit_code == 2
    assert "fitting" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "matrix was 'ekfac' and is 'identity'" in said
    assert "--out" in said
    assert run([*given, "--top", "1"]).exit_code == 0  # another report of the same scores


@pytest.mark.parametrize(
    ("word", "value", "said"),
    [
        ("--model", "nothing", "There is no folder nothing."),
        ("--train", "nothing.jsonl", "There is no file nothing.jsonl."),
        ("--matrix", "hessian", "--matrix must be one of"),
        ("--max-length", "1000", "the model takes 2 to 24 tokens"),
        ("--text", "body", "has no field 'body'"),
        ("--task", "speech", "--task must be one of"),
    ],
)
def test_mistakes_are_told_without_a_traceback(given, word, value, said):
    done = run([*given, word, value])
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
