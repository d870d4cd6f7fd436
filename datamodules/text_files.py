"""Bytes of annotations and lists -> text, by a byte order mark, else by what XML declares, else UTF-8.

The parser knows UTF-8, UTF-16 and the single-byte encodings by itself. What it does not know are the encodings of more
than one byte in which East Asian tools write, and files that were saved as UTF-16 while their first line still says
another encoding.
"""

import codecs
import re
from pathlib import Path
from typing import Final

from detector.errors import InputError

_MARKS: Final = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OBEYED: Final = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]\s*")
_DECLARED = re.compile(rb"\s*<\?xml\s[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._:-]{1,40})[\"']")
_MULTI_BYTE: Final = {
    **dict.fromkeys(("gb2312", "gbk", "cp936", "ms936", "gb18030", "x-gbk", "gb_2312-80"), "gb18030"),
    **dict.fromkeys(("big5", "big5-tw", "cp950", "big5-hkscs"), "big5hkscs"),
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "x-sjis", "windows-31j", "ms_kanji", "cp932"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987", "cp949", "windows-949", "uhc"), "cp949"),
    "euc-jp": "euc_jp",
    "johab": "johab",
}
"""Names that XML may declare -> the codec, where an older one is a part of a newer one the newer."""


def class_name(text: str) -> str:
    """Return the name of a class without outer blanks, and with blanks for line breaks and what terminals obey."""
    return text.strip() if text.isprintable() else _OBEYED.sub(" ", text).strip()


def xml_source(data: bytes) -> bytes | str:
    """Return an XML document as the parser reads it: as text where it would not find the encoding by itself.

    Raises:
        UnicodeDecodeError: The bytes are not in the encoding that they declare.
    """
    mark = marked_encoding(data)
    if mark is not None:
        return data.decode(mark)
    declared = _DECLARED.match(data[:300])
    codec = _MULTI_BYTE.get(declared.group(1).decode("ascii").lower()) if declared else None
    return data if codec is None else data.decode(codec)


def is_undeclared(data: bytes) -> bool:
    """Return whether an XML document is not UTF-8 although it says nothing else."""
    if marked_encoding(data) is not None or _DECLARED.match(data[:300]):
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def marked_encoding(data: bytes) -> str | None:
    """Return the encoding that a byte order mark states."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def decode_text(data: bytes, path: Path, what: str) -> str:
    """Decode the text of a file that declares nothing: by its byte order mark, else UTF-8.

    `what` says what it should be, such as "a text file of image names".

    Raises:
        InputError: It is in another encoding, and the message says where that shows.
    """
    mark = marked_encoding(data)
    try:
        text = data.decode(mark or "utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}: cannot be read as {what}: byte {error.start} (line {line}) is not {mark or 'UTF-8'}; save it as "
            "UTF-8"
        ) from error
    if mark is None and "\0" in text:
        raise InputError(f"{path}: cannot be read as {what}: it holds zero bytes, as UTF-16 does; save it as UTF-8")
    return text
