"""What is private in Lightning is touched in one file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning

ROOT = Path(__file__).resolve().parents[3]
ALLOWED = "detector/training/lightning_private.py"
THEIRS = {
    name
    for path in Path(pytorch_lightning.__file__).parent.rglob("*.py")
    for name in re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", path.read_text())
}
OF_TORCH = {"scheduler._last_lr", "tensor._version"}


def private_in(source: str) -> Iterator[str]:
    """What a file imports from Lightning or reads of other objects that has the name of a private part of Lightning."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytorch_lightning"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr in THEIRS:
            owner = ast.unparse(node.value)
            if (owner not in ("self", "cls", "super()") or node.attr == "_trainer") and ast.unparse(
                node
            ) not in OF_TORCH:
                yield ast.unparse(node)


def test_what_is_private_is_found() -> None:
    source = "from pytorch_lightning.loops.loop import _Loop\nif self._trainer: trainer._results.reset()\nself._own = 1"
    assert sorted(private_in(source)) == ["_Loop", "self._trainer", "trainer._results"]
    assert {"_results", "_signal_connector", "_restarting", "_batches_that_stepped"} <= THEIRS


def test_private_parts_of_lightning_are_touched_in_one_file() -> None:
    files = [
        path for name in ("detector", "datamodules", "experiments") for path in sorted((ROOT / name).rglob("*.py"))
    ]
    found = {str(path.relative_to(ROOT)): list(private_in(path.read_text())) for path in files}
    assert found.pop(ALLOWED)
    assert {name: parts for name, parts in found.items() if parts} == {}
