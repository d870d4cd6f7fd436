"""Files that are whole, whatever happens while they are written."""

import contextlib
import json
import math
import os
import shutil
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, Final

import yaml

from detector.errors import InputError, brief, shortened

WEIGHTS: Final = "model.safetensors"
PROGRAMS: Final = {"onnx": "model.onnx", "openvino": "model.xml", "torch_export": "model.pt2"}
"""By format, the files that `frcnn export` writes, beside WEIGHTS; ABOUT says what they are."""
ABOUT: Final = "detector.json"


def program_of(path: str | Path) -> Path | None:
    """Return the exported program that a path names, the file itself or the one in its folder; None for all others."""
    path = Path(path)
    if path.suffix in {Path(file).suffix for file in PROGRAMS.values()} and not path.is_dir():
        return path
    there = (path / file for file in PROGRAMS.values())
    return next((file for file in there if file.is_file()), None) if (path / ABOUT).is_file() else None


def weights_file(path: str | Path) -> Path:
    """Return the file of weights in a folder that `frcnn export --format safetensors` wrote; a file as it is."""
    inside = Path(path) / WEIGHTS
    return inside if inside.is_file() else Path(path)


def check_checkpoint(path: str | Path) -> None:
    """Raise InputError unless there is a file; it names checkpoints that are beside it."""
    if not weights_file(path).is_file():
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


def read_object(path: Path, kinds: Mapping[str, type | UnionType]) -> dict[str, Any] | str:
    """Return the object in a JSON file of results, or what is wrong with it.

    Args:
        path: The file, which need not be there.
        kinds: Of the values of some keys, each of which may also be null or not there; "val/" stands for all keys that
            begin so.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), parse_int=_finite, parse_float=_finite, parse_constant=_finite
        )
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except OverflowError as error:
        return f"holds {error}, which is no number here"
    except (ValueError, RecursionError):
        return "is no whole JSON document; was it cut short?"
    if not isinstance(content, dict):
        return f"holds a JSON {type(content).__name__}, not an object"
    for key, value in content.items():
        kind = kinds.get(key, kinds.get(key.partition("/")[0] + "/", object))
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not object)):
            return f"has {key} {shortened(json.dumps(value), 30)}, of another kind than there should be"
    return content


def _finite(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise OverflowError(shortened(text, 30))
    return number if any(c in text for c in ".eE") else int(text)


def read_metrics(path: Path) -> dict[str, Any] | str:
    """Return the final numbers of a run, or what is wrong with the file."""
    parts = dict.fromkeys(("val/", "test/", "train/"), int | float)
    counts = dict.fromkeys(("epoch", "step", "seed", "test_count"), int)
    others = {"test_history": list, "classes": list, "proposal_recall_by_size": dict}
    return read_object(path, {**parts, **counts, **others})


def read_cell(path: Path) -> dict[str, Any] | str:
    """Return the state of a grid's cell, or what is wrong with the file."""
    texts = dict.fromkeys(("name", "hash", "status", "error", "host", "cwd", "command"), str)
    numbers = {**dict.fromkeys(("seed", "attempts", "pid", "exit_code", "steps"), int), "seconds": int | float}
    return read_object(path, {**texts, **numbers, "axes": dict, "stages": list, "finished_stages": list})


def earlier_results(path: Path, read: Callable[[Path], dict[str, Any] | str]) -> dict[str, Any]:
    """Return what a file of results holds that is to be added to; one that is damaged is set aside, and said."""
    content = read(path)
    if isinstance(content, dict):
        return content
    if path.is_file():
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        print(f"warning: {path}: {content}; it is {aside.name} now, and a new one is begun", file=sys.stderr)
    return {}


def load_yaml(text: str, source: object = "", loader: Any = yaml.SafeLoader) -> Any:
    """Return the content of a YAML text, without code.

    Raises:
        InputError: Beginning with `source`, if given: it is no YAML, nested too deep, or too large with its aliases.
    """
    try:
        check_growth(text)
        return yaml.load(text, loader)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: a date such as 2001-99-99
        said = shortened(brief(error), 300)
        raise InputError(f"{source}: is no YAML: {said}" if source else f"is no YAML: {said}") from error


FAST_YAML: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_growth(text: str, deepest: int = 100, most: int = 1_000_000, loader: Any = FAST_YAML) -> None:
    """Raise YAMLError for YAML that is nested deeper or, with its aliases written out, has more values."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str, int]] = []
    total = 0
    try:
        for event in yaml.parse(text, loader):
            if isinstance(event, yaml.AliasEvent):
                total += sizes.get(event.anchor or "", most + 1)  # what holds itself has no end
            elif isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor or "", total))
            elif isinstance(event, yaml.CollectionEndEvent):
                name, before = opened.pop()
                sizes[name] = total - before
            elif isinstance(event, yaml.ScalarEvent):
                total += 1
                sizes[event.anchor or ""] = 1
            if len(opened) > deepest or total > most:
                break
    except yaml.YAMLError:
        if loader is not yaml.SafeLoader:  # which takes what the fast one refuses, such as YAML 1.3
            check_growth(text, deepest, most, yaml.SafeLoader)
        return  # whoever loads it says so
    if len(opened) > deepest:
        raise yaml.YAMLError(f"nested deeper than {deepest}")
    if total > most:
        raise yaml.YAMLError("too large with all its aliases")


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
