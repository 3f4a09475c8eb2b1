from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from tests.apps import stub


@pytest.fixture
def stub_engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return stub.install(monkeypatch)


@pytest.fixture
def flowers() -> pd.DataFrame:
    """Two clouds of 30 rows, a category that helps, and one wrong label in row 4."""
    generator = np.random.default_rng(0)
    kind = np.array(["rose", "tulip"] * 30)
    size = np.where(kind == "rose", 1.0, 5.0) + 0.3 * generator.normal(size=60)
    frame = pd.DataFrame(
        {
            "size": size.round(4),
            "petals": np.where(kind == "rose", 20, 6) + generator.integers(0, 3, 60),
            "color": np.where(kind == "rose", "red", "yellow"),
            "kind": kind,
        }
    )
    frame.loc[7, "color"] = "white"
    frame.loc[8, "color"] = "white"
    frame.loc[9, "color"] = "white"
    frame.loc[4, "kind"] = "tulip"
    return frame


@pytest.fixture
def flowers_csv(flowers: pd.DataFrame, tmp_path: Path) -> Path:
    path = tmp_path / "flowers.csv"
    flowers.to_csv(path, index=False)
    return path
