"""The command as a process of its own: how it starts, and that it needs no more than it must."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import woodbury

RUN = "from woodbury.cli import main; main()"


def process(code: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    folder = str(Path(woodbury.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": folder, "COLUMNS": "100"},
        timeout=120,
    )


def test_version() -> None:
    done = process(RUN, "--version")
    assert (done.returncode, done.stdout) == (0, f"woodbury {woodbury.__version__}\n")


@pytest.mark.parametrize(
    "words", [["--help"], ["attribute", "--help"], ["clean", "--help"], ["spectrum", "--help"]]
)
def test_help(words: list[str]) -> None:
    done = process(RUN, *words)
    assert done.returncode == 0
    assert (words[0] if len(words) > 1 else "clean") in done.stdout
    assert "Usage" in done.stdout


def test_starting_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pandas", "sklearn", "pyarrow", "matplotlib", "scipy")
    code = (
        "import sys; sys.argv = ['woodbury', '--version']\n"
        "from woodbury.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert process(code).stdout.splitlines()[-1] == "[]"


def test_without_the_extra() -> None:
    block = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in absent: raise ModuleNotFoundError(name, name=name)\n"
        "absent = ('typer', 'pyarrow')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name in absent else find(name)\n"
    )
    done = process(block + RUN, "clean", "--demo", "digits")
    assert done.returncode == 2
    assert done.stderr == (
        "The command woodbury needs typer, pyarrow, not installed here. "
        'Install it with: pip install "woodbury[app]"\n'
    )
    done = process(block + "import woodbury\nwoodbury.clean")
    assert "woodbury.clean needs the package 'pyarrow'" in done.stderr
    assert 'pip install "woodbury[app]"' in done.stderr


def test_a_mistake_in_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,kind\n1,x\n")
    done = process(RUN, "clean", "t.csv", "--label", "sort", cwd=tmp_path)
    assert done.returncode == 2
    assert "t.csv has no column 'sort'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
