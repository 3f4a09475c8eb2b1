"""Every public name is documented, has a runnable example, and is imported only when used."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import woodbury

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(
    f"woodbury.{module.name}"
    for module in pkgutil.iter_modules(woodbury.__path__)
    if not module.name.startswith("_") and module.name not in ("apps", "cli")
)
ROOMS += [
    f"woodbury.apps.{module.name}"
    for module in pkgutil.iter_modules([f"{woodbury.__path__[0]}/apps"])
    if module.ispkg and module.name != "tables"  # what the jobs share is not public
]


def public_names() -> list[str]:
    """Return ``room.name`` for every name that a room lists in ``__all__``."""
    return [
        f"{room}.{name}"
        for room in ROOMS
        for name in getattr(importlib.import_module(room), "__all__", ())
    ]


def documented_names() -> set[str]:
    directive = re.compile(r"^::: (\S+)$", re.M)
    pages = ROOT.glob("docs/api/*.md")
    return {name for page in pages for name in directive.findall(page.read_text())}


def find(path: str) -> object:
    room, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(room), name)


def has_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # the room is one file
        return False


def needs_example(value: object) -> bool:
    # An exception is met, not called; a constant or an alias of a type has nothing to call.
    if inspect.isclass(value):
        return not issubclass(value, BaseException)
    return inspect.isfunction(value)


@pytest.mark.parametrize("path", public_names())
def test_public_name_is_documented(path: str) -> None:
    name = path.rsplit(".", 1)[1]
    # Where a module has the name of its function, the shorter path would document the module.
    target = path if not has_module(path) else f"{path}.{name}"
    assert target in documented_names(), f"add '::: {target}' to a page of docs/api"


@pytest.mark.parametrize("path", public_names())
def test_public_name_has_a_docstring_with_an_example(path: str) -> None:
    value = find(path)
    if not needs_example(value):
        return
    docstring = inspect.getdoc(value) or ""
    assert docstring, f"{path} has no docstring"
    assert ">>>" in docstring, f"the docstring of {path} has no runnable example"


def test_every_recipe_is_in_the_table_of_methods() -> None:
    table = (ROOT / "docs" / "methods.md").read_text()
    for name in woodbury.solvers.__all__:
        value = getattr(woodbury.solvers, name)
        if inspect.isclass(value) and issubclass(value, woodbury.solvers.Recipe):
            assert value is woodbury.solvers.Recipe or f"`{name}" in table, name


def test_docs_name_only_what_exists() -> None:
    for path in documented_names():
        find(path)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_every_top_level_name_is_listed_once_and_found() -> None:
    assert len(set(woodbury.__all__)) == len(woodbury.__all__)
    assert set(woodbury._HOME) <= set(woodbury.__all__)
    for name in woodbury.__all__:
        assert getattr(woodbury, name) is not None
        assert name in dir(woodbury)


def test_every_top_level_name_is_public_in_its_room() -> None:
    for name, room in woodbury._HOME.items():
        assert name in importlib.import_module(f"woodbury.{room}").__all__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Choleski'"):
        woodbury.Choleski  # noqa: B018


def imported_after(code: str) -> set[str]:
    """Return the top-level packages in memory after ``code`` has run in a new process."""
    program = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_alone_loads_nothing_heavy() -> None:
    assert not {"torch", "scipy", "pandas", "sklearn"} & imported_after("import woodbury")


def test_library_does_not_load_what_only_the_command_needs() -> None:
    tasks = "from woodbury import solve, Hessian, Sparse, Kernel, hypergradient, leave_one_out"
    app = {"pandas", "pyarrow", "sklearn", "matplotlib", "typer", "rich", "jinja2"}
    assert not app & imported_after(tasks)
