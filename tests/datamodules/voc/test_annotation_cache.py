import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import file_cache, parallel
from datamodules.file_cache import cache_folder
from datamodules.voc import annotation_cache
from datamodules.voc.annotation_cache import AnnotationCache
from datamodules.voc.format import Annotation, VOCObject, read_annotation, write_annotation
from detector.errors import InputError
from detector.use.reading import ImageHeader

STEMS = [f"i{number}" for number in range(6)]


def annotation(stem: str, x: float = 1.5) -> Annotation:
    objects = (VOCObject("cat", (x, 2.0, 9.25, 30.0), True), VOCObject("dög", (0.0, 0.0, 1.0, 1.0), pose="Left"))
    return Annotation(f"{stem}.jpg", 64, 48, objects, folder="F")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for part in ("Annotations", "JPEGImages"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for number, stem in enumerate(STEMS):
        write_annotation(annotation(stem, number), tmp_path / "data" / "Annotations" / f"{stem}.xml")
    return tmp_path / "data"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are parsed."""
    names: list[str] = []
    original = annotation_cache.parse_annotation

    def parse(data: bytes, path: Path) -> Annotation:
        names.append(path.stem)
        return original(data, path)

    monkeypatch.setattr(annotation_cache, "parse_annotation", parse)
    return names


def read(dataset: Path) -> dict[str, Annotation | InputError]:
    """As another process would: with nothing in memory."""
    return AnnotationCache(dataset, dataset.parent / "cache").annotations(STEMS)


def test_kept_annotations_are_those_of_the_files(dataset, parsed):
    first = read(dataset)
    assert parsed == STEMS
    second = read(dataset)
    assert parsed == STEMS
    expected = {stem: read_annotation(dataset / "Annotations" / f"{stem}.xml") for stem in STEMS}
    assert first == second == expected
    assert list(second) == STEMS
    assert isinstance(second["i0"].objects[0].box, tuple)


def test_a_changed_file_is_noticed_even_if_size_and_time_are_not(dataset, parsed):
    read(dataset)
    path = dataset / "Annotations" / "i3.xml"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"<ymin>3</ymin>", b"<ymin>7</ymin>"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert read(dataset)["i3"].objects[0].box == (3.0, 6.0, 9.25, 30.0)
    assert parsed == [*STEMS, "i3"]


def test_a_renamed_file_states_its_own_name(dataset):
    path = dataset / "Annotations" / "i3.xml"
    path.write_text("<annotation></annotation>")
    assert read(dataset)["i3"].file_name == "i3.jpg"
    path.rename(dataset / "Annotations" / "i4.xml")
    found = read(dataset)
    assert found["i4"].file_name == "i4.jpg"
    assert "i3.xml: no such annotation file" in str(found["i3"])


def test_bad_files_are_told_apart_and_never_kept(dataset, parsed):
    (dataset / "Annotations" / "i1.xml").write_text("<annotation><object/></annotation>")
    for _ in range(2):
        found = read(dataset)
        assert "i1.xml: object 0 has no <name>" in str(found["i1"])
        assert isinstance(found["i2"], Annotation)
    assert parsed == [*STEMS, "i1"]


def flip_a_coordinate(data: bytes) -> bytes:
    assert data.count(b"9.25") == 6
    return data.replace(b"9.25", b"8.25", 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"garbage\n\xff" * 50,
        lambda data: data + b" ",
        flip_a_coordinate,
        lambda data: data.replace(b'"version"', b'"Version"'),
    ],
)
def test_a_damaged_cache_is_made_anew(dataset, parsed, damage):
    expected = read(dataset)
    (file,) = (dataset.parent / "cache").rglob("*.json")
    file.write_bytes(damage(file.read_bytes()))
    assert read(dataset) == expected
    assert parsed == STEMS * 2
    assert read(dataset) == expected
    assert parsed == STEMS * 2


def test_another_parser_does_not_trust_the_cache(dataset, parsed, monkeypatch):
    read(dataset)
    monkeypatch.setattr(file_cache, "_version", lambda _: "another")
    read(dataset)
    assert parsed == STEMS * 2


def test_headers_are_read_again_when_the_image_changes(dataset, monkeypatch):
    path = dataset / "JPEGImages" / "i0.png"
    Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(path)
    read_paths: list[Path] = []
    original = file_cache.read_header

    def header(path: Path) -> ImageHeader:
        read_paths.append(path)
        return original(path)

    monkeypatch.setattr(file_cache, "read_header", header)

    def sizes() -> dict[Path, ImageHeader | InputError]:
        return AnnotationCache(dataset, dataset.parent / "cache").headers([path, path.with_name("gone.png")])

    for _ in range(2):
        assert sizes()[path] == ImageHeader(9, 5)
        assert "gone.png" in str(sizes()[path.with_name("gone.png")])
    assert read_paths.count(path) == 1
    time = path.stat().st_mtime_ns
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(path)
    os.utime(path, ns=(time, time))
    assert sizes()[path] == ImageHeader(9, 6)


def test_where_it_is_kept(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("FRCNN_CACHE_DIR", str(tmp_path / "by_environment"))
    assert cache_folder() == tmp_path / "by_environment"
    assert cache_folder(str(tmp_path / "by_option")) == tmp_path / "by_option"
    assert cache_folder("none") is None
    monkeypatch.setenv("FRCNN_CACHE_DIR", "none")
    assert cache_folder() is None
    monkeypatch.delenv("FRCNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "frcnn"
    before = sorted(tmp_path.rglob("*"))
    assert AnnotationCache(dataset, None).annotations(STEMS)["i2"] == annotation("i2", 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_to_costs_only_time(dataset, capsys):
    (dataset.parent / "cache").write_text("a file")
    assert read(dataset)["i2"] == annotation("i2", 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "not kept" in lines[0]


def test_several_processes_give_the_same_in_the_same_order(dataset, monkeypatch):
    monkeypatch.setattr(parallel, "PARALLEL_FROM", 2)
    monkeypatch.setattr(parallel, "available_cores", lambda: 3)
    (dataset / "Annotations" / "i1.xml").write_text("<annotation>")
    found = AnnotationCache(dataset, None).annotations(STEMS)
    assert list(found) == STEMS
    assert [found[stem] for stem in STEMS if stem != "i1"] == [annotation(s, n) for n, s in enumerate(STEMS) if n != 1]
    assert "i1.xml: not well-formed" in str(found["i1"])


def test_two_processes_at_once(dataset):
    """Both write again and again while both read; each always sees a whole file, and what both know is kept."""
    script = """
import sys
from pathlib import Path
from datamodules.voc.annotation_cache import AnnotationCache
folder, stems = Path(sys.argv[1]), sys.argv[2:]
for turn in range(25):
    file = next((folder.parent / "cache").rglob("*.json"), None)
    if file is not None and sys.argv[2] == "i0":
        (folder / "Annotations" / "i0.xml").write_text(f"<annotation><folder>{turn}</folder></annotation>")
    cache = AnnotationCache(folder, folder.parent / "cache")
    found = cache.annotations(stems)
    assert all(not isinstance(value, Exception) for value in found.values()), found
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(dataset), *stems], stderr=subprocess.PIPE, text=True)
        for stems in (STEMS[:4], STEMS[2:])
    ]
    for run in runs:
        assert run.communicate()[1] == ""
        assert run.returncode == 0
    (file,) = (dataset.parent / "cache").rglob("*.json")
    digest, data = file.read_bytes().split(b"\n", 1)
    assert file_cache.digest_of(data).encode() == digest
    assert set(json.loads(data)["rows"]) >= {f"{stem}.xml" for stem in STEMS[:4]}
    assert [path for path in file.parent.iterdir() if path != file] == []
