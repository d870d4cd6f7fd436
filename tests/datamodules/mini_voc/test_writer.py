"""MiniVOC: what it promises about its files, its splits and its objects."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.mini_voc import scene as mini_voc_scene
from datamodules.mini_voc import writer as mini_voc
from datamodules.mini_voc.scene import CLASS_NAMES, SceneObject, draw_scene, mask_extent
from datamodules.mini_voc.writer import split_names, write_mini_voc
from datamodules.voc.format import Annotation, read_annotation, read_split
from detector.errors import InputError

IMAGES = 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_voc(tmp_path_factory.mktemp("data") / "mini", images=IMAGES, seed=3)


@pytest.fixture(scope="module")
def labelled(dataset: Path) -> list[Annotation]:
    return [read_annotation(path) for path in sorted((dataset / "Annotations").iterdir())]


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _boxes(labelled: list[Annotation]) -> np.ndarray:
    return np.array([voc_object.box for annotation in labelled for voc_object in annotation.objects])


def test_files_are_a_voc_dataset(dataset: Path, labelled: list[Annotation]) -> None:
    names = [f"mini_{number:06d}" for number in range(1, IMAGES + 1)]
    assert sorted(path.name for path in dataset.iterdir()) == [
        "Annotations",
        "ImageSets",
        "JPEGImages",
        "mini_voc.json",
    ]
    assert sorted(path.name for path in (dataset / "JPEGImages").iterdir()) == [f"{name}.jpg" for name in names]
    assert [annotation.file_name for annotation in labelled] == [f"{name}.jpg" for name in names]
    for annotation in labelled:
        with Image.open(dataset / "JPEGImages" / annotation.file_name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (annotation.width, annotation.height))
        assert annotation.depth == 3


def test_splits_are_60_20_20_and_disjoint(dataset: Path) -> None:
    train, val, trainval, test = (
        read_split(dataset / "ImageSets" / "Main" / f"{split}.txt") for split in ("train", "val", "trainval", "test")
    )
    assert (len(train), len(val), len(test)) == (36, 12, 12)
    assert len({*train, *val, *test}) == IMAGES
    assert trainval == sorted(train + val)


@pytest.mark.parametrize(
    ("images", "counts"), [(5, (3, 1, 1)), (6, (4, 1, 1)), (7, (4, 2, 1)), (9, (5, 2, 2)), (300, (180, 60, 60))]
)
def test_split_counts_for_any_number_of_images(images: int, counts: tuple[int, int, int]) -> None:
    splits = split_names(images)
    assert tuple(len(splits[split]) for split in ("train", "val", "test")) == counts


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    np.random.seed(1)  # the global state must play no part
    first = _contents(write_mini_voc(tmp_path / "a", images=8, seed=5))
    np.random.seed(2)
    assert _contents(write_mini_voc(str(tmp_path / "b"), images=8, seed=5)) == first


def test_a_larger_dataset_begins_with_the_smaller_one(tmp_path: Path) -> None:
    small = _contents(write_mini_voc(tmp_path / "small", images=6, seed=5))
    large = _contents(write_mini_voc(tmp_path / "large", images=11, seed=5))
    for name, content in small.items():
        if name.startswith("ImageSets"):
            assert large[name].startswith(content)
        elif name != mini_voc.MANIFEST:
            assert large[name] == content


def test_another_seed_gives_other_images() -> None:
    for index in range(3):
        one, other = draw_scene(0, index).image, draw_scene(1, index).image
        assert one.shape != other.shape or np.abs(one.astype(int) - other).mean() > 5
    assert not np.array_equal(draw_scene(0, 0).image, draw_scene(0, 1).image)


def test_sizes_ratios_and_classes_are_spread(labelled: list[Annotation]) -> None:
    boxes = _boxes(labelled)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size, ratio = np.sqrt(width * height), height / width
    assert size.max() / size.min() >= 6
    assert ratio.min() < 1 / 2.5
    assert ratio.max() > 2.5
    # Log-uniform: as many objects on either side of the geometric middle, up to what 60 images leave to chance.
    assert 0.3 < (size < math.sqrt(mini_voc_scene.OBJECT_SIZE[0] * mini_voc_scene.OBJECT_SIZE[1])).mean() < 0.7
    assert 0.35 < (ratio > 1).mean() < 0.65
    names = [voc_object.name for annotation in labelled for voc_object in annotation.objects]
    assert set(names) == set(CLASS_NAMES)
    assert len(CLASS_NAMES) == 6
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)
    assert max(names.count(name) for name in CLASS_NAMES) < 0.3 * len(names)


def test_some_objects_are_difficult_or_truncated_but_few(labelled: list[Annotation]) -> None:
    objects = [voc_object for annotation in labelled for voc_object in annotation.objects]
    assert 0 < sum(voc_object.difficult for voc_object in objects) < 0.2 * len(objects)
    assert 0 < sum(voc_object.truncated for voc_object in objects) < 0.2 * len(objects)


def test_boxes_lie_inside_images_of_varied_sizes(labelled: list[Annotation]) -> None:
    for annotation in labelled:
        for x1, y1, x2, y2 in (voc_object.box for voc_object in annotation.objects):
            assert 0 <= x1 < x2 <= annotation.width
            assert 0 <= y1 < y2 <= annotation.height
    sizes = {(annotation.width, annotation.height) for annotation in labelled}
    assert len(sizes) > IMAGES // 2
    assert any(width < height for width, height in sizes)
    assert all(96 <= min(size) <= max(size) <= 176 for size in sizes)


def test_number_of_objects_is_0_to_6() -> None:
    counts = [len(draw_scene(0, index).objects) for index in range(70)]
    assert set(counts) == {0, 1, 2, 3, 4, 5, 6}
    assert counts.count(0) <= 7


def test_annotations_state_the_scene(dataset: Path, labelled: list[Annotation]) -> None:
    for index in range(10):
        scene = draw_scene(3, index)
        stated = [(each.name, each.box, each.difficult, each.truncated) for each in labelled[index].objects]
        assert stated == [(each.name, each.box, each.is_difficult(), each.truncated) for each in scene.objects]
        with Image.open(dataset / "JPEGImages" / f"mini_{index + 1:06d}.jpg") as image:
            assert np.abs(np.asarray(image).astype(int) - scene.image).mean() < 8


def test_visibility_counts_every_later_object() -> None:
    covered = 0
    for index in range(30):
        objects = draw_scene(0, index).objects
        for place, each in enumerate(objects):
            seen = each.mask.astype(np.float64)
            for later in objects[place + 1 :]:
                seen = seen * (1 - later.mask)
            share = seen.sum() / each.full_area
            assert each.visible_share() == pytest.approx(share, abs=1e-4)
            assert share >= 0.12
            covered += share < 0.95 * each.mask.sum() / each.full_area
    assert covered > 5


def _object(side: int, visible_area: float) -> SceneObject:
    """An object of area 100 with a box of the given width, of which `visible_area` pixels can be seen."""
    each = SceneObject("star", np.ones((10, 10), np.float32), None, 100.0, False, (0, 0, side, 20))
    each.visible = np.full((10, 10), visible_area / 100, np.float32)
    return each


@pytest.mark.parametrize(
    ("side", "visible_area", "difficult"), [(14, 36, False), (14, 34, True), (13, 100, True), (14, 100, False)]
)
def test_difficult_is_mostly_covered_or_small(side: int, visible_area: float, difficult: bool) -> None:
    assert _object(side, visible_area).is_difficult() is difficult


def test_mask_extent_in_continuous_coordinates() -> None:
    mask = np.zeros((6, 9), np.float32)
    mask[2:5, 3] = 1.0
    mask[4, 7] = 0.3
    mask[0, 0] = 0.2  # hardly covered: not part of the object
    assert mask_extent(mask) == (3, 2, 8, 5)


@pytest.mark.parametrize("name", CLASS_NAMES)
@pytest.mark.parametrize("form", [(48.0, 20.0), (17.0, 45.0), (12.0, 12.0), (40.0, 40.0)])
def test_box_is_the_extent_of_the_painted_pixels(name: str, form: tuple[float, float]) -> None:
    errors = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        corner = rng.uniform(3, 20, size=2)
        placed = mini_voc_scene._form_at(rng, name, np.array(form), corner, (80, 90))
        assert placed.truncated is False
        # The form was asked to span corner to corner + form; corners of polygons may fade out over a pixel or two.
        np.testing.assert_allclose(placed.box, [*corner, *(corner + form)], atol=2.0)
        grey = np.full((80, 90, 3), 128, np.float32)
        change = np.abs(mini_voc_scene._paint(rng, grey, placed) - grey).max(axis=2)
        rows, columns = np.nonzero(change > 0.2 * change.max())
        painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        errors.append(np.abs(np.subtract(placed.box, painted)))
    assert np.max(errors) <= 1
    assert np.mean(errors, axis=0).max() <= 0.5  # a side that is always one pixel off is wrong


@pytest.mark.parametrize(("name", "centre"), [("ring", 0.0), ("ellipse", 1.0), ("rectangle", 1.0), ("cross", 1.0)])
def test_only_a_ring_has_a_hole(name: str, centre: float) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        # Sides below 24 pixels: always solid, so that the centre tells.
        placed = mini_voc_scene._form_at(rng, name, np.array([22.0, 40.0]), np.array([10.0, 10.0]), (80, 90))
        assert placed.border is None
        assert placed.mask[30, 21] == centre
        assert placed.mask.sum() == pytest.approx(placed.full_area)


def test_box_of_a_cut_object_ends_at_the_border() -> None:
    rng = np.random.default_rng(0)
    placed = mini_voc_scene._form_at(rng, "rectangle", np.array([40.0, 24.0]), np.array([-10.0, 60.0]), (80, 90))
    assert placed.truncated is True
    assert (placed.box[0], placed.box[3]) == (0, 80)
    assert abs(placed.box[2] - 30) <= 1
    assert placed.visible_share() == pytest.approx(30 / 40 * 20 / 24, abs=0.06)


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    out = write_mini_voc(tmp_path / "mini", images=5, seed=0)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_mini_voc(out, images=5, seed=0) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    out = write_mini_voc(tmp_path / "mini", images=5)
    assert len(list((out / "JPEGImages").iterdir())) == 5


def test_foreign_data_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and is no MiniVOC"):
        write_mini_voc(tmp_path, images=5)
    (tmp_path / "mini_voc.json").write_text('["not a manifest"]')
    with pytest.raises(InputError, match="not empty and is no MiniVOC"):
        write_mini_voc(tmp_path, images=5)
    with pytest.raises(InputError, match="is a file"):
        write_mini_voc(tmp_path / "photo.txt", images=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini_voc.json", "photo.txt"]


def test_another_mini_voc_is_not_overwritten(tmp_path: Path) -> None:
    out = write_mini_voc(tmp_path / "mini", images=5, seed=0)
    before = _contents(out)
    for images, seed in ((6, 0), (5, 1)):
        with pytest.raises(InputError, match=r"images 5, seed 0; wanted .*choose another folder or delete"):
            write_mini_voc(out, images=images, seed=seed)
    assert _contents(out) == before
    assert json.loads(before["mini_voc.json"])["images"] == 5


def test_a_damaged_mini_voc_is_reported(tmp_path: Path) -> None:
    out = write_mini_voc(tmp_path / "mini", images=5)
    (out / "JPEGImages" / "mini_000002.jpg").unlink()
    with pytest.raises(InputError, match="4 images and 5 annotations instead of 5 each"):
        write_mini_voc(out, images=5)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(annotation: Annotation, path: Path) -> None:
        if path.stem == "mini_000003":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(mini_voc, "write_annotation", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_mini_voc(tmp_path / "mini", images=5)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_the_same_data_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files = mini_voc._write_files

    def overtaken(root: Path, images: int, seed: int) -> None:
        write_files(root, images, seed)
        monkeypatch.setattr(mini_voc, "_write_files", write_files)
        write_mini_voc(tmp_path / "mini", images, seed)

    monkeypatch.setattr(mini_voc, "_write_files", overtaken)
    write_mini_voc(tmp_path / "mini", images=5)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert len(list((tmp_path / "mini" / "JPEGImages").iterdir())) == 5


@pytest.mark.parametrize(
    ("images", "seed", "message"), [(4, 0, "at least 5.*got 4"), (5, -1, "not be negative, got -1")]
)
def test_bad_arguments(tmp_path: Path, images: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_mini_voc(tmp_path / "mini", images=images, seed=seed)
    assert list(tmp_path.iterdir()) == []
