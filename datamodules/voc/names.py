"""What split files call images -> the names of their annotations.

A name is the path of an annotation below Annotations/, without .xml. Tools write it into split files with the suffix of
the image, with folders before it, with backslashes, beside a class flag, or beside the path of the annotation. Whatever
leads to one annotation that is there is taken for its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from datamodules.text_files import decode_text, marked_encoding
from detector.errors import InputError

_XML: Final = (".xml", ".XML", ".Xml")
_SUFFIX = re.compile(r"\.(jpe?g|jfif|png|bmp|webp|tiff?|gif|avif|xml)$", re.IGNORECASE)
_CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")


class SplitLine(NamedTuple):
    """A line of a split file.

    Args:
        number: counted from 1.
        text: without outer blanks.
        name: of the annotation that it means, whether that is there or not.
        flagged: whether it ends with a class flag: 1, -1 or 0.
    """

    number: int
    text: str
    name: str
    flagged: bool


def annotation_path(folder: Path, name: str) -> Path:
    """Return the annotation of an image: Annotations/<name>.xml, or .XML where only that is there."""
    start = f"{folder}/Annotations/{name}"
    there = (start + suffix for suffix in _XML if os.path.isfile(start + suffix))
    return Path(next(there, start + _XML[0]))


def annotated_names(folder: Path) -> list[str]:
    """Return the names of all annotations of a dataset folder, sorted, with their folders below Annotations/."""
    annotations = folder / "Annotations"
    paths = (path for path in annotations.rglob("*") if path.suffix in _XML and not path.name.startswith("."))
    return sorted({path.relative_to(annotations).with_suffix("").as_posix() for path in paths})


def read_split_lines(path: Path) -> list[SplitLine]:
    """Read the lines of ImageSets/Main/<split>.txt that are not blank.

    The file is read by its byte order mark, else as UTF-8. Where that is impossible, or names something that is not
    there, it is read as GBK if every line then names an annotation: much of GBK is UTF-8 by chance.

    Raises:
        InputError: It cannot be read as text.
    """
    names = _Names(path.parent.parent.parent)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a text file of image names ({error.strerror})") from error
    text: str | InputError
    try:
        text = decode_text(data, path, "a text file of image names")
    except InputError as error:
        text = error
    lines = names.lines(text) if isinstance(text, str) else []
    if not data.isascii() and marked_encoding(data) is None and not names.are_there(lines):
        in_gbk = names.lines(data.decode("gb18030", "replace"))
        if names.are_there(in_gbk):
            return in_gbk
    if isinstance(text, InputError):
        raise text
    return lines


class _Names:
    """The annotations of a dataset folder, asked for by what split files call them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_last_part: dict[str, list[str]] | None = None

    def lines(self, text: str) -> list[SplitLine]:
        stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
        return [self._line(number, line) for number, line in stripped if line]

    def are_there(self, lines: Sequence[SplitLine]) -> bool:
        """Return whether there are lines, and all of them name annotations."""
        return bool(lines) and all(self._there(line.name) for line in lines)

    def _line(self, number: int, text: str) -> SplitLine:
        flag = _CLASS_FLAG.search(text)
        if flag is not None and self._there(text):
            flag = None
        bare = text if flag is None else text[: flag.start()]
        candidates = [bare, *_candidates(bare)]
        name = next(filter(self._there, candidates), None) or self._below(candidates) or candidates[-1]
        return SplitLine(number, text, name, flag is not None)

    def _there(self, name: str) -> bool:
        """Return whether it is a name, and not another way to an annotation."""
        start = f"{self.folder}/Annotations/{name}"
        return not {"", ".", ".."} & set(name.split("/")) and any(os.path.isfile(start + suffix) for suffix in _XML)

    def _below(self, candidates: Sequence[str]) -> str | None:
        """Return the only annotation in some folder below Annotations/ that has such a name."""
        if self._by_last_part is None:
            self._by_last_part = {}
            for name in annotated_names(self.folder):
                self._by_last_part.setdefault(name.rsplit("/", 1)[-1], []).append(name)
        for candidate in candidates:
            found = self._by_last_part.get(candidate.rsplit("/", 1)[-1], [])
            matching = [name for name in found if name.endswith(f"/{candidate}")]
            if len(matching) == 1:
                return matching[0]
        return None


def _candidates(text: str) -> Iterator[str]:
    """Return what a name with a suffix, folders or a second column may mean, the longest first; none if it is plain."""
    last = text.split()[-1]
    texts = [text, last] if last != text and last.lower().endswith(".xml") else [text]
    for one in texts:
        parts = [part for part in one.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        whole = _SUFFIX.sub("", "/".join(parts))
        if whole == text:  # folders alone are kept where nothing is found without them
            yield from (whole.split("/", index)[-1] for index in range(1, len(parts)))
            yield whole
        else:
            yield from (whole.split("/", index)[-1] for index in range(len(parts)))
