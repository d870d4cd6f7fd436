"""What was read from the files of a dataset in VOC format, kept between runs.

One file per dataset folder, `<cache folder>/annotations/<digest of the folder's path>.json`. An annotation is kept
under the digest of the XML file's contents, which are read every time: parsing is what takes long. An image's header is
kept under the file's size and times. Whatever is not as it was written - damaged, cut, of another version of the
parser - is read anew, and the file is replaced in one step, so that several processes may use it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from datamodules import image_reading, text_files
from datamodules.image_reading import USUAL, ImageHeader, Reading, brief, read_header
from datamodules.parallel import map_files
from datamodules.voc import format as voc_format
from datamodules.voc.format import Annotation, VOCObject, parse_annotation, read_annotation_bytes
from datamodules.voc.names import annotation_path
from detector.errors import InputError

ENVIRONMENT_VARIABLE: Final = "FRCNN_CACHE_DIR"
OFF: Final = "none"

Row = list[Any]


def cache_folder(option: str | None = None) -> Path | None:
    """Where to keep what was read: `option`, else FRCNN_CACHE_DIR, else ~/.cache/frcnn (XDG_CACHE_HOME/frcnn); None for
    the word "none": nowhere."""
    place = option or os.environ.get(ENVIRONMENT_VARIABLE)
    if place == OFF:
        return None
    if place:
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "frcnn"


class AnnotationCache:
    """Annotations and image headers of one dataset folder. An object of this class reads an annotation once: what
    changes later is for the next one.

    Args:
        folder: holds Annotations/.
        cache_dir: from `cache_folder`; None keeps nothing.
        reading: images of more pixels than that allows have no usable header.
    """

    def __init__(self, folder: Path, cache_dir: Path | None, reading: Reading = USUAL) -> None:
        self.folder = folder
        self._reading = reading
        self._file = None
        if cache_dir is not None:
            self._file = cache_dir / "annotations" / f"{_digest(str(folder.resolve()).encode())}.json"
        self._rows: dict[str, Row] | None = None  # by XML name and by image path
        self._read: dict[str, Annotation] = {}

    def annotations(self, stems: Sequence[str]) -> dict[str, Annotation | InputError]:
        """By stem: the annotation Annotations/<stem>.xml, or why there is none."""
        rows, unknown = self._load(), []
        found: dict[str, Annotation | InputError] = {}
        for stem in dict.fromkeys(stems):
            if stem in self._read:
                found[stem] = self._read[stem]
                continue
            path = annotation_path(self.folder, stem)
            try:
                data = read_annotation_bytes(path)
            except InputError as error:
                found[stem] = error
                continue
            row = rows.get(f"{stem}.xml")
            if row is not None and row[0] == _digest(data):
                found[stem] = _annotation(row)
            else:
                found[stem] = InputError("")  # keeps the order
                unknown.append((stem, path))
        parsed = map_files(_parse, [path for _, path in unknown], "reading annotations")
        for (stem, _), (digest, annotation) in zip(unknown, parsed, strict=True):
            found[stem] = annotation
            if isinstance(annotation, Annotation):
                rows[f"{stem}.xml"] = [digest, *astuple(annotation)]
        if unknown:
            self._save()
        self._read |= {stem: item for stem, item in found.items() if isinstance(item, Annotation)}
        return found

    def headers(self, paths: Iterable[Path]) -> dict[Path, ImageHeader | InputError]:
        """By path: the header of the image, or why it cannot be read."""
        rows, unknown = self._load(), []
        found: dict[Path, ImageHeader | InputError] = {}
        for path in dict.fromkeys(paths):
            key, stamp = self._key(path), _stamp(path)
            row = rows.get(key)
            if row is not None and row[:3] == stamp:
                found[path] = ImageHeader(*row[3:])
            else:
                found[path] = InputError("")  # keeps the order
                unknown.append((path, key, stamp))
        read = map_files(_header, [path for path, _, _ in unknown], "reading image sizes")
        for (path, key, stamp), header in zip(unknown, read, strict=True):
            found[path] = header
            if isinstance(header, ImageHeader):
                rows[key] = [*stamp, *astuple(header)]
        if unknown:
            self._save()
        return {path: self._of_allowed_size(path, header) for path, header in found.items()}

    def _of_allowed_size(self, path: Path, header: ImageHeader | InputError) -> ImageHeader | InputError:
        """The limit is an option, so it is no part of what is kept."""
        try:
            if isinstance(header, ImageHeader):
                self._reading.check_size(path, header.width, header.height)
            return header
        except InputError as error:
            return error

    def _key(self, path: Path) -> str:
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path.absolute())

    def _load(self) -> dict[str, Row]:
        if self._rows is None:
            self._rows = _read_rows(self._file)
        return self._rows

    def _save(self) -> None:
        if self._file is None or not self._rows:
            return
        # What another process, working on another split, has written in the meantime is kept.
        self._rows = _read_rows(self._file) | self._rows
        text = json.dumps({"version": _version(), "rows": self._rows}, separators=(",", ":"), ensure_ascii=False)
        data = text.encode("utf-8", "surrogatepass")
        draft = self._file.with_name(f"{self._file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(_digest(data).encode() + b"\n" + data)
            os.replace(draft, self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            print(f"annotations are not kept for the next run: {self._file}: {brief(error)}", file=sys.stderr)
            self._file = None


class AnnotationStore:
    """The caches of several dataset folders.

    Args:
        option: see `cache_folder`.
        reading: how images are read.
    """

    def __init__(self, option: str | None = None, reading: Reading = USUAL) -> None:
        self._reading = reading
        self.cache_dir = cache_folder(option)
        self._caches: dict[Path, AnnotationCache] = {}

    def of(self, folder: Path) -> AnnotationCache:
        """The cache of a dataset folder."""
        return self._caches.setdefault(folder, AnnotationCache(folder, self.cache_dir, self._reading))

    def forget(self) -> None:
        """Free the memory."""
        self._caches = {}


def _parse(path: Path) -> tuple[str, Annotation | InputError]:
    try:
        data = read_annotation_bytes(path)
        return _digest(data), parse_annotation(data, path)
    except InputError as error:
        return "", error


def _header(path: Path) -> ImageHeader | InputError:
    try:
        return read_header(path)
    except InputError as error:
        return error


def _annotation(row: Row) -> Annotation:
    _, file_name, width, height, objects, depth, folder = row
    items = tuple(VOCObject(name, tuple(box), *flags) for name, box, *flags in objects)
    return Annotation(file_name, width, height, items, depth, folder)


def _stamp(path: Path) -> Row:
    """What changes when a file's contents do; the time of the last status change cannot be set back."""
    try:
        status = path.stat()
    except OSError:
        return [-1, -1, -1]
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_rows(file: Path | None) -> dict[str, Row]:
    """The rows of a cache file; none where it is missing or not as it was written."""
    try:
        digest, _, data = file.read_bytes().partition(b"\n") if file is not None else (b"", b"", b"")
        if digest != _digest(data).encode():
            return {}
        content = json.loads(data.decode("utf-8", "surrogatepass"))
        rows: dict[str, Row] = content["rows"] if content["version"] == _version() else {}
        return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


@cache
def _version() -> str:
    """Changes whenever the code does that reads the files."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (voc_format, text_files, image_reading)]
    return _digest(Path(__file__).read_bytes(), *sources)


def _digest(*parts: bytes) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
