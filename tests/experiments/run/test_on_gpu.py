"""Trainings on a GPU: repeatable where that is asked for, through NCCL, and with checkpoints that go anywhere."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from detector.training.lightning_module import FasterRCNNModule

pytestmark = pytest.mark.gpu

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once by a process


@pytest.fixture
def there(gpu: torch.device) -> tuple[object, ...]:
    """Options of a training on the device."""
    where = "gpu" if gpu.type == "cuda" else "cpu"
    return ("--trainer.accelerator", where, "--trainer.devices", 1, "--trainer.precision", "32-true")


@pytest.fixture
def repeatable() -> Any:
    yield ("--trainer.deterministic", "true")
    torch.use_deterministic_algorithms(False)


def weights_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    return content


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8:
            signal.raise_signal(signal.SIGTERM)


def test_resumed_equals_undisturbed(frcnn, tiny_config, tmp_path, there, repeatable, with_callback, metrics_of) -> None:
    """To the bit, where --trainer.deterministic is true."""
    fit = ("fit", "--config", tiny_config, *there, *repeatable, "--trainer.max_epochs", 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    result = frcnn(*fit, cwd=whole)
    assert result.code == 0, result.err
    with_callback(Stop())
    assert frcnn(*fit, cwd=parts).code == 128 + signal.SIGTERM
    with_callback(None)
    run, undisturbed = (folder / "runs" / "tiny" / "seed0" for folder in (parts, whole))
    assert weights_of(run)["global_step"] == 8
    result = frcnn(*fit, "--ckpt_path", run / "checkpoints" / "last.ckpt", cwd=parts)
    assert result.code == 0, result.err
    expected, found = weights_of(undisturbed), weights_of(run)
    assert found["global_step"] == expected["global_step"] == 18
    for part in ("state_dict", "current_model_state"):
        assert [n for n, tensor in expected[part].items() if not torch.equal(tensor, found[part][n])] == []
    same = {name for name in metrics_of(undisturbed) if name.startswith("val/")}
    assert {name: metrics_of(run)[name] for name in same} == {name: metrics_of(undisturbed)[name] for name in same}


def test_checkpoints_go_to_the_gpu_and_back(frcnn, tiny_config, trained, tmp_path, there, metrics_of, gpu) -> None:
    """A CPU's checkpoint scores the same there, trains on there, and is read here."""
    run = Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))
    last, on_cpu = run / "checkpoints" / "last.ckpt", metrics_of(run)
    assert on_cpu["val/AP50_voc07"] > 0
    result = frcnn("validate", "--config", tiny_config, *there, "--ckpt_path", last, cwd=tmp_path)
    assert result.code == 0, result.err
    for name in ("val/AP50_voc07", "val/AP", "val/proposal_recall@10"):
        if name in on_cpu:
            assert metrics_of(run)[name] == pytest.approx(on_cpu[name], abs=0.02), name
    more = ("--trainer.max_epochs", 15, "--trainer.check_val_every_n_epoch", 15, "--resume_changed", "true")
    result = frcnn("fit", "--config", tiny_config, *there, *more, "--ckpt_path", last, cwd=tmp_path)
    assert result.code == 0, result.err
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 15 * 6
    assert {tensor.device.type for tensor in content["state_dict"].values()} == {gpu.type}
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    model = FasterRCNNModule.from_checkpoint(last)
    here = {name: tensor.cpu() for name, tensor in content["state_dict"].items()}
    assert all(torch.equal(here[name], tensor) for name, tensor in model.state_dict().items())
    assert all(value.device.type == "cpu" for one in model([image]) for value in one.values())


def test_one_process_through_nccl(frcnn, tiny_config, tmp_path, there, with_callback, metrics_of) -> None:
    """DistributedDataParallel gathers the metrics, and the training ends with its files."""
    seen: list[str] = []

    class Backend(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(torch.distributed.get_backend())

    with_callback(Backend())
    result = frcnn("fit", "--config", tiny_config, *there, "--trainer.strategy", "ddp", cwd=tmp_path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert result.code == 0, result.err
    assert seen == ["nccl" if there[1] == "gpu" else "gloo"]
    assert metrics_of(tmp_path / "runs" / "tiny" / "seed0")["step"] == 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_through_nccl(frcnn_process, tiny_config, tmp_path, metrics_of) -> None:
    where = ("--trainer.accelerator", "gpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    process = frcnn_process("fit", "--config", tiny_config, *map(str, where), cwd=tmp_path)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    assert metrics_of(tmp_path / "runs" / "tiny" / "seed0")["step"] == 3
