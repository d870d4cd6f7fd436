"""What the tests of runs share."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def checkpoint(trained) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture
def photo(mini_voc) -> Path:
    """An image on which the detector finds something."""
    return sorted((mini_voc / "JPEGImages").iterdir())[0]


@pytest.fixture
def run(frcnn, checkpoint, tmp_path):
    """`run(images, *options, output="out")`: a prediction from `tmp_path`."""

    def call(images: object, *options: object, output: object = "out") -> Any:
        return frcnn(
            *("predict", "--ckpt_path", checkpoint, "--images", images, "--output", output, "--accelerator", "cpu"),
            *options,
            cwd=tmp_path,
        )

    return call


@pytest.fixture(scope="module")
def events(trained) -> EventAccumulator:
    file = min(trained.glob("events.out.tfevents.*"))  # the training's; tests of the same run add theirs
    return EventAccumulator(str(file)).Reload()
