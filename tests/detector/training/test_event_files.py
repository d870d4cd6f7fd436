"""Checksums of event files: CRC-32C by google-crc32c, the same numbers as TensorBoard's own."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from detector.training.event_files import quick_checksums
from detector.training.loggers import RunTensorBoard
from experiments.results.curves import read_curves


def of_tensorboard(data: bytes) -> int:
    number: int = pywrap_tensorflow.crc_finalize(pywrap_tensorflow.crc_update(pywrap_tensorflow.CRC_INIT, data))
    return number


@pytest.fixture(autouse=True)
def own_function_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pywrap_tensorflow, "crc32c", of_tensorboard)


def test_the_same_numbers() -> None:
    quick_checksums()
    assert pywrap_tensorflow.crc32c is not of_tensorboard
    assert pywrap_tensorflow.crc32c(b"123456789") == 0xE3069283  # the check value in catalogues of CRCs
    assert pywrap_tensorflow.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4: 32 bytes of zeros
    rng = np.random.default_rng(0)
    for length in (0, 1, 7, 8, 1000):
        data = rng.bytes(length)
        assert pywrap_tensorflow.crc32c(data) == of_tensorboard(data)


def test_what_is_written_and_read_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> int:
        raise AssertionError("computed in Python")

    monkeypatch.setattr(pywrap_tensorflow, "crc_update", never)
    logger = RunTensorBoard(str(tmp_path), "name", "run")
    logger.log_metrics({"loss": 2.5}, 3)
    logger.experiment.add_image("picture", np.zeros((4, 4, 3), np.uint8), 3, dataformats="HWC")
    logger.experiment.close()
    curve = read_curves(tmp_path / "name" / "run", ["loss"])["loss"]
    assert (curve.steps, curve.values) == ((3,), (2.5,))


def test_where_it_is_not_installed_tensorboard_goes_on_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    quick_checksums()
    assert pywrap_tensorflow.crc32c is of_tensorboard
