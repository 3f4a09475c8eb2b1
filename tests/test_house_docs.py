"""Everything README and docs show is run: Python blocks, sessions with their output, commands.

The blocks of one file share one namespace, in order, as a reader would type them.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/**/*.md"),
    ]
)
SHOWN = {"text", "csv", "json", "toml"}  # data and output: nothing to run
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=indent)``` *$", re.M | re.S
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page; ``line`` is the line of the opening fence."""
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(
            line.removeprefix(indent) for line in match["code"].splitlines(keepends=True)
        )
        found.append(Block(match["language"], code, text.count("\n", 0, match.start()) + 1))
    return found


def run_python(block: Block, page: Path, namespace: dict) -> None:
    # Blank lines in front make the line numbers of a traceback those of the page.
    exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


def run_session(block: Block, page: Path, namespace: dict) -> None:
    """Run a ``>>>`` session and compare what it prints."""
    session = doctest.DocTestParser().get_doctest(
        block.code, namespace, page.name, str(page), block.line
    )
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    runner.run(session, out=report.append, clear_globs=False)
    namespace.update(session.globs)
    if runner.failures:
        pytest.fail("".join(report))


@lru_cache
def help_of(command: str) -> str:
    """Return the help text of ``woodbury`` or of one of its commands."""
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    script = Path(sys.executable).with_name("woodbury")
    arguments = [str(script), *command.split(), "--help"]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_command(line: str) -> None:
    """Check that a shell line names a command, and options of it, that exist."""
    words = line.removeprefix(".venv/bin/").split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
    elif words[0] == "woodbury":
        assert words[1] in help_of(""), line
        for option in re.findall(r"--[a-z][a-z-]*", line):
            assert re.search(rf"{option}\b", help_of(words[1])), f"{option} in: {line}"
    else:
        assert words[0] in {"pip", "git", "cd", "python", "source"}, f"cannot check: {line}"


def run_shell(block: Block, page: Path, namespace: dict) -> None:
    for line in block.code.replace("\\\n", " ").splitlines():
        command = line.split(" #")[0].strip()
        if command:
            check_command(command)


RUNNERS = {"python": run_python, "pycon": run_session, "bash": run_shell}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_does_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in SHOWN:
            assert block.language in RUNNERS, f"{page}:{block.line}: what is {block.language!r}?"
            RUNNERS[block.language](block, page, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_a_page_refers_to_exist(page: Path) -> None:
    for path in re.findall(r"`((?:tests|benchmarks|examples|docs|src)/[\w./]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page}: {path} does not exist"


def test_blocks_are_found_with_their_lines() -> None:
    text = (
        'a\n```python title="x"\nb = 1\n```\n\n1. item\n\n    ```pycon\n    >>> b\n    1\n    ```\n'
    )
    assert blocks(text) == [
        Block("python", "b = 1\n", 2),
        Block("pycon", ">>> b\n1\n", 8),
    ]


def test_wrong_output_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="Expected"):
        run_session(Block("pycon", ">>> 1 + 1\n3\n", 1), ROOT / "README.md", {})


def test_wrong_commands_fail() -> None:
    with pytest.raises(AssertionError):
        check_command("make nonsense")
    with pytest.raises(AssertionError):
        check_command("rm -rf data")
