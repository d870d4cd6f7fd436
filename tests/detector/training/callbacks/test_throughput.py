"""Images per second, from a clock that is set by hand."""

from types import SimpleNamespace
from typing import Any

from detector.training.callbacks import throughput
from detector.training.callbacks.throughput import Throughput


def test_rate_of_all_devices_together(monkeypatch) -> None:
    """Two steps of 3 and 5 images on each of 4 devices in 0.5 and 1.5 s: 16 images per second; waiting for a
    validation between them does not count."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    logged: list[tuple[str, float]] = []
    module: Any = SimpleNamespace(log=lambda name, value, **_: logged.append((name, value)))
    trainer: Any = SimpleNamespace(world_size=4, is_last_batch=False)
    meter = Throughput(every_n_steps=2)
    meter.on_train_epoch_start(trainer, module)
    now[0] += 0.5
    meter.on_train_batch_end(trainer, module, None, (["image"] * 3, []), 0)
    now[0] += 60.0
    meter.on_validation_end(trainer, module)
    now[0] += 1.5
    meter.on_train_batch_end(trainer, module, None, (["image"] * 5, []), 1)
    assert logged == [("train/images_per_second", 16.0)]
