"""What all tests share: one thread per process, a fixed seed, the data folder if there is one."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before the first import of numpy or torch

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# Shared machines are slow at times, and a failure must be seen again by whoever looks for it.
hypothesis.settings.register_profile("woodbury", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("woodbury")


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of public data sets, or skip the test where there is none."""
    folder = Path(os.environ.get("WOODBURY_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set WOODBURY_DATA")
    return folder


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a script of the folder of benchmarks with some arguments, and return what it prints.

    No peer is there, and threads that the script asks for are given back.
    """
    monkeypatch.setenv("WOODBURY_PEERS_PYTHON", "no-such-interpreter")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run(name: str, *arguments: str) -> str:
        threads = torch.get_num_threads()
        monkeypatch.setattr("sys.argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run
