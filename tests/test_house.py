"""The house: one direction between packages, no circle between modules, rooms and files of a size one can overlook.

An import counts wherever it stands: at the top of a module, within a function, or for the type checker alone.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_changes import CHANGES, Change

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("detector", "datamodules", "experiments")
FILES = {path: path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = FILES[path].with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Modules of the three packages that a file imports; `from package import module` imports the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in MODULES:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else node.module
        else:
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: relative import"


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, in order, or none."""
    done: set[str] = set()

    def search(name: str, above: list[str]) -> list[str]:
        if name in above:
            return above[above.index(name) :]
        for other in sorted(graph[name] - done):
            if found := search(other, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert len(IMPORTS) > 100 and "detector.rpn" in IMPORTS["detector.faster_rcnn"]
    assert circle_in(IMPORTS) == []


def test_packages_are_imported_in_one_direction() -> None:
    allowed = {package: set(PACKAGES[: index + 1]) for index, package in enumerate(PACKAGES)}
    wrong = [
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if other.split(".")[0] not in allowed[name.split(".")[0]]
    ]
    assert wrong == []


@pytest.mark.parametrize(("package", "most"), [("detector", 24), ("datamodules", 22), ("experiments", 14)])
def test_rooms_at_the_top_are_few(package: str, most: int) -> None:
    entries = [
        path.name
        for path in (ROOT / package).iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))
    ]
    assert len(entries) <= most, sorted(entries)


def test_every_folder_with_code_is_a_package() -> None:
    """Folders without `__init__.py` would be left out when the project is installed."""
    assert [str(path) for path in FILES.values() if not (ROOT / path.parent / "__init__.py").is_file()] == []


def test_files_and_functions_are_short() -> None:
    files = {str(FILES[path]): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in files.items() if lines > 400} == {}
    functions = {
        f"{FILES[path]}:{node.name}": 1 + (node.end_lineno or 0) - node.lineno
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}


def test_docstrings_are_plain_sentences() -> None:
    """Functions say what they do ("Return ...", "Write ..."): no noun, no "Returns", nothing that hangs in the air."""
    no_verbs = """A All An Another As At Because Beside Both By Each Equal Every First For From Here How If In It Its
        Last Like Mean Most No Not None Of On One Only Or Other Our Same Second Share So Some Such Than That The Their
        There These They This To True Two Under Until Up What When Where Whether Which While Why With Without"""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            is_function = isinstance(node, ast.FunctionDef)
            if is_function or isinstance(node, ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or "Return nothing."
                first = text.split()[0].rstrip(",;:")
                is_verb = re.fullmatch(r"[A-Z][a-z]*([^s]|ss)", first) and first not in no_verbs.split()
                if text.startswith(("As `", "Of those", "What gets")) or (is_function and not is_verb):
                    wrong.append(f"{FILES[path]}:{getattr(node, 'name', '')}: {text.splitlines()[0]}")
    assert wrong == []


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change.file}: {change.old.strip()}")
def test_each_small_change_fits_the_code_and_the_tests_that_are_to_notice_it(change: Change) -> None:
    assert (ROOT / change.file).read_text().count(change.old) == 1
    assert [test for test in change.tests if not (ROOT / test).is_file()] == []
