"""Files that are whole, whatever happens while they are written."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from detector.errors import InputError


def check_checkpoint(path: str | Path) -> None:
    """Raise InputError unless there is a file; it names checkpoints that are beside it."""
    if not Path(path).is_file():
        others = ", ".join(sorted(other.name for other in Path(path).parent.glob("*.ckpt")))
        raise InputError(f"{path}: no such checkpoint file" + (f"; there is {others}" if others else ""))


def without_nan(value: Any) -> Any:
    """Return the same with None for nan and infinity, which JSON lacks, and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file so that it is either the old or the new one, never half of it."""
    write_whole(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the new one, never half of it; its folder is made.

    A link is replaced, not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a draft beside a file, which takes the file's place when it is complete; after an error it is removed.

    Several processes may write one file at once: the last one's stays.
    """
    draft = path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with draft.open("wb") as file:
            yield file
        os.replace(draft, path)
    except BaseException:  # also Ctrl-C; mostly a full disk
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
