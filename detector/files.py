"""Files that are whole, whatever happens while they are written."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file so that it is either the old or the new one, never half of it."""
    write_whole(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the new one, never half of it. A link is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name[:40]}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise
