"""`make demo`: what it says beforehand, and that it notices a detector that is not what it should be."""

import re
from pathlib import Path

import pytest
import torch

from detector.kernels import processor
from experiments.benchmark import expectation
from experiments.run import demo

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("seconds", "minutes"),
    [(0.05, (5, 8)), (0.2, (17, 28))],  # 1,200 images, 4 at a time, 11 epochs: 3,300 steps, of 1.5 to 2.4 times that
)
def test_time_is_told_from_a_step(monkeypatch, seconds, minutes) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(expectation, "seconds_per_step", lambda *arguments: seconds)
    line = demo.expectation()
    numbers = [int(number) for number in re.findall(r"\d+", line)]
    assert tuple(numbers[:4]) == (*minutes, 3300, 1000 * seconds)


def test_a_step_is_timed_in_the_precision_of_the_training(monkeypatch, tiny_config) -> None:
    """Without bfloat16 in float32."""
    monkeypatch.setattr(processor, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(expectation, "this_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(demo, "CONFIG", tiny_config)
    line = demo.expectation()
    assert "600 steps" in line and "in 32-true, since this CPU has no bfloat16 arithmetic" in line
    assert 0 < int(re.findall(r"of (\d+) ms", line)[0]) < 5000


def test_a_poor_detector_is_a_failure(capsys) -> None:
    assert demo.check({"val/AP50_voc07": 0.851}) == 0
    assert capsys.readouterr().err == ""
    assert demo.check({"val/AP50_voc07": 0.8}) == 1
    assert "AP50 of 0.800" in capsys.readouterr().err
