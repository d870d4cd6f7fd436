"""What becomes of each anchor shape, counted a second time in plain Python, and as TensorBoard shows it."""

import io
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.image_batch import ImageConfig, to_original
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.step_record import StepRecord, ask
from detector.training.callbacks.anchor_telemetry import AnchorTelemetry, shape_names
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL

FPN = BackboneConfig("resnet18_fpn", weights=None, frozen_stages=0, norm="batch", fpn_channels=16, box_head_channels=32)
# The last scale is 800 pixels: of images of 64 x 96 pixels no object is matched by it.
ANCHORS = AnchorConfig([2, 50], [0.5, 3], straddling="keep")
VALIDATION = [target | {"image_id": torch.tensor(i)} for i, target in enumerate(BATCH[1])]


def module(**options: Any) -> FasterRCNNModule:
    torch.manual_seed(0)
    return FasterRCNNModule(["cat", "dog"], **{"backbone": SMALL} | OPTIONS | {"anchors": ANCHORS} | options)


def train(
    detector: FasterRCNNModule, folder: Path, *callbacks: pl.Callback, clip: float | None = None, epochs: int = 2
) -> EventAccumulator:
    """Epochs of three steps, each validated on the images that are trained on."""
    load: Any = {"batch_size": None, "collate_fn": lambda batch: batch}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=TensorBoardLogger(str(folder), "", ""), callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=clip,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(detector, DataLoader([BATCH] * 3, **load), DataLoader([(BATCH[0], VALIDATION)], **load))
    return EventAccumulator(str(folder), {"images": 0}).Reload()


def shape_by_sides(box: list[float], anchors: AnchorConfig, level: int, levels: int) -> int:
    """The place of an anchor's shape, from its sides."""
    width, height = box[2] - box[0], box[3] - box[1]
    names = anchors.shapes_of_level(level)
    apart = [abs(16 * s * r**0.5 - height) + abs(16 * s / r**0.5 - width) for s, r in names]
    assert min(apart) < 1e-2
    return level * len(names) + int(np.argmin(apart))


@pytest.mark.parametrize("order", ["ratio_major", "scale_major"])
def test_sums_equal_plain_counts(order: Any) -> None:
    anchors = AnchorConfig([[1, 2], [2, 3], [4, 5], [6, 7], [8, 9]], [0.5, 3], order=order)
    detector = module(backbone=FPN, anchors=anchors)
    with closing(ask()) as record:
        detector.model.losses(*BATCH)
    sums = AnchorTelemetry().sums_of(detector, record)
    level = [i for i, level in enumerate(record.level_anchors) for _ in level]
    shape = [shape_by_sides(box, anchors, level[i], 5) for i, box in enumerate(record.anchors.tolist())]
    counts: list[Counter[int]] = [Counter() for _ in range(6)]
    for found, drawn, proposals in zip(record.anchor_matches, record.sampled_anchors, record.proposals, strict=True):
        for index, (kind, iou) in enumerate(zip(found.kind.tolist(), found.iou.tolist(), strict=True)):
            counts[0][shape[index]] += kind == 1
            counts[1][shape[index]] += kind == 1 and iou < 0.7
        for index in drawn.negatives.tolist():
            counts[2][shape[index]] += 1
        for place in proposals.kept.tolist():
            x1, y1, x2, y2 = proposals.boxes[place].tolist()
            for row, value in ((3, 1), (4, x2 - x1), (5, y2 - y1)):
                counts[row][shape[int(proposals.anchors[place])]] += value  # type: ignore[assignment]
    expected = torch.tensor([[float(count[place]) for place in range(20)] for count in counts])
    torch.testing.assert_close(sums, expected)
    assert all(sums[row].count_nonzero() >= 3 for row in (0, 2, 3))
    assert 0 < float(sums[1].sum()) <= float(sums[0].sum())


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[FasterRCNNModule, EventAccumulator]:
    detector, telemetry = (
        module(
            roi=RoIConfig(samples_per_image=16, score_threshold=0.0, nms_iou=0.9),
            rpn=RPNConfig(post_nms_train=30, post_nms_test=200, nms_iou=0.9),
        ),
        AnchorTelemetry(1, 2),
    )
    telemetry.expected = [0.5, 0.0, 0.5, 0.0]
    return detector, train(detector, tmp_path_factory.mktemp("run"), telemetry)


def values(events: EventAccumulator, tag: str) -> list[float]:
    return [event.value for event in events.Scalars(tag)]


def test_scalars_of_the_steps_since_the_last_log(logged: tuple[FasterRCNNModule, EventAccumulator]) -> None:
    detector, events = logged
    names = shape_names(detector.model.rpn)
    assert names == [f"stride8_scale{scale}_ratio{ratio}" for ratio in (0.5, 3) for scale in (2, 50)]
    for quantity in ("positives", "negatives", "proposals"):
        rows = np.array([values(events, f"train_anchors/{quantity}/{name}") for name in names])
        assert rows.shape == (4, 3)
        assert rows.sum(axis=0) == pytest.approx([1, 1, 1], abs=1e-5)
    steps = [event.step for event in events.Scalars(f"train_anchors/positives/{names[0]}")]
    assert steps == [1, 3, 5]
    # The same two images in every step: equal shares of positives.
    first = values(events, f"train_anchors/positives/{names[0]}")
    assert first == pytest.approx([first[0]] * 3) and first[0] > 0
    for name in names:  # 0 exactly where nothing survives NMS
        proposals = np.array(values(events, f"train_anchors/proposals/{name}"))
        for side, longest in (("width", 96), ("height", 64)):
            sides = np.array(values(events, f"train_anchors/{side}/{name}"))
            assert ((sides > 0) == (proposals > 0)).all() and sides.max() <= longest


def test_a_dead_anchor_is_0_and_marked(logged: tuple[FasterRCNNModule, EventAccumulator]) -> None:
    _, events = logged
    for ratio in (0.5, 3):
        dead = f"stride8_scale50_ratio{ratio}"
        assert values(events, f"train_anchors/positives/{dead}") == [0, 0, 0]
        assert values(events, f"train_anchors/rescued/{dead}") == [0, 0, 0]
    assert values(events, "train_anchors/dead") == [2, 2]
    pictures = events.Images("train_anchors/table")
    assert [picture.step for picture in pictures] == [3, 6]
    pixels = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)).convert("RGB")).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)
    marked = [bool(red[44 + 24 * row : 68 + 24 * row, :150].any()) for row in range(4)]
    assert marked == [False, True, False, True]


def test_true_positives_by_hand(logged: tuple[FasterRCNNModule, EventAccumulator]) -> None:
    """Of each object the best detection of its class at an IoU of 0.5 or more; its RoI was made by an anchor."""
    detector, events = logged
    names = shape_names(detector.model.rpn)
    with closing(ask()) as record:
        detector.eval().model(BATCH[0])
    shapes = Counter(true_positives(record))
    total = shapes.total()
    assert total >= 2
    found = [values(events, f"val_anchors/true_positives/{name}") for name in names]
    assert [row[-1] for row in found] == pytest.approx([shapes[place] / total for place in range(4)])
    assert len(found[0]) == 2


def test_free_sizes_name_their_shapes() -> None:
    sizes = [[[10.0 + level, 4.5]] for level in range(5)]
    detector = module(backbone=FPN, anchors=AnchorConfig(sizes=sizes))
    names = [f"stride{4 * 2**level}_{10 + level}x4.5" for level in range(5)]
    assert shape_names(detector.model.rpn) == names


def true_positives(record: StepRecord) -> list[int]:
    assert record.batch is not None
    shapes = []
    for image, (found, target) in enumerate(zip(record.detections, BATCH[1], strict=True)):
        boxes, taken = to_original(found.boxes, record.batch, image), set()
        for place in range(len(boxes)):  # by descending score
            iou = box_iou(boxes[place][None], target["boxes"])[0]
            best = int(iou.argmax())
            if int(found.labels[place]) == 1 and iou[best] >= 0.5 and best not in taken:
                taken.add(best)
                proposals = record.proposals[image]
                anchor = proposals.anchors[proposals.kept[found.rois[place]]]
                shapes.append(int(record.shape_of_anchor[anchor]))
    return shapes


def test_training_is_the_same_to_the_bit_with_telemetry(tmp_path: Path) -> None:
    plain, watched = module(), module()
    train(plain, tmp_path / "plain")
    train(watched, tmp_path / "watched", AnchorTelemetry(1, 2))
    ours = watched.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())


def test_telemetry_is_switched_off_by_0(tmp_path: Path) -> None:
    tags = train(module(), tmp_path, AnchorTelemetry(0)).Tags()
    assert tags["images"] == [] and not [tag for tag in tags["scalars"] if "anchors" in tag]


def test_several_views_and_missing_parts(tmp_path: Path) -> None:
    """With test-time augmentation a detection has no single anchor; in alternating training steps lack parts."""
    views = ImageConfig([64], 96, pad_multiple=8, test_flip=True)
    tags = train(module(image=views, training_scheme="alternating"), tmp_path, AnchorTelemetry(1, 1)).Tags()
    assert {tag.split("/")[1] for tag in tags["scalars"] if tag.startswith("train_anchors/")} == {
        *("positives", "rescued", "negatives", "proposals", "width", "height", "dead")
    }
    assert not [tag for tag in tags["scalars"] if tag.startswith("val_anchors/")]
