"""PASCAL VOC files: one XML file <-> one `Annotation`, and a split file -> a list of image names.

VOC XML counts pixels from 1 and includes the last one; here a box is continuous `xyxy` in pixels, so that
`width = x2 - x1`. Reading subtracts 1 from xmin and ymin only and writing adds it back: a one-pixel box
(xmin == xmax) keeps its area of 1, and plain IoU equals the "+1" IoU of the VOC development kit.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree  # only builds and writes; what is read goes through defusedxml
from collections import Counter
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path
from typing import Final

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from datamodules.text_files import class_name, is_undeclared, xml_source
from datamodules.voc.names import read_split_lines
from detector.errors import InputError, listed, shortened
from detector.use.reading import SUFFIXES

IMAGE_SUFFIXES: Final = tuple(f".{suffix}" for form in SUFFIXES for suffix in (form, form.upper(), form.capitalize()))
MAX_BYTES = 4_000_000  # of an annotation file; more than ten thousand objects
MAX_PIXELS = 10**9  # along a side; whatever is beyond is no coordinate

_COORDINATES = ("xmin", "ymin", "xmax", "ymax")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_INTEGER = re.compile(r"[+-]?\d{1,9}")
# Shifting by 1 in decimal digits instead of binary floats makes write-then-read exact for every finite float.
_EXACT = Context(prec=1200)
_ONE = Decimal(1)


@dataclass(frozen=True)
class VOCObject:
    """One annotated object.

    Args:
        name: class name.
        box: (x1, y1, x2, y2), continuous pixels, x1 and y1 counted from 0.
        difficult: VOC flag; the evaluation ignores such objects.
        truncated: VOC flag; the object reaches beyond its box.
        pose: VOC pose, e.g. "Left".
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    truncated: bool = False
    pose: str = "Unspecified"


@dataclass(frozen=True)
class Annotation:
    """The annotation of one image.

    Args:
        file_name: image file name as the XML states it, e.g. "2008_000008.jpg".
        width: image width in pixels; 0 where the XML does not state a size.
        height: image height in pixels; 0 where the XML does not state a size.
        objects: the objects in the order of the file; may be empty.
        depth: number of colour channels.
        folder: VOC folder name, e.g. "VOC2012".
    """

    file_name: str
    width: int
    height: int
    objects: tuple[VOCObject, ...]
    depth: int = 3
    folder: str = "VOC"


class NegativeBoxError(InputError):
    """A box whose last pixel lies before its first one."""


@dataclass(frozen=True)
class UnreadObject:
    """An <object> that cannot be read.

    Args:
        name: class name; empty where there is none.
        difficult: VOC flag; False where it is unreadable.
        error: why.
    """

    name: str
    difficult: bool
    error: InputError


def read_annotation(path: str | Path) -> Annotation:
    """Read one VOC XML file.

    Missing `difficult`, `truncated` and `pose` get their defaults, a missing `<size>` reads as 0 x 0 and a missing
    `<filename>` as the XML file's own stem + ".jpg". Boxes are kept as written, also beyond the image.

    Raises:
        InputError: names the file (and the object, counted from 0) for a missing or unparsable file, a missing or
            non-numeric value, or a box whose xmax < xmin or ymax < ymin.
    """
    path = Path(path)
    return parse_annotation(read_annotation_bytes(path), path)


def read_annotation_bytes(path: Path) -> bytes:
    """Read the contents of an annotation file.

    Raises:
        InputError: A missing, unreadable or absurdly large file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES // 10**6} MB, which no annotation of one image is")
    return data


def parse_annotation(data: bytes, path: Path) -> Annotation:
    """Read an annotation from the contents of `path`; see `read_annotation`."""
    annotation, objects = parse_annotation_loosely(data, path)
    for item in objects:
        if isinstance(item, UnreadObject):
            raise item.error
    return annotation


def parse_annotation_loosely(data: bytes, path: Path) -> tuple[Annotation, tuple[VOCObject | UnreadObject, ...]]:
    """Read an annotation from the contents of `path`, bad objects included.

    Returns:
        The annotation with its readable objects, and all objects in the order of the file.

    Raises:
        InputError: names the file, if it is unparsable as a whole.
    """
    root = _parse(data, path)
    size = root.find("size")
    width, height, depth = (_size_value(size, key, path) for key in ("width", "height", "depth"))
    objects = tuple(_read_object_or_error(node, index, path) for index, node in enumerate(root.findall("object")))
    annotation = Annotation(
        file_name=_text(root, "filename") or f"{path.stem}.jpg",
        width=width,
        height=height,
        objects=tuple(item for item in objects if isinstance(item, VOCObject)),
        depth=depth or 3,
        folder=_text(root, "folder") or "VOC",
    )
    return annotation, objects


def write_annotation(annotation: Annotation, path: str | Path) -> None:
    """Write one VOC XML file; `read_annotation` gives back an equal `Annotation`.

    Raises:
        InputError: for a box narrower or lower than one pixel, which VOC coordinates cannot state, and for a text
            that XML cannot carry unchanged.
    """
    path = Path(path)
    root = ElementTree.Element("annotation")
    _add(root, "folder", _checked_text(annotation.folder, path))
    _add(root, "filename", _checked_text(annotation.file_name, path))
    size = ElementTree.SubElement(root, "size")
    for key in ("width", "height", "depth"):
        _add(size, key, str(int(getattr(annotation, key))))
    _add(root, "segmented", "0")
    for index, voc_object in enumerate(annotation.objects):
        _write_object(root, voc_object, index, path)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


def read_split(path: str | Path, repeats: bool = False) -> list[str]:
    """Read the image names of a split file such as `ImageSets/Main/train.txt`, in file order.

    Blank lines are skipped. A name may contain blanks. Suffixes, folders and class flags ("name  1", "name -1") are
    left away where that leads to an annotation, see `datamodules.voc.names`.

    Args:
        path: The file.
        repeats: Accept that it names an image more than once.

    Raises:
        InputError: The file is missing (lists the split files that are there), unreadable, empty, or names an image
            twice.
    """
    path = Path(path)
    if not path.is_file():
        present = sorted(file.stem for file in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such split file; {path.parent} holds {listed(present, 12) or 'no split files'}")
    names = [line.name for line in read_split_lines(path)]
    if not names:
        raise InputError(f"{path}: the split file is empty; write one image name per line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice and not repeats:
        raise InputError(f"{path}: names the image {twice[0]} more than once")
    return names


def _parse(data: bytes, path: Path) -> ElementTree.Element:
    try:
        root: ElementTree.Element | None = defusedxml.ElementTree.fromstring(xml_source(data))
    except DefusedXmlException as error:
        raise InputError(f"{path}: declares XML entities, which are refused; write them out as text") from error
    except (ElementTree.ParseError, LookupError, ValueError, TypeError, OverflowError) as error:
        # An encoding that Python knows but that is none of text raises other than ParseError.
        hint = "; it is not UTF-8, and declares no other encoding" if is_undeclared(data) else ""
        raise InputError(f"{path}: not well-formed XML ({shortened(str(error))}{hint})") from error
    if root is None or _plain_tag(root.tag) != "annotation":
        found = "nothing" if root is None else f"<{shortened(root.tag)}>"
        raise InputError(f"{path}: the outermost element is {found}; a VOC file has <annotation>")
    if any(_plain_tag(tag) != tag for tag in {root.tag, *(child.tag for child in root)}):
        for node in root.iter():
            node.tag = _plain_tag(node.tag)
    return root


def _plain_tag(tag: str) -> str:
    """Return a tag without its namespace, in small letters."""
    return tag.rpartition("}")[2].lower()


def _text(node: ElementTree.Element, key: str) -> str:
    return (node.findtext(key) or "").strip()


def _size_value(size: ElementTree.Element | None, key: str, path: Path) -> int:
    text = "" if size is None else _text(size, key)
    if not text:
        return 0
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not (0 <= value <= MAX_PIXELS and value.is_integer()):
        raise InputError(f"{path}: <size> has {key} {shortened(text)!r}; a whole number of pixels is needed")
    return int(value)


def _read_object_or_error(node: ElementTree.Element, index: int, path: Path) -> VOCObject | UnreadObject:
    try:
        return _read_object(node, index, path)
    except InputError as error:
        return UnreadObject(class_name(_text(node, "name")), _text(node, "difficult").lower() in ("1", "true"), error)


def _read_object(node: ElementTree.Element, index: int, path: Path) -> VOCObject:
    where = f"{path}: object {index}"
    name = class_name(_text(node, "name"))
    if not name:
        raise InputError(f"{where} has no <name>")
    bndbox = node.find("bndbox")
    if bndbox is None:
        raise InputError(f"{where} ({shortened(name)}) has no <bndbox>")
    where = f"{where} ({shortened(name)})"
    x1, y1, x2, y2 = (_read_coordinate(bndbox, key, where) for key in _COORDINATES)
    # Compared in continuous coordinates: xmax >= xmin in the file is exactly a width of at least 1 here.
    for low, high, axis in ((x1, x2, "x"), (y1, y2, "y")):
        if high - low < 1 and Decimal(_text(bndbox, f"{axis}max")) < Decimal(_text(bndbox, f"{axis}min")):
            raise NegativeBoxError(
                f"{where} has {axis}max {shortened(_text(bndbox, f'{axis}max'))} below {axis}min "
                f"{shortened(_text(bndbox, f'{axis}min'))}; {axis}max must be at least {axis}min"
            )
    return VOCObject(
        name=name,
        box=(x1, y1, x2, y2),
        difficult=_read_flag(node, "difficult", where),
        truncated=_read_flag(node, "truncated", where),
        pose=_text(node, "pose") or "Unspecified",
    )


def _read_coordinate(bndbox: ElementTree.Element, key: str, where: str) -> float:
    text = _text(bndbox, key)
    if not text:
        raise InputError(f"{where} has no <{key}> in its <bndbox>")
    shift = key in ("xmin", "ymin")
    if _INTEGER.fullmatch(text):  # nearly all of VOC; the decimal route below gives the same value
        return float(int(text) - shift)
    value = math.nan
    if len(text) <= 400 and _NUMBER.fullmatch(text):  # a float written out has no more digits
        value = float(_EXACT.subtract(Decimal(text), _ONE)) if shift else float(text)
    if not abs(value) <= MAX_PIXELS:
        raise InputError(f"{where} has {key} {shortened(text)!r}; a number of pixels is needed")
    return value


def _read_flag(node: ElementTree.Element, key: str, where: str) -> bool:
    text = _text(node, key).lower()
    if text in ("", "0", "false", "unspecified"):
        return False
    if text in ("1", "true"):
        return True
    if key == "truncated":  # nothing is computed from it
        return False
    raise InputError(f"{where} has {key} {shortened(text)!r}; 0 or 1 is needed")


def _write_object(root: ElementTree.Element, voc_object: VOCObject, index: int, path: Path) -> None:
    where = f"{path}: object {index} ({voc_object.name})"
    node = ElementTree.SubElement(root, "object")
    _add(node, "name", _checked_text(voc_object.name, path))
    _add(node, "pose", _checked_text(voc_object.pose, path))
    _add(node, "truncated", str(int(voc_object.truncated)))
    _add(node, "difficult", str(int(voc_object.difficult)))
    x1, y1, x2, y2 = (float(value) for value in voc_object.box)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise InputError(f"{where} has box {(x1, y1, x2, y2)}; finite numbers are needed")
    first = (_EXACT.add(Decimal(repr(x1)), _ONE), _EXACT.add(Decimal(repr(y1)), _ONE))
    last = (Decimal(repr(x2)), Decimal(repr(y2)))
    if last[0] < first[0] or last[1] < first[1]:
        raise InputError(f"{where} has box {(x1, y1, x2, y2)}; VOC coordinates need a side of at least one pixel")
    bndbox = ElementTree.SubElement(node, "bndbox")
    for key, value in zip(_COORDINATES, first + last, strict=True):
        _add(bndbox, key, str(int(value)) if value == value.to_integral_value() else format(value, "f"))


def _checked_text(text: str, path: Path) -> str:
    if not text or text != text.strip() or not text.isprintable():
        raise InputError(f"{path}: the text {text!r} cannot be written; it must be printable, without outer blanks")
    return text


def _add(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, tag).text = text
