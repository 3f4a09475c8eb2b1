"""The benchmark of planted facts at small size."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "attribute_lm.py"


def test_planted_facts(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("attribute_lm", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(["--small"])
    assert set(found) == {"ekfac", "identity", "tfidf"}
    assert found["ekfac"] > found["identity"]  # 40 steps teach little, and it shows already
    assert "TF-IDF" in capsys.readouterr().out
