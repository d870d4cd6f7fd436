"""Large images are detected tile by tile: every object once, in pixels of the whole image."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import detector
from detector.errors import InputError
from detector.roi_heads import RoIConfig
from detector.use.tiles import detect_in_tiles, starts


def test_tiles_cover_a_side_and_share_at_least_the_overlap():
    assert starts(500, 640, 0.2) == [0] and starts(640, 640, 0.2) == [0]
    assert starts(641, 640, 0.2) == [0, 1]
    assert starts(1000, 400, 0.25) == [0, 300, 600]
    for side in range(101, 700, 13):
        places = starts(side, 100, 0.3)
        assert places[0] == 0 and places[-1] == side - 100
        assert all(0 < later - earlier <= 71 for earlier, later in pairwise(places))


def test_boxes_of_tiles_are_merged():
    """Tiles at x = 0 and 60, of 100 pixels. An object at 70..90 is whole in both; one at 80..130 is cut in the first,
    and whole in the second; one at 0..160 is cut in both, and nowhere whole; another class stays."""
    found = [
        (
            [[70, 10, 90, 30], [80, 40, 100, 60], [0, 70, 100, 90], [80, 40, 100, 60]],
            [0.8, 0.9, 0.7, 0.6],
            [1, 1, 1, 2],
        ),
        ([[10, 10, 30, 30], [20, 40, 70, 60], [0, 70, 100, 90]], [0.85, 0.5, 0.65], [1, 1, 1]),
    ]
    shapes = []

    def detect(tiles):
        shapes.extend(tuple(tile.shape[1:]) for tile in tiles)
        columns = [tuple(map(torch.tensor, found.pop(0))) for _ in tiles]
        return [{"boxes": boxes.float(), "scores": scores, "labels": labels} for boxes, scores, labels in columns]

    image = torch.zeros(3, 100, 160, dtype=torch.uint8)
    merged = detect_in_tiles(detect, image, 100, 0.4, 2, RoIConfig(nms_iou=0.5))
    rows = {(*box, label) for box, label in zip(merged["boxes"].int().tolist(), merged["labels"].tolist(), strict=True)}
    assert shapes == [(100, 100), (100, 100)]
    assert {(tuple(box), label) for *box, label in rows} == {
        ((70, 10, 90, 30), 1),
        ((80, 40, 130, 60), 1),
        ((0, 70, 100, 90), 1),
        ((60, 70, 160, 90), 1),
        ((80, 40, 100, 60), 2),
    }
    assert merged["scores"].tolist() == pytest.approx([0.85, 0.7, 0.65, 0.6, 0.5])


def test_a_mosaic_of_images_gives_the_objects_of_each(mini_voc):
    """Nine images side by side, too large for the network as one: with tiles most objects are found again."""
    load = detector.load
    checkpoint = "experiments/weights/mini_voc.ckpt"
    root = detector.__path__[0].removesuffix("detector")
    paths = sorted((mini_voc / "JPEGImages").iterdir())[:9]
    canvas = np.full((3 * 200, 3 * 200, 3), 128, np.uint8)
    plain, wanted = load(root + checkpoint, "cpu"), []
    for number, path in enumerate(paths):
        pixels = np.asarray(Image.open(path).convert("RGB"))[:200, :200]
        y, x = 200 * (number // 3), 200 * (number % 3)
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        wanted += [(one.name, *np.add(one.box, (x, y, x, y))) for one in plain(pixels, 0.7)]
    tiled = load(root + checkpoint, "cpu", tile=200, tile_overlap=0.5)

    def share(found: detector.Detections) -> float:
        def is_found(name, *box) -> bool:
            return any(one.name == name and np.abs(np.array(one.box) - box).max() < 12 for one in found)

        return float(np.mean([is_found(*one) for one in wanted]))

    assert len(wanted) > 15 and share(tiled(canvas, 0.3)) > max(0.7, share(plain(canvas, 0.3)) + 0.2)
    assert torch.equal(load(root + checkpoint, "cpu", tile=640)(canvas).boxes, plain(canvas).boxes)


def test_what_is_no_tile(mini_voc):
    from detector.use.tiles import check_tiles

    for tile, overlap, message in ((8, 0.2, "tile 8"), (64, 1.0, "tile_overlap 1.0"), (64, -0.1, "tile_overlap -0.1")):
        with pytest.raises(InputError, match=message):
            check_tiles(tile, overlap)
