"""What the tests of predictions share."""

from pathlib import Path
from typing import Any

import pytest


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
