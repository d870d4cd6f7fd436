"""Reads mutated annotation files under limits of memory and time; see test_hostile_xml.py.

Usage: hostile_xml_reader.py FOLDER COUNT. Prints one JSON document.
"""

import itertools
import json
import random
import resource
import sys
from pathlib import Path

from datamodules.checks import clip_box
from datamodules.voc.format import Annotation, VOCObject, read_annotation, write_annotation
from detector.errors import InputError

MEGABYTES = 200
CPU_SECONDS = 100

HUGE = [
    *("9" * 400, "-" + "9" * 30, "9" * 15, "1e308", "1e999", "-1e400", "1e-400", "1" * 100_000, "1." + "0" * 5000),
    *("nan", "NaN(3)", "inf", "0x10", "\u0663", "1_000", "", " ", "one", "1,5", "1e", "++1", "." * 5000),
]
LAUGHS = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
HOSTILE = [
    f"<!DOCTYPE a [<!ENTITY a0 'lol'>{LAUGHS}]><annotation>&a11;</annotation>",
    f"<!DOCTYPE a [<!ENTITY a '{'x' * 60_000}'>]><annotation>{'&a;' * 60_000}</annotation>",
    "<!DOCTYPE a [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation><folder>&a;</folder></annotation>",
    "<!DOCTYPE a [<!ENTITY % p SYSTEM 'file:///dev/zero'> %p;]><annotation/>",
]
ENCODINGS = [
    *("utf-8", "utf-16", "utf-16-be", "utf-32", "utf-7", "latin-1", "ascii", "cp037", "EBCDIC-CP-BE", "shift_jis"),
    *("big5", "hex", "zip", "rot13", "base64", "idna", "punycode", "unicode_escape", "raw_unicode_escape", "mbcs"),
    *("undefined", "nothing", "x" * 5000, chr(0)),
]
WORDS = [b"annotation", b"object", b"bndbox", b"xmin", b"xmax", b"ymin", b"ymax", b"name", b"size", b"difficult"]

rng = random.Random(20)


def cut(data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def swap_tags(data: bytes) -> bytes:
    parts = data.split(b"<")
    for place in rng.sample(range(len(parts)), min(3, len(parts))):
        first, second = rng.sample(WORDS, 2)
        parts[place] = parts[place].replace(first, second)
    return b"<".join(parts)


def drop_element(data: bytes) -> bytes:
    word = rng.choice(WORDS[1:])
    before, opened, rest = data.partition(b"<" + word + b">")
    return before + rest.partition(b"</" + word + b">")[2] if opened else data


def numbers(data: bytes) -> bytes:
    parts = data.split(b">")
    places = [n for n, part in enumerate(parts) if part.split(b"<")[0].replace(b".", b"").isdigit()]
    for place in rng.sample(places, min(len(places), rng.randrange(1, 4))):
        parts[place] = rng.choice(HUGE).encode() + b"<" + parts[place].split(b"<", 1)[1]
    return b">".join(parts)


def entities(data: bytes) -> bytes:
    if rng.random() < 0.7:
        return rng.choice(HOSTILE).encode()
    doctype = rng.choice([b"<!DOCTYPE annotation [<!ENTITY x 'cat'>]>", b""])
    return data.replace(b"<annotation>", doctype + b"<annotation>&x;").replace(b"cat", b"&x;")


def encodings(data: bytes) -> bytes:
    text = data.decode()
    head = f"<?xml version='1.0' encoding='{rng.choice(ENCODINGS)}'?>"
    actual = rng.choice(["utf-8", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp037", "shift_jis"])
    return (head + text[text.index("<annotation>") :]).encode(actual, "replace")


def flip(data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 10)):
        flipped[rng.randrange(len(flipped))] = rng.choice([0, 9, 10, 34, 38, 60, 62, 128, 255, *range(48, 58)])
    return bytes(flipped)


def splice(data: bytes) -> bytes:
    other = rng.choice(SEEDS)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


KINDS = itertools.count()


def grow(data: bytes) -> bytes:
    kind = next(KINDS)  # the first five are each tried once: they take long
    if kind == 0:
        return b"<annotation>" + b"<a/>" * 900_000 + b"</annotation>"  # just under what is read at all
    if kind == 1:
        return b"<annotation>" + b"<object>" * 400_000
    if kind == 2:
        return b"<annotation " + b" ".join(b'a%d="%d"' % (n, n) for n in range(100_000)) + b"/>"
    if kind == 3:
        return data.replace(b"<name>", b"<name>" + b"x" * 3_000_000, 1)
    if kind == 4:
        return b"<annotation>" + b" " * 9_000_000 + b"</annotation>"
    start = data.find(b"<object>")
    objects = data[start : -len(b"</annotation>")] if start > 0 else b"<object/>"
    return data[: -len(b"</annotation>")] + objects * rng.randrange(1, 10) + b"</annotation>"


def deep(data: bytes) -> bytes:
    tag = rng.choice([b"object", b"part"])
    depth = rng.randrange(1, 3000)
    opened = data.replace(b"<size>", (b"<" + tag + b">") * depth + b"<size>", 1)
    return opened.replace(b"</size>", b"</size>" + (b"</" + tag + b">") * depth, 1)


MUTATIONS = [cut, swap_tags, drop_element, numbers, entities, encodings, flip, splice, grow, deep]
SEEDS: list[bytes] = []


def write_seeds(folder: Path) -> None:
    for number in range(8):
        corners = [(float(rng.randrange(300)), rng.uniform(0, 200)) for _ in range(number)]
        objects = tuple(
            VOCObject(rng.choice(["cat", "d\u00f6g", "tv monitor"]), (x, y, x + rng.uniform(2, 90), y + 7.0))
            for x, y in corners
        )
        path = folder / f"{number}.xml"
        write_annotation(Annotation(f"{number}.jpg", 500, 375, objects), path)
        SEEDS.append(path.read_bytes())


def check(found: Annotation) -> None:
    """What is read can be trained on or is refused in one line when it is laid on its image."""
    assert 0 <= found.width <= 10**9 and 0 <= found.height <= 10**9
    for item in found.objects:
        x1, y1, x2, y2 = item.box
        assert item.name and all(abs(value) <= 10**9 + 1 for value in item.box) and x2 >= x1 and y2 >= y1
        box = clip_box(item.box, (500, 375))
        assert box is None or (0 <= box[0] < box[2] <= 500 and 0 <= box[1] < box[3] <= 375)


def limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(folder: Path, count: int) -> None:
    write_seeds(folder)
    limit_resources()
    outcome = {mutation.__name__: [0, 0] for mutation in MUTATIONS}
    path = folder / "mutated.xml"
    for number in range(count):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        data = mutation(rng.choice(SEEDS))
        if data and len(data) < 100_000 and rng.random() < 0.1:
            data = rng.choice([cut, flip, swap_tags])(data)
        path.write_bytes(data)
        try:
            check(read_annotation(path))
            outcome[mutation.__name__][0] += 1
        except InputError as error:
            message = str(error)
            assert str(path) in message and "\n" not in message, message[:1000]
            assert len(message) < len(str(path)) + 300, message[:1000]
            outcome[mutation.__name__][1] += 1
    print(json.dumps({"outcome": outcome}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
