import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.checks import clip_box
from datamodules.voc.format import Annotation, VOCObject, read_annotation, read_split, write_annotation
from detector.errors import InputError

HAND_WRITTEN = """<annotation>
  <folder>VOC2012</folder>
  <filename>2008_000008.jpg</filename>
  <size><width>500</width><height>442</height><depth>3</depth></size>
  <object>
    <name>horse</name><pose>Left</pose><truncated>0</truncated><difficult>1</difficult>
    <part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>10</xmax><ymax>10</ymax></bndbox></part>
    <bndbox><ymin>87</ymin><xmax>420</xmax><xmin>53</xmin><ymax>442</ymax></bndbox>
  </object>
  <object>
    <name>person</name>
    <bndbox><xmin>1</xmin><ymin>1.5</ymin><xmax>1</xmax><ymax>45.25</ymax></bndbox>
  </object>
</annotation>"""


def _write(tmp_path, text, name="a.xml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def _object(box="<xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>", extra="", name="<name>cat</name>"):
    good = "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object>"
    bndbox = f"<bndbox>{box}</bndbox>" if box is not None else ""
    return f"<annotation>{good}<object>{name}{extra}{bndbox}</object></annotation>"


def test_coordinates_lose_one_at_the_top_left_only(tmp_path):
    annotation = read_annotation(_write(tmp_path, HAND_WRITTEN))
    assert annotation == Annotation(
        file_name="2008_000008.jpg",
        width=500,
        height=442,
        objects=(
            VOCObject("horse", (52.0, 86.0, 420.0, 442.0), difficult=True, truncated=False, pose="Left"),
            VOCObject("person", (0.0, 0.5, 1.0, 45.25)),
        ),
        depth=3,
        folder="VOC2012",
    )


def test_written_file_holds_one_based_inclusive_numbers(tmp_path):
    path = tmp_path / "a.xml"
    write_annotation(Annotation("a.jpg", 10, 8, (VOCObject("cat", (0.0, 3.0, 1.0, 8.0)),)), path)
    text = "".join(path.read_text().split())
    assert "<xmin>1</xmin><ymin>4</ymin><xmax>1</xmax><ymax>8</ymax>" in text


_low = st.one_of(st.just(0.0), st.integers(-3, 5000).map(float), st.floats(-100, 5000, allow_subnormal=True))
_side = st.one_of(st.integers(2, 900).map(float), st.floats(1.001, 900))
_names = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable() and text == text.strip())


@st.composite
def _objects(draw):
    x, y = draw(_low), draw(_low)
    box = (x, y, x + draw(_side), y + draw(_side))
    if draw(st.booleans()):  # one pixel at a whole corner
        column, row = draw(st.integers(0, 4000)), draw(st.integers(0, 4000))
        box = (float(column), float(row), column + 1.0, row + 1.0)
    return VOCObject(draw(_names), box, draw(st.booleans()), draw(st.booleans()), draw(_names))


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        Annotation,
        file_name=_names,
        width=st.integers(0, 9000),
        height=st.integers(0, 9000),
        objects=st.lists(_objects(), max_size=4).map(tuple),
        depth=st.sampled_from([1, 3]),
        folder=_names,
    )
)
def test_write_then_read_is_the_identity(tmp_path_factory, annotation):
    path = tmp_path_factory.getbasetemp() / "identity.xml"
    write_annotation(annotation, path)
    assert read_annotation(path) == annotation


@pytest.mark.parametrize(("width", "height"), [(500, 375), (1, 1), (3, 7)])
def test_boxes_at_all_corners_come_back(tmp_path, width, height):
    right, bottom = float(width), float(height)
    boxes = [
        (0.0, 0.0, 1.0, 1.0),
        (right - 1, 0.0, right, 1.0),
        (0.0, bottom - 1, 1.0, bottom),
        (right - 1, bottom - 1, right, bottom),
        (0.0, 0.0, right, bottom),
    ]
    annotation = Annotation("a.jpg", width, height, tuple(VOCObject("cat", box) for box in boxes))
    write_annotation(annotation, tmp_path / "a.xml")
    assert read_annotation(tmp_path / "a.xml") == annotation
    for item in annotation.objects:
        assert clip_box(item.box, (width, height)) == item.box


@pytest.mark.parametrize("value", ["1e10", "1000000001", "-1e300", "9" * 500])
def test_numbers_that_are_no_coordinates_are_refused(tmp_path, value):
    box = f"<xmin>1</xmin><ymin>2</ymin><xmax>{value}</xmax><ymax>4</ymax>"
    with pytest.raises(InputError, match=r"object 1 \(cat\) has xmax '.{1,60}'; a number of pixels") as caught:
        read_annotation(_write(tmp_path, _object(box=box)))
    assert len(str(caught.value)) < len(str(tmp_path)) + 150
    with pytest.raises(InputError, match="<size> has width"):
        read_annotation(_write(tmp_path, f"<annotation><size><width>{value}</width></size></annotation>"))


def test_oversized_files_are_not_parsed(tmp_path):
    with pytest.raises(InputError, match="larger than 4 MB"):
        read_annotation(_write(tmp_path, "<annotation>" + " " * 4_000_000 + "</annotation>"))


def test_what_may_be_missing_gets_defaults(tmp_path):
    annotation = read_annotation(_write(tmp_path, _object(), name="img.v2.xml"))
    assert (annotation.width, annotation.height, annotation.depth) == (0, 0, 3)
    assert annotation.file_name == "img.v2.jpg"
    assert annotation.objects[1] == VOCObject("cat", (0.0, 1.0, 3.0, 4.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object></annotation>", ["not well-formed"]),
        ("", ["not well-formed"]),
        ("<html></html>", ["<html>", "<annotation>"]),
        ("<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>&x;</annotation>", ["entities"]),
        (_object(box=None), ["object 1", "cat", "<bndbox>"]),
        (_object(name=""), ["object 1", "<name>"]),
        (_object(box="<xmin>1</xmin><ymin>2</ymin><ymax>4</ymax>"), ["object 1", "<xmax>"]),
        (_object(box="<xmin>one</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>"), ["object 1", "xmin 'one'"]),
        (_object(box="<xmin>1</xmin><ymin>nan</ymin><xmax>3</xmax><ymax>4</ymax>"), ["object 1", "ymin 'nan'"]),
        (_object(box="<xmin>1</xmin><ymin>2</ymin><xmax>1e999</xmax><ymax>4</ymax>"), ["object 1", "xmax"]),
        (_object(box="<xmin>4</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>"), ["object 1", "xmax 3", "xmin 4"]),
        (_object(box="<xmin>1</xmin><ymin>4.5</ymin><xmax>3</xmax><ymax>4</ymax>"), ["object 1", "ymin 4.5"]),
        (_object(extra="<difficult>maybe</difficult>"), ["object 1", "difficult 'maybe'"]),
        ("<annotation><size><width>wide</width></size></annotation>", ["width 'wide'"]),
    ],
)
def test_bad_files_are_named_with_the_object_in_one_line(tmp_path, text, words):
    path = _write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_annotation(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message


@pytest.mark.parametrize(
    ("text", "expected"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False), ("", False)]
)
def test_flags_in_words_and_numbers(tmp_path, text, expected):
    path = _write(tmp_path, _object(extra=f"<difficult>{text}</difficult><truncated>{text}</truncated>"))
    item = read_annotation(path).objects[-1]
    assert (item.difficult, item.truncated) == (expected, expected)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.xml: no such annotation"):
        read_annotation(tmp_path / "gone.xml")


@pytest.mark.parametrize(
    "item",
    [
        VOCObject("cat", (0.0, 0.0, 0.5, 9.0)),
        VOCObject("cat", (0.0, 0.0, float("nan"), 9.0)),
        VOCObject("", (0.0, 0.0, 5.0, 9.0)),
        VOCObject("a\x00b", (0.0, 0.0, 5.0, 9.0)),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, item):
    with pytest.raises(InputError, match=r"a\.xml"):
        write_annotation(Annotation("a.jpg", 10, 10, (item,)), tmp_path / "a.xml")
    assert not (tmp_path / "a.xml").exists()


def test_split_keeps_names_of_plain_and_class_split_files(tmp_path):
    path = _write(tmp_path, "000005  1\n\n000007 -1\n2008_000008\n   \n000009  0\n", "cat_train.txt")
    assert read_split(path) == ["000005", "000007", "2008_000008", "000009"]


def test_split_errors_name_the_file(tmp_path):
    _write(tmp_path, "a\n", "val.txt")
    _write(tmp_path, "a\n", "trainval.txt")
    with pytest.raises(InputError, match=r"train\.txt: no such split file; .* holds trainval, val$"):
        read_split(tmp_path / "train.txt")
    with pytest.raises(InputError, match=r"empty\.txt: the split file is empty"):
        read_split(_write(tmp_path, "\n  \n", "empty.txt"))
    with pytest.raises(InputError, match=r"twice\.txt: names the image b more than once"):
        read_split(_write(tmp_path, "a\nb\nc\nb\n", "twice.txt"))
