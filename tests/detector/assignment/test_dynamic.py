"""Dynamic R-CNN's threshold and beta: by hand, against plain loops, in the RoI heads, and on two processes."""

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from detector.assignment import Around, DynamicMatcher, SimOTAMatcher
from detector.boxes import pairwise_iou
from detector.errors import InputError
from detector.roi_heads import RoIConfig, RoIHeads
from detector.rpn import RPNConfig
from detector.sampling import IGNORED, NEGATIVE, POSITIVE, GroundTruth, SampledRoIs

OBJECT = torch.tensor([[0.0, 0.0, 100.0, 100.0]])


def strips(*heights: float) -> Tensor:
    """Boxes within OBJECT, as wide as it is: their IoU with it is height / 100."""
    return torch.tensor([[0.0, 0.0, 100.0, height] for height in heights])


def objects(count: int) -> GroundTruth:
    return GroundTruth(OBJECT.repeat(count, 1), torch.ones(count, dtype=torch.int64), torch.zeros(count).bool())


def sampled(*shifts: tuple[float, float], background: int = 2) -> SampledRoIs:
    """RoIs of objects with such dx and dy, after some of background."""
    labels = torch.tensor([0] * background + [1] * len(shifts))
    deltas = torch.zeros(len(labels), 4)
    for row, (dx, dy) in enumerate(shifts, start=background):
        deltas[row] = torch.tensor([dx, dy, 9.0, 9.0])
    return SampledRoIs(torch.zeros(len(labels), 4), labels, deltas, torch.arange(len(labels)))


def step(matcher: DynamicMatcher, rois: Sequence[Tensor], drawn: Sequence[SampledRoIs], number: int = 1) -> list[int]:
    """Let a matcher see a step; return the kinds of the first image's RoIs."""
    matches = matcher.of_images(rois, [objects(number)] * len(rois), "drop", [Around()] * len(rois))
    matcher.learn(drawn)
    kinds: list[int] = matches[0].kind.tolist()
    return kinds


def test_by_hand() -> None:
    """The second highest IoUs are 0.6 and 0.8, the mean of these 0.7; the smallest targets are 0.1 and 0.2."""
    matcher = DynamicMatcher(iou_rank=2, target_rank=1, interval=2, background_from=0.1)
    rois = strips(90, 60, 30, 5)
    assert step(matcher, [rois], [sampled((0.2, -0.4), (-0.1, 0.1))]) == [POSITIVE, POSITIVE, NEGATIVE, IGNORED]
    assert matcher.logged() == pytest.approx({"train/roi_positive_iou": 0.4, "train/roi_reg_beta": 1})
    assert step(matcher, [strips(90, 80, 10)], [sampled((0.3, 0.1))]) == [POSITIVE, POSITIVE, NEGATIVE]
    assert matcher.known == pytest.approx((2, 0.7, 0.15))
    assert step(matcher, [rois], [sampled((5.0, 5.0))]) == [POSITIVE, NEGATIVE, NEGATIVE, IGNORED]
    # The second of the next two steps has neither objects nor positives; the last one's IoU is below the first value.
    assert step(matcher, [rois], [sampled()], number=0) == [IGNORED] * 4
    assert matcher.known == pytest.approx((4, 0.6, 1.0))  # and 5 is above the first beta
    for _ in range(2):
        step(matcher, [strips(90, 20)], [sampled((0.0, 0.0))])
    assert matcher.known == pytest.approx((6, 0.4, 1.0))  # a beta of 0 is none


def test_nothing_is_learned_in_validation() -> None:
    matcher = DynamicMatcher(iou_rank=1, interval=1).eval()
    step(matcher, [strips(90, 80)], [sampled((0.1, 0.1))])
    assert matcher.known == pytest.approx((0, 0.4, 1.0))
    step(matcher.train(), [strips(90, 80)], [sampled((0.1, 0.1))])
    assert matcher.known == pytest.approx((1, 0.9, 0.1))


def random_step(number: int, boxes: Callable[..., Tensor]) -> tuple[list[Tensor], list[GroundTruth], list[SampledRoIs]]:
    """Return RoIs, objects and samples of two images."""
    truths = [
        GroundTruth(own, torch.ones(len(own), dtype=torch.int64), torch.zeros(len(own)).bool())
        for own in (boxes(3, number), boxes(2, 50 + number))
    ]
    rois = [torch.cat((boxes(40, 100 + number + image), truths[image].boxes + 3)) for image in range(2)]
    generator = torch.Generator().manual_seed(number)
    drawn = []
    for own in rois:
        labels = torch.randint(0, 3, (len(own),), generator=generator)
        deltas = torch.randn(len(own), 4, generator=generator) * (labels > 0)[:, None]
        drawn.append(SampledRoIs(own, labels, deltas, torch.arange(len(own))))
    return rois, truths, drawn


def test_against_a_transcription(random_boxes: Callable[..., Tensor]) -> None:
    """In plain Python, in the order in which mmdetection's `DynamicRoIHead` goes about it; two images in a step."""
    matcher = DynamicMatcher(iou_rank=4, target_rank=3, interval=3, initial_iou=0.3)
    iou, beta = 0.3, 1.0
    ious: list[float] = []
    targets: list[float] = []
    seen = set()
    for number in range(10):
        rois, truths, drawn = random_step(number, random_boxes)
        assert matcher.known == pytest.approx((number, iou, beta), abs=1e-6)
        matches = matcher.of_images(rois, truths, "drop", [Around()] * 2)
        of_images, positives = [], []
        for own, truth, found, rois_drawn in zip(rois, truths, matches, drawn, strict=True):
            best = pairwise_iou(truth.boxes, own).max(dim=0).values.tolist()
            assert found.kind.tolist() == [POSITIVE if value >= iou else NEGATIVE for value in best]
            of_images.append(sorted(best, reverse=True)[3])
            rows = zip(rois_drawn.labels.tolist(), rois_drawn.deltas.tolist(), strict=True)
            positives += [(abs(delta[0]) + abs(delta[1])) / 2 for label, delta in rows if label > 0]
        matcher.learn(drawn)
        ious.append(statistics.mean(of_images))
        targets.append(sorted(positives)[3 * 2 - 1])
        if len(ious) % 3 == 0:
            iou, beta = max(0.3, statistics.mean(ious)), min(1.0, statistics.median(targets))
            seen.add((iou, beta))
            ious, targets = [], []
    assert len(seen) == 3 and all(iou > 0.3 and beta < 1 for iou, beta in seen)


def test_roi_heads_use_both(heads: Callable[..., RoIHeads], random_boxes: Callable[..., Tensor]) -> None:
    """Their box loss has the beta of now, also that by which the hardest RoIs are found, and is refused without one."""
    matcher = DynamicMatcher(iou_rank=3, interval=1, initial_iou=0.3)
    ours = heads(matcher=matcher, samples_per_image=1000, positive_fraction=1.0, class_agnostic=True)
    assert ours.matcher is not matcher  # a network has its own
    assert {name for name, _ in ours.matcher.named_buffers()} == {"_history", "_values", "_steps"}  # type: ignore[attr-defined]
    used = set()
    for number in range(3):
        rois, truths, _ = random_step(number, random_boxes)
        assert isinstance(ours.matcher, DynamicMatcher)
        _, iou, beta = ours.matcher.known
        used.add((iou, beta))
        drawn = ours.sample_rois(rois, truths, "drop")
        for own, truth in zip(drawn, truths, strict=True):
            best = pairwise_iou(truth.boxes, own.boxes).max(dim=0).values
            assert torch.equal(own.labels > 0, best >= iou)
        labels, targets = (torch.cat([getattr(own, name) for own in drawn]) for name in ("labels", "deltas"))
        deltas = torch.randn(len(labels), 1, 4)
        losses = ours.losses(torch.zeros(len(labels), 4), deltas, drawn)
        expected = F.smooth_l1_loss(deltas[labels > 0, 0], targets[labels > 0], beta=beta, reduction="sum")
        assert float(losses["loss_roi_reg"]) == pytest.approx(float(expected) / len(labels), rel=1e-5)
    assert len(used) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda heads: heads(matcher="dynamic", reg_loss="giou"), "dynamic changes the beta of smooth L1; it needs"),
        (lambda heads: heads(matcher=SimOTAMatcher()), "roi.matcher: SimOTAMatcher looks at what the RPN predicts"),
        (lambda heads: DynamicMatcher(interval=0), "roi.matcher: needs iou_rank, target_rank and interval from 1 on"),
        (
            lambda heads: heads(matcher="dynamic", reg_beta=0),
            "initial_beta .roi.reg_beta by default. above 0",
        ),
        (lambda heads: RPNConfig(matcher="dynamic"), "rpn.matcher"),  # type: ignore[arg-type]
        (lambda heads: RoIConfig(matcher="atss"), "roi.matcher"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_go_together(make: Callable[[Any], Any], message: str, heads: Callable[..., RoIHeads]) -> None:
    with pytest.raises(InputError, match=message):
        make(heads)


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", limit, world_size=2, rank=rank)
    matcher = DynamicMatcher(iou_rank=1, target_rank=1, interval=2)
    step(matcher, [strips(50 + 20 * rank)], [sampled((0.1 + 0.2 * rank, 0.1))])
    step(matcher, [strips(60)], [sampled(*[(0.6, 0.6)] * rank)], number=rank)  # one without objects
    torch.save({"known": matcher.known, "state": matcher.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_processes_have_the_same_values(tmp_path: Path) -> None:
    """IoUs 0.5 and 0.7, then 0.6 of one alone: 0.6. Targets 0.1 and 0.2, then 0.6: the median of 0.15 and 0.6."""
    multiprocessing.set_forkserver_preload(["torch"])
    processes = start_processes(train, (str(tmp_path),), nprocs=2, join=False, start_method="forkserver")
    while not processes.join(timeout=60):
        pass
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["known"] == pytest.approx((2, 0.6, 0.375))
    assert first["known"] == second["known"]
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
