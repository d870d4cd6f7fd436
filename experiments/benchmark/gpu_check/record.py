"""What a check has found so far: `gpu_check.json`, and the same for people in `gpu_check.md`; whole at every moment."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from detector.files import without_nan, write_json, write_whole

JSON: Final = "gpu_check.json"
MARKDOWN: Final = "gpu_check.md"
IN_NAME: Final = ("network", "kind", "images", "precision", "compiled", "took_s")
"""What a timed case also says in its name, or nobody reads."""
Values = dict[str, Any]


class Record:
    """The results in a folder, read when made; each change writes both files anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / JSON
        self.document: Values = json.loads(path.read_text()) if path.is_file() else {"parts": {}}

    def part(self, name: str) -> Values:
        """Return what is known of a part."""
        found: Values = self.document["parts"].get(name, {})
        return found

    def update(self, name: str, **values: Any) -> None:
        """Add to what is known of a part, and write."""
        self.document["parts"][name] = self.part(name) | values
        self.write()

    def write(self) -> None:
        """Write both files."""
        self.document = without_nan(self.document)
        write_json(self.folder / JSON, self.document)
        write_whole(self.folder / MARKDOWN, ("\n".join(_markdown(self.document)) + "\n").encode())


def _markdown(document: Values) -> Iterator[str]:
    """Yield lines: the head, the verdicts, and each part's values and tables."""
    yield "# GPU check"
    for key, value in document.items():
        if key not in ("parts", "verdicts"):
            yield from ("", f"{key}: {_text(value)}")
    yield from ("", *_table([{"part": name, **_head(part)} for name, part in document["parts"].items()]))
    if document.get("verdicts"):
        yield from ("", *_table(document["verdicts"]))
    for name, part in document["parts"].items():
        found = {key: value for key, value in part.items() if key not in _head(part)}
        if found:
            yield from ("", f"## {name}", "")
        tables = {key: value for key, value in found.items() if _is_table(value)}
        yield from (f"- {key}: {_text(value)}" for key, value in found.items() if key not in tables)
        for key, rows in tables.items():
            yield from ("", f"{key}:", "", *_table(rows))


def _head(part: Values) -> Values:
    return {key: part.get(key, "") for key in ("status", "seconds", "why")}


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table with the columns of all rows in which anything stands."""
    names = dict.fromkeys(name for row in rows for name in row if name not in IN_NAME)
    columns = [name for name in names if any(row.get(name) for row in rows)]
    yield from (f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}")
    yield from (f"| {' | '.join(_text(row.get(name)) for name in columns)} |" for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
