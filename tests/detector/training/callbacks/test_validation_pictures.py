"""Which pictures real trainings log, at which validations, and that they change nothing."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from detector.metrics.error_breakdown import break_down_errors, costs_of_mistakes
from detector.training.callbacks.detection_images import DetectionImages
from detector.training.callbacks.inside_images import InsideImages
from detector.training.callbacks.mistakes import draw_mistakes
from detector.training.callbacks.validation_pictures import DrawnValidations
from detector.training.callbacks.worst_images import WorstImages
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL, image


class Images(Dataset[Any]):
    """Three images, of which the last has no object."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        target = BATCH[1][index] if index < 2 else {name: part[:0] for name, part in BATCH[1][0].items()}
        return image(index), target | {"image_id": torch.tensor(index), "file_name": f"{index}.jpg"}


class Takes(CSVLogger):
    """Takes pictures as Weights & Biases does."""

    def __init__(self) -> None:
        super().__init__("unused")
        self.taken: list[tuple[str, int]] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None: ...

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.taken.append((key, step or 0))


def train(tmp_path: Any, callbacks: list[pl.Callback], logger: Any, epochs: int = 3) -> FasterRCNNModule:
    torch.manual_seed(0)
    module = FasterRCNNModule(["cat", "dog"], SMALL, **OPTIONS)
    load: dict[str, Any] = {"collate_fn": lambda samples: tuple(map(list, zip(*samples, strict=True)))}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([BATCH] * 2, batch_size=None), DataLoader(Images(), batch_size=2, **load))
    return module


@pytest.mark.parametrize(
    ("images", "epochs", "options", "expected"),
    [
        (3, 5, {}, [1, 5]),  # 1000 images are never reached
        (250, 10, {}, [1, 5, 9, 10]),
        (5000, 10, {}, list(range(1, 11))),
        (5000, 25, {}, [1, 4, 7, 10, 13, 16, 19, 22, 25]),  # ten at most
        (5000, 25, {"check_val_every_n_epoch": 5}, [1, 2, 3, 4, 5]),
        (3, 10, {"check_val_every_n_epoch": 3}, [1, 3]),
        (3, 2, {"val_check_batch": 2}, [1, 6]),  # of seven batches
        (3, 4, {"every": 2}, [1, 3, 4]),
        (3, 4, {"val_check_batch": None}, [1]),  # after minutes: the last is not known
        (400, math.inf, {}, [1, 4, 7, 10]),  # endless
    ],
)
def test_which_validations_are_drawn(images, epochs, options, expected) -> None:
    """Epochs of seven batches."""
    every, batches = options.get("check_val_every_n_epoch", 1), options.get("val_check_batch", 7)
    trainer: Any = SimpleNamespace(
        sanity_checking=True, val_check_batch=batches, check_val_every_n_epoch=every, accumulate_grad_batches=1,
        estimated_stepping_batches=7 * epochs, global_step=0, state=SimpleNamespace(fn="fit"),
        val_dataloaders=SimpleNamespace(dataset=range(images)),
    )  # fmt: skip
    drawn = DrawnValidations(options.get("every"))
    drawn.begin(trainer)
    assert not drawn.due
    trainer.sanity_checking, found, validation = False, [], 0
    for step in range(1, 7 * (10 if epochs == math.inf else epochs) + 1):
        in_epoch = (step - 1) % 7 + 1
        if (-(-step // 7)) % every == 0 and in_epoch % (batches or 7) == 0:
            trainer.global_step, validation = step, validation + 1
            drawn.begin(trainer)
            found += [validation] * drawn.due
    assert found == expected


def test_every_second_validation(tmp_path) -> None:
    logger = Takes()
    callbacks = [DetectionImages(2, 0.0, 2), InsideImages(1, every_n_validations=2), WorstImages(1, 2)]
    with_pictures = train(tmp_path, callbacks, logger)
    of_one = [
        *(f"val_{kind}/{number}.jpg" for number in (0, 1) for kind in ("images", "mistakes")),
        *(f"val_inside/0.jpg/{what}" for what in ("anchors", "proposals", "rois")),
        "val_worst/1",
    ]
    assert sorted(logger.taken) == sorted((name, step) for step in (2, 6) for name in of_one)
    without = train(tmp_path, [], False)
    for one, other in zip(with_pictures.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"images": 0}, {}])
def test_nothing_is_drawn_where_nothing_takes_it(tmp_path, monkeypatch, options) -> None:
    for module in ("detection_images", "inside_images", "worst_images", "validation_pictures"):
        path = f"detector.training.callbacks.{module}"
        for function in ("sketch", "draw_mistakes", "losses_of_image", "break_down_errors"):
            monkeypatch.setattr(f"{path}.{function}", lambda *_: pytest.fail("was drawn"), raising=False)
    logger = Takes() if options else False
    train(tmp_path, [DetectionImages(**options), InsideImages(**options), WorstImages(**options)], logger, epochs=1)


class Reasons(WorstImages):
    """Keeps all that is known at the end of a validation."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self.split = pl_module.val_ap.evaluated()


def test_the_worst_come_first_with_their_reasons(tmp_path, monkeypatch) -> None:
    """Both costs and reasons of an image are those of the whole split, and read from its own detections."""
    titles: list[str] = []

    def seen(*args: Any) -> Any:
        titles.append(args[-1])
        return draw_mistakes(*args)

    monkeypatch.setattr("detector.training.callbacks.worst_images.draw_mistakes", seen)
    reasons, logger = Reasons(3), Takes()
    train(tmp_path, [reasons], logger, epochs=1)
    errors = break_down_errors(reasons.split.detections, reasons.split.ground_truth, [1, 2])
    cost, object_cost = costs_of_mistakes(errors.matched, reasons.split.ground_truth)
    expected = {
        f"{index}.jpg": cost[reasons.split.detections.image_id == index].sum()
        + object_cost[reasons.split.ground_truth.image_id == index].sum()
        for index in range(3)
    }
    found = {title.split(":")[0]: float(title.split("costs ")[1].split(" of")[0]) for title in titles}
    assert found == {name: pytest.approx(value, abs=1e-4) for name, value in expected.items() if value > 0}
    assert len(found) >= 2 and list(found.values()) == sorted(found.values(), reverse=True)
    assert [name for name, _ in logger.taken] == [f"val_worst/{rank}" for rank in range(1, len(found) + 1)]
    for title in titles:  # the parts by kind add up to the whole
        parts = [float(part.split()[-1]) for part in title.split("; ")[1].split(", ")]
        assert sum(parts) == pytest.approx(found[title.split(":")[0]], abs=5e-4)


class Blind(pl.Callback):
    """Lets nothing be detected."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        heads = pl_module.model.roi_heads
        heads.config = replace(heads.config, score_threshold=1.0)


def test_without_detections_the_worst_are_those_with_objects(tmp_path) -> None:
    logger = Takes()
    train(tmp_path, [Blind(), WorstImages(3)], logger, epochs=1)
    assert [name for name, _ in logger.taken] == ["val_worst/1", "val_worst/2"]
