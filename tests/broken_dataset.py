"""A dataset with one of each defect, for the tests of what finds them and of what skips them."""

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageOps

MINI_CLASSES = ["cross", "ellipse", "rectangle", "ring", "star", "triangle"]


@dataclass(frozen=True)
class BrokenDataset:
    """A dataset with one of each defect.

    Attributes:
        root: Its folder.
        problems: All there is to find, as (file relative to `root`, object, kind), with `class_names`.
        stops: Those of them that stop a training on train, validated on val.
        class_names: The six classes that there are, and one that there is not.
        usable: Names of the training images that are left when all these are skipped.
    """

    root: Path
    problems: set[tuple[str, int | None, str]]
    stops: set[tuple[str, int | None, str]]
    class_names: list[str]
    usable: set[str]


def break_dataset(root: Path) -> BrokenDataset:
    """Spoil a copy of `mini_voc`."""
    train, val = ((root / "ImageSets" / "Main" / f"{name}.txt").read_text().split() for name in ("train", "val"))
    found: set[tuple[str, int | None, str]] = set()

    def image(stem: str) -> Path:
        return root / "JPEGImages" / f"{stem}.jpg"

    def annotation(stem: str) -> Path:
        return root / "Annotations" / f"{stem}.xml"

    def expect(path: Path, kind: str, index: int | None = None) -> None:
        found.add((path.relative_to(root).as_posix(), index, kind))

    image(train[0]).write_bytes(image(train[0]).read_bytes()[:-700])
    expect(image(train[0]), "truncated_image")
    image(train[1]).write_text("no image")
    expect(image(train[1]), "unreadable_image")
    image(train[2]).unlink()
    expect(image(train[2]), "missing_image")
    annotation(train[3]).unlink()
    expect(annotation(train[3]), "missing_annotation")
    annotation(train[4]).write_text("<annotation><object></annotation>")
    expect(annotation(train[4]), "unreadable_annotation")

    tree = ElementTree.parse(annotation(train[5]))
    size = tree.find("size")
    assert size is not None
    width, height = (int(size.findtext(key) or 0) for key in ("width", "height"))
    first = tree.find("object")
    assert first is not None
    name = first.findtext("name") or ""
    old = [int(first.findtext(f"bndbox/{key}") or 0) for key in ("xmin", "ymin", "xmax", "ymax")]
    count = len(tree.findall("object"))
    for kind, of_class, box in (
        ("negative_box", "ring", (21, 5, 20, 9)),
        ("box_outside", "ring", (width + 1, 5, width + 30, 9)),
        ("box_partly_outside", "ring", (5, height - 8, 20, height + 9)),
        ("one_pixel_box", "ring", (7, 5, 7, 9)),
        ("duplicate_object", name, old),
        ("unknown_class", "zebra", (3, 5, 14, 11)),
        ("misspelt_class", "Elipse", (3, 5, 15, 12)),
        ("incomplete_object", "ring", ()),
    ):
        node = ElementTree.SubElement(tree.getroot(), "object")
        ElementTree.SubElement(node, "name").text = of_class
        bndbox = ElementTree.SubElement(node, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False):
            ElementTree.SubElement(bndbox, key).text = str(value)
        expect(annotation(train[5]), kind, count)
        count += 1
    tree.write(annotation(train[5]))

    def rewrite(stem: str, pattern: str, by: str, to: str | None = None) -> None:
        text = re.sub(pattern, by, annotation(stem).read_text(), flags=re.DOTALL)
        annotation(to or stem).write_text(text)

    rewrite(train[6], r"<width>\d+</width>", "<width>1234</width>")
    expect(annotation(train[6]), "size_mismatch")
    rewrite(train[7], "<object>.*</object>", "")
    expect(annotation(train[7]), "empty_image")
    rewrite(train[8], "<filename>.*</filename>", "<filename>other.jpg</filename>")
    expect(annotation(train[8]), "file_name_mismatch")
    rewrite(train[9], re.escape(train[9]), val[1], to=val[1])
    with Image.open(image(train[9])) as picture:
        picture.save(image(val[1]), quality=60)
    expect(image(train[9]), "leak_by_content")
    rewrite(train[10], re.escape(train[10]), "zz_copy", to="zz_copy")
    with Image.open(image(train[10])) as picture:
        picture.resize((2 * picture.width, 2 * picture.height)).save(image("zz_copy"))
        ImageOps.flip(picture).save(image("zz_unnamed"))
    rewrite("zz_copy", r"<width>\d+</width><height>\d+</height>|<size>.*</size>", "")
    expect(image("zz_copy"), "duplicate_image")
    rewrite(train[10], re.escape(train[10]), "zz_unnamed", to="zz_unnamed")
    expect(image("zz_unnamed"), "not_in_split")

    splits = root / "ImageSets" / "Main"
    (splits / "train.txt").write_text("\n".join([*train, "zz_copy", "zz_nothere", val[0]]) + "\n")
    expect(image("zz_nothere"), "missing_image")
    expect(annotation("zz_nothere"), "missing_annotation")
    expect(splits / "train.txt", "leak_by_name")
    (splits / "nothing.txt").write_text("\n")
    expect(splits / "nothing.txt", "unusable_split")
    (splits / "twice.txt").write_text(f"{train[9]}\n{train[8]}\n{train[9]}\n")
    expect(splits / "twice.txt", "named_twice")
    expect(root, "class_without_objects")
    harmless = {
        "box_partly_outside",
        "one_pixel_box",
        "duplicate_object",
        "size_mismatch",
        "empty_image",
        "not_in_split",
    }
    harmless |= {"file_name_mismatch", "leak_by_content", "duplicate_image", "class_without_objects"}
    stops = {item for item in found if item[2] not in harmless | {"unusable_split", "named_twice"}}
    return BrokenDataset(root, found, stops, [*MINI_CLASSES, "hexagon"], {*train[5:], "zz_copy"})
