"""What was read from the files of a dataset, kept between runs: the headers of its images, whatever its format.

One file per dataset folder, `<cache folder>/<kind>/<digest of the folder's path>.json`. An image's header is kept under
the file's size and times. Whatever is not as it was written - damaged, cut, of another version of the code that reads -
is read anew, and the file is replaced in one step, so that several processes may use it at once.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from datamodules.parallel import map_files
from detector.errors import InputError, brief
from detector.files import write_whole
from detector.use import reading
from detector.use.reading import USUAL, ImageHeader, Reading, read_header

ENVIRONMENT_VARIABLE: Final = "FRCNN_CACHE_DIR"
OFF: Final = "none"

Row = list[Any]
Item = TypeVar("Item")


def cache_folder(option: str | None = None) -> Path | None:
    """Return where to keep what was read: `option`, else FRCNN_CACHE_DIR, else ~/.cache/frcnn (XDG_CACHE_HOME/frcnn).

    None for the word "none": nowhere.
    """
    place = option or os.environ.get(ENVIRONMENT_VARIABLE)
    if place == OFF:
        return None
    if place:
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "frcnn"


class FileCache:
    """Image headers of one dataset folder, kept in `cache_dir` if there is one. Formats derive theirs.

    Images of more pixels than `reading` allows have no usable header.
    """

    kind: ClassVar[str] = "headers"  # folder of the files within that of the cache
    readers: ClassVar[tuple[str, ...]] = (reading.__file__, __file__)
    """Files with the code that reads: where one changes, what was kept is read anew."""

    def __init__(self, folder: Path, cache_dir: Path | None, reading: Reading = USUAL) -> None:
        self.folder = folder
        self._reading = reading
        self._file = None
        if cache_dir is not None:
            self._file = cache_dir / self.kind / f"{digest_of(str(folder.resolve()).encode())}.json"
        self._rows: dict[str, Row] | None = None  # by the name that a format gives them, and by image path

    def headers(self, paths: Iterable[Path]) -> dict[Path, ImageHeader | InputError]:
        """Return by path the header of the image, or why it cannot be read."""
        wanted = dict.fromkeys(paths)
        rows = self._of_images({path: (path, self._key(path)) for path in wanted}, _header, "reading image sizes")
        headers = {path: row if isinstance(row, InputError) else ImageHeader(*row) for path, row in rows.items()}
        return {path: self._of_allowed_size(path, header) for path, header in headers.items()}

    def _of_images(
        self,
        wanted: Mapping[Item, tuple[Path, str]],
        read: Callable[[Item], Row | InputError],
        what: str,
        parallel_from: int | None = None,
    ) -> dict[Item, Row | InputError]:
        """Return what `read` gives of each image, kept under the size and the times of its file.

        Args:
            wanted: For each item the image file, and under which key it is kept.
            read: Of an item, a row or why there is none.
            what: Heading of the progress bar.
            parallel_from: See `map_files`.
        """
        rows = self._load()
        stamps = {item: _stamp(path) for item, (path, _) in wanted.items()}
        kept = {item: rows.get(key, []) for item, (_, key) in wanted.items()}
        unknown = [item for item, row in kept.items() if row[:3] != stamps[item]]
        new = dict(zip(unknown, map_files(read, unknown, what, parallel_from), strict=True))
        rows |= {wanted[item][1]: [*stamps[item], *row] for item, row in new.items() if not isinstance(row, InputError)}
        if unknown:
            self._save()
        return {item: new[item] if item in new else row[3:] for item, row in kept.items()}

    def _of_allowed_size(self, path: Path, header: ImageHeader | InputError) -> ImageHeader | InputError:
        """Check the size anew: the limit is an option, so it is no part of what is kept."""
        try:
            if isinstance(header, ImageHeader):
                self._reading.check_size(path, header.width, header.height)
            return header
        except InputError as error:
            return error

    def _key(self, path: Path) -> str:
        inside = str(path).removeprefix(f"{self.folder}/")
        return inside if inside != str(path) else str(path.absolute())

    def _load(self) -> dict[str, Row]:
        if self._rows is None:
            self._rows = self._kept()
        return self._rows

    def _kept(self) -> dict[str, Row]:
        """Return the rows of the file; none where it is missing or not as it was written."""
        try:
            digest, _, data = self._file.read_bytes().partition(b"\n") if self._file is not None else (b"", b"", b"")
            if digest != digest_of(data).encode():
                return {}
            content = json.loads(data.decode("utf-8", "surrogatepass"))
            rows: dict[str, Row] = content["rows"] if content["version"] == _version(self.readers) else {}
            return rows
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def _save(self) -> None:
        if self._file is None or not self._rows:
            return
        # What another process, working on another split, has written in the meantime is kept.
        self._rows = self._kept() | self._rows
        content = {"version": _version(self.readers), "rows": self._rows}
        data = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        try:
            write_whole(self._file, digest_of(data).encode() + b"\n" + data)
        except OSError as error:
            print(f"{self.kind} are not kept for the next run: {self._file}: {brief(error)}", file=sys.stderr)
            self._file = None


def digest_of(*parts: bytes) -> str:
    """Return a digest of 128 bits, in hexadecimal digits."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _header(path: Path) -> Row | InputError:
    try:
        return list(astuple(read_header(path)))
    except InputError as error:
        return error


def _stamp(path: Path) -> Row:
    """Return what changes when a file's contents do; the time of the last status change cannot be set back."""
    try:
        status = path.stat()
    except OSError:
        return [-1, -1, -1]
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@cache
def _version(readers: tuple[str, ...]) -> str:
    """Return what changes whenever the code does that reads the files."""
    return digest_of(*(Path(file).read_bytes() for file in readers))
