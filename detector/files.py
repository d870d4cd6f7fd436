"""Files that are whole, whatever happens while they are written."""

import contextlib
import json
import math
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from detector.errors import InputError


def check_checkpoint(path: str | Path) -> None:
    """Raise InputError unless there is a file; it names checkpoints that are beside it."""
    if not Path(path).is_file():
        others = ", ".join(sorted(other.name for other in Path(path).parent.glob("*.ckpt")))
        raise InputError(f"{path}: no such checkpoint file" + (f"; there is {others}" if others else ""))


def damage_of(path: Path) -> str:
    """Return what is not as it was written in a file of PyTorch's, by the checksums in it; empty where it is whole.

    A file without checksums, which is no zip archive, is taken for whole.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return ""
        size = file.seek(0, os.SEEK_END)
        try:
            with zipfile.ZipFile(file) as archive:
                # Stored as they are, as PyTorch does it, records take no more time than the file has bytes.
                records = archive.infolist()
                if sum(record.file_size for record in records) > size or any(one.compress_type for one in records):
                    return "its records are not as PyTorch writes them"
                record = archive.testzip()
        except zipfile.BadZipFile:
            return "it was cut short, or its end has changed"
        except Exception as error:  # whatever zipfile makes of it
            return f"it cannot be read ({type(error).__name__})"
    return f"its record {record} has changed" if record else ""


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


def keep_former(path: Path, former: Path) -> None:
    """Let a file have a second name, which it keeps when another one takes its place; it is there all the time."""
    draft = former.with_name(f"{former.name[:40]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            os.link(path, draft)
        except OSError:  # a file system without links
            shutil.copyfile(path, draft)
        os.replace(draft, former)
    finally:
        draft.unlink(missing_ok=True)


def check_space(folder: Path, size: int, of: str) -> None:
    """Raise InputError unless a folder, which need not exist yet, has room for so many bytes; `of` is for the line."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise InputError(f"{of}: needs {size / 1e6:,.0f} MB, and {there} has {free / 1e6:,.0f} MB free; make room")


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
