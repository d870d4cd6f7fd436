"""Split files and annotations as tools write them: suffixes, folders, encodings, spellings of tags; and the first true
cause where nothing is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.doctor.examine import DoctorOptions, examine
from datamodules.ground_truth import read_ground_truth
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import VOCObject, read_annotation, read_split
from datamodules.voc.names import read_split_lines
from datamodules.voc.reader import VOCFormat
from detector.errors import InputError

CAT = VOCObject("cat", (2.0, 3.0, 12.0, 9.0))


@pytest.fixture
def dataset(tmp_path: Path, write_image: Callable[..., Path], annotate: Callable[..., Path]) -> Path:
    """Images a, b and "c d", each with a cat."""
    for stem in ("a", "b", "c d"):
        write_image(tmp_path, f"{stem}.jpg")
        annotate(tmp_path, stem, CAT)
    return tmp_path


def split(folder: Path, data: str | bytes, name: str = "train") -> Path:
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def module(folder: Path, **changes) -> VOCDataModule:
    options = {"root": str(folder), "train_splits": ["train"], "val_splits": ["train"], "allow_overlap": True}
    return VOCDataModule(**options | {"num_workers": 0} | changes)


def check_all_readers(folder: Path, names: list[str], classes: list[str]) -> None:
    """Training, evaluation (and with it the audit of anchors) and doctor read the same."""
    data = module(folder)
    data.setup("fit")
    assert data.class_names == classes
    assert [Path(name).stem for name in data.train_dataset.file_names] == [name.rsplit("/", 1)[-1] for name in names]
    assert all(len(data.train_dataset.target(index)["boxes"]) == 1 for index in range(len(names)))
    truth = read_ground_truth(VOCFormat(folder), ["train"])
    assert (list(truth.image_names), list(truth.class_names)) == (names, classes)
    assert len(truth.objects.box) == len(names)
    report = examine(DoctorOptions(VOCFormat(folder)))
    assert report.splits == {"train": len(names)} and list(report.classes) == classes
    assert [problem for problem in report.problems if problem.breaks] == []


@pytest.mark.parametrize(
    "lines",
    [
        ["a.jpg", "b.JPG", "c d.jpeg"],
        ["data/obj/a.jpg", "JPEGImages/b.png", "./c d.jpg"],
        ["data\\obj\\a.jpg", "C:\\photos\\b.bmp", "..\\c d"],
        ["/home/someone/data/JPEGImages/a.jpg", "JPEGImages/b", "/c d"],
        ["a.xml", "Annotations/b.xml", "c d.XML"],
        ["JPEGImages/a.jpg Annotations/a.xml", "b.jpg\tb.xml", "c d"],
        ["a.jpg 1", "data/b.jpg -1", "c d  0"],
        ["a", "b", "c d"],
    ],
)
def test_lines_of_split_files(dataset, lines):
    path = split(dataset, "\r\n".join(lines) + "\r\n")
    assert read_split(path) == ["a", "b", "c d"]
    if not path.read_text().rstrip().endswith(" 0"):  # the doctor leaves splits of single classes out
        check_all_readers(dataset, ["a", "b", "c d"], ["cat"])
    assert [line.flagged for line in read_split_lines(path)] == [lines[0].endswith(" 1")] * 3


def test_what_is_named_in_full_counts_first(dataset, annotate):
    for stem in ("a.jpg", "sub/a", "b 1"):
        (dataset / "Annotations" / "sub").mkdir(exist_ok=True)
        annotate(dataset, stem, CAT)
    assert read_split(split(dataset, "a.jpg\nsub/a.jpg\nb 1\nb\n")) == ["a.jpg", "sub/a", "b 1", "b"]
    with pytest.raises(InputError, match="names the image b more than once"):
        read_split(split(dataset, "b\nb.jpg\n"))


def test_folders_below_annotations(dataset, annotate, write_image):
    for stem in ("day/e", "day/f", "night/f"):
        (dataset / "JPEGImages" / stem).parent.mkdir(exist_ok=True)
        (dataset / "Annotations" / stem).parent.mkdir(exist_ok=True)
        annotate(dataset, stem, CAT)
        write_image(dataset, f"{stem}.jpg")
    split(dataset, "e\nday/f.jpg\ndata/night/f.jpg\n")
    check_all_readers(dataset, ["day/e", "day/f", "night/f"], ["cat"])
    assert module(dataset).train_dataset.file_names == ["day/e.jpg", "day/f.jpg", "night/f.jpg"]
    assert read_split(split(dataset, "f.jpg\n")) == ["f"]  # there are two


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gbk"])
def test_encodings_of_split_files(dataset, annotate, write_image, encoding):
    annotate(dataset, "图片一", CAT)
    write_image(dataset, "图片一.jpg")
    split(dataset, "图片一.jpg\r\na\r\n".encode(encoding))
    check_all_readers(dataset, ["图片一", "a"], ["cat"])


def test_split_files_that_are_no_text(dataset):
    path = split(dataset, "a\nbild_ä\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"train\.txt: cannot be read .*\(line 2\) is not UTF-8; save it as UTF-8$"):
        read_split(path)
    with pytest.raises(InputError, match=r"holds zero bytes, as UTF-16 does"):
        read_split(split(dataset, "a\nb\n".encode("utf-16-le")))


XML = """<?xml version="1.0" encoding="{}"?>
<annotation><filename>a.jpg</filename><size><width>32</width><height>24</height></size>
<object><name>人</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>9</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        *(("GBK", "gbk"), ("gb2312", "gb2312"), ("GB18030", "gb18030"), ("big5", "big5"), ("Shift_JIS", "shift_jis")),
        *(("utf-8", "utf-8"), ("utf-8", "utf-8-sig"), ("UTF-16", "utf-16")),
        *(("utf-8", "utf-16"), ("gbk", "utf-16"), ("gbk", "utf-8-sig"), ("utf-16", "utf-8-sig")),  # the mark counts
        *(("utf-16", "utf-16-le"), ("utf-16", "utf-16-be")),
    ],
)
def test_encodings_of_annotations(dataset, declared, encoding):
    (dataset / "Annotations" / "a.xml").write_bytes(XML.format(declared).encode(encoding))
    split(dataset, "a\n")
    assert read_annotation(dataset / "Annotations" / "a.xml").objects == (VOCObject("人", (2.0, 3.0, 12.0, 9.0)),)
    check_ground_truth = read_ground_truth(VOCFormat(dataset), ["train"], ["人"])
    assert check_ground_truth.objects.label.tolist() == [1]
    assert module(dataset).class_names == ["人"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (XML.format("gbk").encode("utf-8")[:-40] + b"\xff\xff</annotation>", ["not well-formed XML", "gb18030"]),
        (
            XML.replace(' encoding="{}"', "").replace("人", "红色").encode("gbk"),
            ["not UTF-8, and declares no other encoding"],
        ),
        (XML.format("klingon").encode(), ["not well-formed XML"]),
        (b"\xff\xfe<\0", ["not well-formed XML"]),
    ],
)
def test_annotations_in_another_encoding_than_they_say(dataset, data, words):
    path = dataset / "Annotations" / "a.xml"
    path.write_bytes(data)
    split(dataset, "a\n")
    for read in (lambda: read_annotation(path), lambda: module(dataset)):
        with pytest.raises(InputError) as caught:
            read()
        assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<annotation>", '<annotation xmlns="http://example.org/voc">'),
        lambda text: text.replace("annotation>", "Annotation>").replace("object>", "Object>"),
        lambda text: text.upper().replace("<NAME>CAT", "<NAME>cat"),
        lambda text: text.replace("object>", "OBJECT>").replace("name>", "Name>"),
    ],
)
def test_spellings_of_tags(dataset, change):
    path = dataset / "Annotations" / "a.xml"
    path.write_text(change(path.read_text()))
    split(dataset, "a\n")
    annotation = read_annotation(path)
    assert [(item.name, item.box) for item in annotation.objects] == [("cat", CAT.box)] and annotation.width == 32
    assert module(dataset).class_names == ["cat"]


@pytest.mark.parametrize("suffix", [".XML", ".Xml"])
def test_suffixes_of_annotations(dataset, suffix):
    for path in (dataset / "Annotations").iterdir():
        path.rename(path.with_suffix(suffix))
    split(dataset, "b.jpg\na\n")
    check_all_readers(dataset, ["b", "a"], ["cat"])
    data = VOCDataModule(str(dataset), val_fraction=0.3, num_workers=0)  # of all that are annotated
    data.setup("fit")
    assert len(data.train_dataset) + len(data.val_dataset) == 3


def everywhere(frcnn, tiny_config: Path, folder: Path, cwd: Path) -> list[str]:
    """What the commands say about a dataset that gives no classes."""
    (cwd / "none.json").write_text("[]")
    options = ("--data.root", folder, "--data.val_splits", "[train]")
    lines = []
    for command in (
        ("fit", "--config", tiny_config, "--data.train_splits", "[train]", "--data.test_splits", "null", *options),
        ("anchors", "--config", tiny_config, "--data.train_splits", "[train]", *options),
        ("evaluate", cwd / "none.json", *options),
    ):
        result = frcnn(*command, cwd=cwd)
        assert result.code == 2, result.err
        lines.append(result.err.splitlines()[0])
    return lines


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda folder: [path.unlink() for path in (folder / "Annotations").iterdir()],
            ["train.txt: line 1 is 'a.jpg', but there is no ", "Annotations/a.xml; ", "Annotations holds no XML file"],
        ),
        (
            lambda folder: [path.write_text("<html/>") for path in (folder / "Annotations").iterdir()],
            ["Annotations/a.xml: the outermost element is <html>; a VOC file has <annotation>"],
        ),
        (
            lambda folder: [path.write_text("<annotation/>") for path in (folder / "Annotations").iterdir()],
            ["no annotation of the splits names an object, so there are no classes"],
        ),
    ],
)
def test_the_first_true_cause_is_said_by_all_commands(dataset, tmp_path_factory, frcnn, tiny_config, break_it, words):
    split(dataset, "a.jpg\n")
    break_it(dataset)
    for line in everywhere(frcnn, tiny_config, dataset, tmp_path_factory.mktemp("cwd")):
        assert all(word in line for word in words), line


def test_lines_that_name_nothing(dataset, tmp_path_factory, frcnn, tiny_config):
    path = split(dataset, "\nphotos/x.jpg\ny\n")
    fit, *others = everywhere(frcnn, tiny_config, dataset, tmp_path_factory.mktemp("cwd"))
    missing = dataset / "Annotations" / "x.xml"
    assert f"{path}: line 2 is 'photos/x.jpg', but there is no {missing}; " in fit
    assert fit.endswith("Annotations holds a.xml, b.xml, c d.xml")
    for line in others:  # whose classes are those of all annotations
        assert f"{missing}: no such annotation file (and 1 more files with problems)" in line


def test_the_doctor_sees_the_same(dataset, frcnn):
    split(dataset, "photos/x.jpg\na.jpg\n")
    result = frcnn("doctor", dataset, "--format", "json", cwd=dataset)
    found = {
        (Path(one["file"]).name, one["kind"]) for one in json.loads(result.out)["problems"] if one["breaks_training"]
    }
    assert found == {("x.xml", "missing_annotation"), ("x.jpg", "missing_image")}


def test_nothing_to_divide(dataset):
    for path in (dataset / "Annotations").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"Annotations: holds no XML file"):
        VOCDataModule(str(dataset), val_fraction=0.5)
