"""What split files call images -> the names of their annotations.

A name is the path of an annotation below Annotations/ or annotations/, or where there is no such folder below that of
the dataset, without .xml and without a last folder that only says what it holds (train/a for train/annotations/a.xml).
Tools write it into split files with the suffix of the image, with folders before it, with backslashes, beside a class
flag, or beside the path of the annotation. Whatever leads to one annotation that is there is taken for its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from datamodules.text_files import decode_text, marked_encoding
from detector.errors import InputError

_XML: Final = (".xml", ".XML", ".Xml")
_FOLDERS: Final = ("annotations", "Annotations", "xmls")  # that names leave out
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


def annotations_folder(folder: Path) -> Path:
    """Return the folder that holds the annotations of a dataset folder, which may be that itself."""
    named = (folder / name for name in ("Annotations", "annotations"))
    return next((path for path in named if path.is_dir()), folder)


def annotation_path(folder: Path, name: str) -> Path:
    """Return the annotation of an image: Annotations/<name>.xml, or .XML where only that is there."""
    place = annotations_folder(folder)
    return Path(_annotation(place, name) or f"{place}/{name}{_XML[0]}")


def _annotation(place: Path, name: str) -> str | None:
    """Return the annotation of that name below the folder of annotations, if there is one."""
    starts = [f"{place}/{name}"]
    if place.name != "Annotations":
        above, slash, last = name.rpartition("/")
        starts += [f"{place}/{above}{slash}{between}/{last}" for between in _FOLDERS]
    return next(filter(os.path.isfile, (start + suffix for start in starts for suffix in _XML)), None)


def annotated_names(folder: Path) -> list[str]:
    """Return the names of all annotations of a dataset folder, sorted."""
    return _names_in(annotations_folder(folder))


def _names_in(place: Path) -> list[str]:
    return sorted(names_below(place, _XML, () if place.name == "Annotations" else _FOLDERS))


def names_below(place: Path, suffixes: Collection[str], left_out: Collection[str]) -> set[str]:
    """Return the paths of files below a folder, without suffix and without a last folder of those `left_out`."""
    names = set[str]()
    for path in place.rglob("*"):
        if path.suffix in suffixes:
            *parts, last = path.relative_to(place).with_suffix("").parts
            if parts and parts[-1] in left_out:
                parts.pop()
            if not any(part.startswith(".") for part in (*parts, last)):
                names.add("/".join((*parts, last)))
    return names


def read_split_lines(path: Path, most: int | None = None) -> list[SplitLine]:
    """Read the lines of ImageSets/Main/<split>.txt that are not blank, or only the first ones of them.

    The file is read by its byte order mark, else as UTF-8. Where that is impossible, or names something that is not
    there, it is read as GBK if every line then names an annotation: much of GBK is UTF-8 by chance.

    Raises:
        InputError: It cannot be read as text.
    """
    names = _Names(annotations_folder(path.parents[2]) if path.parts[-3:-2] == ("ImageSets",) else path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a text file of image names ({error.strerror})") from error
    text: str | InputError
    try:
        text = decode_text(data, path, "a text file of image names")
    except InputError as error:
        text = error
    lines = names.lines(text, most) if isinstance(text, str) else []
    if not data.isascii() and marked_encoding(data) is None and not names.are_there(lines):
        in_gbk = names.lines(data.decode("gb18030", "replace"), most)
        if names.are_there(in_gbk):
            return in_gbk
    if isinstance(text, InputError):
        raise text
    return lines


class _Names:
    """The annotations below a folder, asked for by what split files call them."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._by_last_part: dict[str, list[str]] | None = None

    def lines(self, text: str, most: int | None) -> list[SplitLine]:
        stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
        return [self._line(number, line) for number, line in islice((pair for pair in stripped if pair[1]), most)]

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
        return not {"", ".", ".."} & set(name.split("/")) and _annotation(self._place, name) is not None

    def _below(self, candidates: Sequence[str]) -> str | None:
        """Return the only annotation in some folder below Annotations/ that has such a name."""
        if self._by_last_part is None:
            self._by_last_part = {}
            for name in _names_in(self._place):
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
