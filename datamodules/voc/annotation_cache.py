"""Parsed annotations in VOC format, kept between runs beside the headers of their images.

An annotation is kept under the digest of the XML file's contents, which are read every time: parsing is what takes
long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import ClassVar

from datamodules import text_files
from datamodules.file_cache import FileCache, Row, digest_of
from datamodules.parallel import map_files
from datamodules.voc import format as voc_format
from datamodules.voc.format import Annotation, VOCObject, parse_annotation, read_annotation_bytes
from datamodules.voc.names import annotation_path
from detector.errors import InputError
from detector.use.reading import USUAL, Reading


class AnnotationCache(FileCache):
    """Annotations and image headers of one dataset folder, which holds Annotations/.

    An object of this class reads an annotation once: what changes later is for the next one.
    """

    kind: ClassVar[str] = "annotations"
    readers: ClassVar[tuple[str, ...]] = (
        *FileCache.readers,
        *(module.__file__ or "" for module in (voc_format, text_files)),
        __file__,
    )

    def __init__(self, folder: Path, cache_dir: Path | None, reading: Reading = USUAL) -> None:
        super().__init__(folder, cache_dir, reading)
        self._read: dict[str, Annotation] = {}
        self.paths: dict[str, Path] = {}  # by stem, of what was asked for

    def annotations(self, stems: Sequence[str]) -> dict[str, Annotation | InputError]:
        """Return by stem the annotation Annotations/<stem>.xml, or why there is none."""
        rows, unknown = self._load(), []
        found: dict[str, Annotation | InputError] = {}
        for stem in dict.fromkeys(stems):
            if stem in self._read:
                found[stem] = self._read[stem]
                continue
            path = self.paths[stem] = annotation_path(self.folder, stem)
            try:
                data = read_annotation_bytes(path)
            except InputError as error:
                found[stem] = error
                continue
            row = rows.get(f"{stem}.xml")
            if row is not None and row[0] == digest_of(data):
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


def _parse(path: Path) -> tuple[str, Annotation | InputError]:
    try:
        data = read_annotation_bytes(path)
        return digest_of(data), parse_annotation(data, path)
    except InputError as error:
        return "", error


def _annotation(row: Row) -> Annotation:
    _, file_name, width, height, objects, depth, folder = row
    items = tuple(VOCObject(name, tuple(box), *flags) for name, box, *flags in objects)
    return Annotation(file_name, width, height, items, depth, folder)
