"""`frcnn benchmark train --devices`: steps of processes that train together."""

import json

import pytest
import torch

from experiments.benchmark import devices as benchmark_devices
from experiments.benchmark import programs
from experiments.benchmark.devices import time_steps
from experiments.benchmark.measuring import CPU
from experiments.benchmark.models import chosen_networks
from experiments.benchmark.options import InferOptions
from experiments.benchmark.processes import run_processes
from experiments.benchmark.programs import Setting


def test_steps_of_two_processes(tiny_config, tmp_path) -> None:
    (network,) = chosen_networks(InferOptions(config=str(tiny_config)))
    setting = Setting("train", repeats=3, device=CPU)
    arguments = [(rank, 2, str(tmp_path / "store"), network, 1, "32-true", setting) for rank in range(2)]
    times = run_processes(time_steps, arguments, 250)
    assert [len(steps) for steps in times] == [3, 3]
    assert min(map(min, times)) > 0


def test_efficiency_of_devices(frcnn, tmp_path, monkeypatch, tiny_config) -> None:
    """As if a step took 100 ms alone, and beside another 110, 120 or 130 ms in one and 125 ms in the other process."""
    monkeypatch.setattr(programs, "this_device", lambda: CPU)
    steps = {1: [[100.0, 100.0, 100.0]], 2: [[110.0, 120.0, 130.0], [125.0, 125.0, 125.0]]}
    monkeypatch.setattr(benchmark_devices, "run_processes", lambda function, arguments, seconds: steps[len(arguments)])
    run = ("--config", tiny_config, "--devices", "2", "--batch_sizes", "[4]", "--format", "json")
    result = frcnn("benchmark", "train", *run, cwd=tmp_path)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    alone, both = document["cases"]
    assert (alone["value"], alone["ours_ms"], alone["ours_per_s"], alone["efficiency"]) == (1, 100, 40, 1)
    assert (both["value"], both["ours_ms"], both["ours_per_s"]) == (2, 125, 64)
    assert both["efficiency"] == pytest.approx(0.8)
    assert "1.60 times the images per second of one (40 to 64), efficiency 0.80" in document["notes"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the devices are then GPUs")
def test_processes_that_take_too_long(frcnn, tmp_path, tiny_config) -> None:
    run = ("--config", tiny_config, "--devices", "1,2", "--time_limit", 0.2)
    result = frcnn("benchmark", "train", *run, cwd=tmp_path)
    assert result.code == 1
    assert result.err == "frcnn benchmark train: process 1 of 1 took longer than 0.2 s\n"
