"""Images per second, from a clock that is set by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detector.training.callbacks import throughput
from detector.training.callbacks.throughput import Throughput


def test_rate_of_all_devices_together(monkeypatch) -> None:
    """Two steps of 3 and 5 images on each of 4 devices in 0.5 and 1.5 s: 16 images per second; waiting for a
    validation between them does not count. Of each step's time, 0.3 s is spent on waiting for its batch."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    logged: list[tuple[str, float]] = []
    times: list[dict[str, float]] = []
    module: Any = SimpleNamespace(log=lambda name, value, **_: logged.append((name, value)))
    trainer: Any = SimpleNamespace(
        world_size=4,
        is_last_batch=False,
        is_global_zero=True,
        global_step=2,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        loggers=[SimpleNamespace(log_metrics=lambda scalars, step: times.append(scalars | {"step": step}))],
    )
    meter = Throughput(every_n_steps=2)
    meter.on_train_epoch_start(trainer, module)
    now[0] += 0.3
    meter.on_train_batch_start(trainer, module, None, 0)
    now[0] += 0.2
    meter.on_train_batch_end(trainer, module, None, (["image"] * 3, []), 0)
    now[0] += 60.0
    meter.on_validation_end(trainer, module)
    now[0] += 0.3
    meter.on_train_batch_start(trainer, module, None, 1)
    now[0] += 1.2
    meter.on_train_batch_end(trainer, module, None, (["image"] * 5, []), 1)
    assert logged == [("train/images_per_second", 16.0)]
    assert times == [pytest.approx({"train_time/data_wait_ms": 300, "train_time/compute_ms": 700, "step": 1})]


def test_busy_share_of_a_gpu_where_something_tells_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 37)
    assert throughput.gpu_utilization(torch.device("cpu")) == {}
    assert throughput.gpu_utilization(torch.device("cuda")) == {"train_time/gpu_utilization": 0.37}

    def without_pynvml(device: Any) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", without_pynvml)
    assert throughput.gpu_utilization(torch.device("cuda")) == {}
