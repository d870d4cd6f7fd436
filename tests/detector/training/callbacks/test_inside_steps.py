"""Which steps and batches a callback sees inside of, in a real training."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from detector.step_record import StepRecord, asking
from detector.training.callbacks.inside_steps import InsideSteps
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL


class Looks(InsideSteps):
    """Notes what it sees, and where others would see something."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.trained: list[tuple[int, int, int]] = []
        self.validated: list[int] = []
        self.open: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.open.append(len(asking()))

    def see_training(self, trainer, pl_module, record: StepRecord, batch: Any) -> None:
        self.trained.append((trainer.global_step, len(record.sampled_anchors), len(record.sampled_rois)))

    def wants_validation_batch(self, trainer, batch: Any) -> bool:
        return int(batch[1][0]["image_id"]) == 1

    def see_validation(self, trainer, pl_module, record: StepRecord, batch: Any) -> None:
        self.validated += [int(target["image_id"]) for target in batch[1]]
        assert len(record.proposals) == len(record.detections) == 1 and record.sampled_rois == ()


def train(callback: pl.Callback, scheme: Any = "joint", **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    module = FasterRCNNModule(["cat", "dog"], SMALL, **OPTIONS, training_scheme=scheme)
    images, targets = BATCH
    single = [
        ([image], [target | {"image_id": i}]) for i, (image, target) in enumerate(zip(images, targets, strict=True))
    ]
    load = {"batch_size": None, "collate_fn": lambda batch: batch}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader([BATCH] * 8, **load), DataLoader(single, **load))
    return trainer


@pytest.mark.parametrize(
    ("every", "accumulated", "seen", "open_records"),
    [
        (3, 1, [(3, 2, 2), (6, 2, 2)], [0, 0, 1, 0, 0, 1, 0, 0]),
        (3, 2, [(2, 2, 2), (3, 2, 2)], [0, 0, 1, 0]),  # each batch of the third optimiser step
        (0, 1, [], [0] * 8),
    ],
)
def test_every_nth_step(every: int, accumulated: int, seen: list[Any], open_records: list[int]) -> None:
    looks = Looks(every)
    train(looks, accumulate_grad_batches=accumulated)
    assert looks.trained == seen
    assert looks.open == open_records
    assert looks.validated == [1]  # not the first image, nor the sanity check
    assert asking() == ()


def test_alternating_training() -> None:
    looks = Looks(2)
    train(looks, "alternating")
    assert looks.trained == [(2, 2, 0), (4, 0, 2), (6, 2, 0), (8, 0, 2)]


def test_a_step_that_fails_leaves_no_record_open() -> None:
    class Fails(Looks):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert len(asking()) == 1
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(Fails(1))
    assert asking() == ()
