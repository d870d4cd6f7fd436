"""The losses in validation against those of `FasterRCNN.losses`, image by image."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from detector.faster_rcnn import LOSS_NAMES
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.step_record import ask, asking
from detector.training.callbacks.validation_losses import NAMES, LossesOfImages, ValidationLosses, losses_of_image
from detector.training.lightning_module import FasterRCNNModule
from tests.detector.training.callbacks.test_anchor_telemetry import FPN, VALIDATION, module, train, values
from tests.detector.training.small_detector import BATCH

# More proposals than are sampled, in training more than in evaluation: what is drawn and from how many matters.
OPTIONS: dict[str, Any] = {
    "rpn": RPNConfig(post_nms_train=60, post_nms_test=5, nms_iou=0.9, samples_per_image=16),
    "roi": RoIConfig(samples_per_image=16),
}


def by_hand(detector: FasterRCNNModule, places: list[int]) -> dict[str, float]:
    """The mean over images, each alone, seeded with its id, in evaluation with the training's numbers of proposals."""
    detector.eval()
    detector.model.rpn.training = True
    found = []
    for place in places:
        torch.manual_seed(place)
        with torch.no_grad():
            found.append(detector.model.losses([BATCH[0][place]], [BATCH[1][place]]))
    return {name: float(torch.stack([losses[name] for losses in found]).mean()) for name in found[0]}


@pytest.mark.parametrize(("every", "places"), [(1, [0, 1]), (2, [0])])
def test_losses_of_a_run_equal_those_by_hand(every: int, places: list[int], tmp_path: Path) -> None:
    detector = module(**OPTIONS)
    events = train(detector, tmp_path, ValidationLosses(every))
    expected = by_hand(detector, places)
    assert set(expected) == {*LOSS_NAMES, "loss"} and min(expected.values()) > 0
    for name, value in expected.items():
        logged = values(events, f"val/{name}")
        assert len(logged) == 2 and logged[-1] == pytest.approx(value, rel=1e-5), name
    assert asking() == ()


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain, watched = module(**OPTIONS), module(**OPTIONS)
    before = train(plain, tmp_path / "plain")
    after = train(watched, tmp_path / "watched", ValidationLosses(1))
    ours = watched.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())
    for tag in before.Tags()["scalars"]:
        assert values(after, tag) == pytest.approx(values(before, tag), abs=0, nan_ok=True), tag
    assert set(after.Tags()["scalars"]) - set(before.Tags()["scalars"]) == {f"val/{name}" for name in NAMES}


def test_an_image_of_a_batch_of_several_levels() -> None:
    """Beside an image of the same size, so that neither is padded."""
    detector = module(backbone=FPN, **OPTIONS).eval()
    record = ask()
    with torch.inference_mode():
        detector.model(BATCH[0])
    record.close()
    state = torch.get_rng_state()
    for place, own in enumerate(VALIDATION):
        found = losses_of_image(detector.model, record, place, own)
        assert not detector.model.rpn.training and torch.is_grad_enabled() is not False
        assert {name: float(value) for name, value in found.items()} == pytest.approx(
            by_hand(detector, [place]), rel=1e-4
        )
        detector.eval()
        torch.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


def test_alternating_training_has_the_losses_of_its_networks(tmp_path: Path) -> None:
    """One validation after each of the four steps, the first of which trains the RPN alone."""
    detector = module(training_scheme="alternating", **OPTIONS)
    load: Any = {"batch_size": None, "collate_fn": lambda batch: batch}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, logger=TensorBoardLogger(str(tmp_path), "", ""), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ValidationLosses(1)],
    )  # fmt: skip
    trainer.fit(detector, DataLoader([BATCH] * 2, **load), DataLoader([(BATCH[0], VALIDATION)], **load))
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = {name: [event.step for event in events.Scalars(f"val/{name}")] for name in NAMES}
    assert steps == {name: [1, 3, 5, 7][("roi" in name) :] for name in NAMES}
    assert values(events, "val/loss")[0] == pytest.approx(
        values(events, "val/loss_rpn_cls")[0] + values(events, "val/loss_rpn_reg")[0]
    )
    final = by_hand(detector, [0, 1])
    assert {name: values(events, f"val/{name}")[-1] for name in NAMES} == pytest.approx(final, rel=1e-5)


def test_images_that_a_sampler_repeats_count_once() -> None:
    metric = LossesOfImages()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == {}
    losses = [{name: torch.tensor(value) for name in NAMES} for value in (1.0, 4.0, 9.0)]
    metric.update(losses, [{"image_id": torch.tensor(index)} for index in (7, 3, 7)])
    assert {name: float(value) for name, value in metric.compute().items()} == dict.fromkeys(NAMES, 2.5)


def test_no_losses_where_they_are_switched_off_and_of_the_first_view(tmp_path: Path) -> None:
    tags = train(module(**OPTIONS), tmp_path / "off", ValidationLosses(0)).Tags()["scalars"]
    assert not [tag for tag in tags if tag.startswith("val/loss")]
    detector = module(image=ImageConfig([64], 96, pad_multiple=8, test_flip=True), **OPTIONS)
    events = train(detector, tmp_path / "views", ValidationLosses(1))
    assert values(events, "val/loss")[-1] == pytest.approx(by_hand(detector, [0, 1])["loss"], rel=1e-5)
