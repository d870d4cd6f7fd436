"""Gradient norms, numbers of samples, recall by level and size, and their pages, against values found otherwise."""

import re
from contextlib import closing
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.plugins.custom_scalar import layout_pb2
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig
from detector.image_batch import to_original
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.step_record import ask
from detector.training.callbacks.gradient_norms import GradientNorms
from detector.training.callbacks.inside_steps import InsideSteps
from detector.training.callbacks.recall_details import RecallDetails
from detector.training.callbacks.sample_counts import SampleCounts
from detector.training.callbacks.scalar_pages import PAGES, ScalarPages
from detector.training.callbacks.throughput import Throughput
from tests.detector.training.callbacks.test_anchor_telemetry import FPN, module, train, values
from tests.detector.training.small_detector import BATCH

LEVELS = AnchorConfig([[1, 2], [2, 3], [4, 5], [6, 7], [8, 9]], [0.5, 3], straddling="keep")


class Gradients(pl.Callback):
    """Keeps the gradients of each step before and after they are clipped."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[float] = []

    @staticmethod
    def of(pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
        return {n: p.grad.double().clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(self.of(pl_module))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if gradients := self.of(pl_module):
            self.after.append(float(torch.cat([one.flatten() for one in gradients.values()]).norm()))


@pytest.mark.parametrize("scheme", ["joint", "alternating"])
def test_gradient_norms_are_those_before_clipping(scheme: str, tmp_path: Path) -> None:
    kept = Gradients()
    events = train(module(training_scheme=scheme), tmp_path, GradientNorms(2), kept, clip=0.01)
    parts = ("backbone", "rpn", "roi_heads.box_head", "roi_heads.predictor", "")
    for part in parts:
        tag = f"weights/gradient_norm/{part.split('.')[-1] or 'all'}"
        expected = {}
        for step in (1, 3, 5):
            own = [one.flatten() for name, one in kept.before[step].items() if part in name]
            expected |= {step: float(torch.cat(own).norm())} if own else {}
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx(expected, rel=1e-5), tag
        assert len(expected) == 3 if scheme == "joint" or not part else len(expected) in (1, 2), tag
    assert max(kept.after) < 0.0101 < min(values(events, "weights/gradient_norm/all"))


class Samples(InsideSteps):
    """Counts the samples of each step by their labels."""

    def __init__(self) -> None:
        super().__init__(1)
        self.counts: list[list[float]] = []

    def see_training(self, trainer, pl_module, record, batch):
        labels = [label for rois in record.sampled_rois for label in rois.labels.tolist()]
        anchors = [(len(drawn.positives), len(drawn.negatives)) for drawn in record.sampled_anchors]
        objects = sum(label > 0 for label in labels)
        self.counts.append([*map(sum, zip(*anchors, strict=True)), objects, len(labels) - objects])


def test_samples_of_an_image(tmp_path: Path) -> None:
    samples = Samples()
    events = train(module(), tmp_path, SampleCounts(1, 3), samples)
    assert len(samples.counts) == 6
    for place, name in enumerate(("rpn_positives", "rpn_negatives", "roi_positives", "roi_negatives")):
        expected = [sum(one[place] for one in samples.counts[start : start + 3]) / 6 for start in (0, 3)]
        assert values(events, f"train_samples/{name}") == pytest.approx(expected) and min(expected) > 0


def test_samples_of_alternating_training(tmp_path: Path) -> None:
    events = train(module(training_scheme="alternating"), tmp_path, SampleCounts(1, 1))
    steps = {tag: len(values(events, tag)) for tag in events.Tags()["scalars"] if tag.startswith("train_samples/")}
    assert sum(steps.values()) == 12, "each of six steps has one pair"
    assert set(steps) == {
        f"train_samples/{part}_{kind}" for part in ("rpn", "roi") for kind in ("positives", "negatives")
    }


def test_recall_by_level_and_size(tmp_path: Path) -> None:
    options = {"rpn": RPNConfig(post_nms_test=200, nms_iou=0.9), "roi": RoIConfig(samples_per_image=16)}
    detector = module(backbone=FPN, anchors=LEVELS, **options)
    events = train(detector, tmp_path, RecallDetails())
    with closing(ask()) as record, torch.no_grad():
        detector.eval().model(BATCH[0])
    assert record.batch is not None
    starts = [0, *torch.tensor([len(level) for level in record.level_anchors]).cumsum(0).tolist()]
    covered = torch.zeros(5, 3)
    areas = torch.cat([(own["boxes"][:, 2:] - own["boxes"][:, :2]).prod(1) for own in BATCH[1]])
    for image, place in ((0, 0), (0, 1), (1, 2)):
        found, objects = record.proposals[image], BATCH[1][image]["boxes"]
        for kept in found.kept.tolist():
            box = to_original(found.boxes[kept][None], record.batch, image)
            level = max(i for i, start in enumerate(starts) if int(found.anchors[kept]) >= start)
            covered[level, place] += float(box_iou(box, objects)[0, place - 2 * image]) >= 0.5
    levels = [values(events, f"val_recall/stride{2**power}")[-1] for power in (2, 3, 4, 5, 6)]
    assert levels == pytest.approx((covered > 0).float().mean(dim=1).tolist())
    assert max(levels) > 0
    small = areas <= 32**2
    assert 0 < int(small.sum()) < 3
    for name, rows in (("small", small), ("medium", ~small)):
        assert values(events, f"val_recall/{name}")[-1] == pytest.approx(
            float((covered[:, rows] > 0).any(0).float().mean())
        )
    assert "val_recall/large" not in events.Tags()["scalars"], "there are no such objects"


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain, watched = module(backbone=FPN, anchors=LEVELS), module(backbone=FPN, anchors=LEVELS)
    train(plain, tmp_path / "plain")
    train(watched, tmp_path / "watched", GradientNorms(1), SampleCounts(1, 1), RecallDetails(), ScalarPages())
    ours = watched.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())


def test_all_are_switched_off(tmp_path: Path) -> None:
    off = (GradientNorms(0), SampleCounts(0), RecallDetails(False, False), ScalarPages({}))
    assert train(module(), tmp_path / "off", *off).Tags() == train(module(), tmp_path / "none").Tags()


def test_pages_hold_every_curve_that_they_name(tmp_path: Path) -> None:
    seen = (GradientNorms(1), SampleCounts(1, 1), RecallDetails(), ScalarPages(), Throughput(1))
    events = train(module(backbone=FPN, anchors=LEVELS), tmp_path, *seen)
    (written,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    assert [page.title for page in layout.category] == list(PAGES)
    tags = events.Tags()["scalars"]
    empty = {
        chart.title
        for page in layout.category
        for chart in page.chart
        if not any(re.match(one, tag) for one in chart.multiline.tag for tag in tags)
    }
    # `learning rate` is of another callback; all of the objects are small or medium.
    assert empty == {"learning rate", "GPU utilisation"}
    recall = next(page for page in layout.category if page.title == "Recall of proposals")
    (levels,) = [chart for chart in recall.chart if chart.title == "by feature level"]
    assert len([tag for tag in tags if any(re.match(one, tag) for one in levels.multiline.tag)]) == 5
