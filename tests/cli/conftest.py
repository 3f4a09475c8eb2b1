from __future__ import annotations

from tests.apps.conftest import flowers, flowers_csv, stub_engine

__all__ = ["flowers", "flowers_csv", "stub_engine"]
