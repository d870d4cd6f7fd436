"""Two processes: each image counts once, all write into one run folder, and numbers are those of one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.training.callbacks.validation_losses import NAMES

DDP = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")


def run_processes(frcnn_process, *arguments, cwd: Path) -> tuple[int, str]:
    process = frcnn_process(*arguments, *DDP, cwd=cwd)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out + err


def evaluation(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name.startswith("val/")}


def detections(run: Path) -> list[Any]:
    rows = json.loads((run / "predictions.json").read_text())
    return sorted((row["file_name"], row["category_id"], row["score"], *row["bbox"]) for row in rows)


def base_rates(run: Path) -> set[float]:
    """Learning rates before the schedule, of all layers."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {group["initial_lr"] for group in content["optimizer_states"][0]["param_groups"]}


def objects_of(folder: Path, split: str) -> int:
    """Objects of a split that are not difficult."""
    names = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    files = [(folder / "Annotations" / f"{name}.xml").read_text() for name in names]
    return sum(text.count("<object>") - text.count("<difficult>1<") for text in files)


@pytest.mark.timeout(150)
def test_validation_equals_that_of_one_process(frcnn, frcnn_process, trained, tiny_config, tmp_path):
    """Seven images, one at a time: the second process gets fewer, and none is repeated to even that out."""
    one, two = (Path(shutil.copytree(trained, tmp_path / name / "runs" / "tiny" / "seed0")) for name in ("one", "two"))
    for run in (one, two):
        (run / "metrics.json").unlink()
        (run / "predictions.json").unlink()
    losses = "detector.training.callbacks.validation_losses.ValidationLosses"
    seen = ("--trainer.callbacks+", losses, "--trainer.callbacks.every_n_images", 1)
    options = ("validate", "--config", tiny_config, "--data.eval_batch_size", 1, *seen, "--ckpt_path")
    assert frcnn(*options, one / "checkpoints" / "last.ckpt", cwd=one.parents[2]).code == 0
    code, log = run_processes(frcnn_process, *options, two / "checkpoints" / "last.ckpt", cwd=two.parents[2])
    assert code == 0, log
    assert evaluation(one)["val/AP50_voc07"] > 0
    assert min(evaluation(one)[f"val/{name}"] for name in NAMES) > 0
    assert evaluation(two) == evaluation(one)
    assert detections(two) == detections(one)


@pytest.mark.timeout(150)
def test_training(frcnn, frcnn_process, tiny_config, mini_voc, metrics_of, tmp_path):
    """Twelve images, two processes, two images each: three steps. The weights that are saved are those validated."""
    histograms = "detector.training.callbacks.distributions.Distributions"
    seen = ("--trainer.callbacks+", histograms, "--trainer.callbacks.log_every_n_steps", 3)
    seen = (*seen, "--trainer.callbacks.every_n_steps", 1)
    options = ("fit", "--config", tiny_config, "--data.eval_batch_size", 1)
    code, log = run_processes(frcnn_process, *options, *seen, cwd=tmp_path)
    assert code == 0, log
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["seed0"]
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert metrics_of(run)["step"] == 3
    (file,) = run.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    (histogram,) = events.Histograms("train_distributions/object_iou")
    assert histogram.histogram_value.num == objects_of(mini_voc, "train")  # of both processes
    shares = [tag for tag in events.Tags()["scalars"] if tag.startswith("val_anchors/true_positives/")]
    assert len(shares) == 2 and sum(events.Scalars(tag)[-1].value for tag in shares) == pytest.approx(1)
    before, found = evaluation(run), detections(run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    result = frcnn(
        "validate", "--ckpt_path", checkpoint, "--trainer.devices", 1, "--trainer.strategy", "auto", cwd=tmp_path
    )
    assert result.code == 0, result.err
    assert evaluation(run) == before
    assert detections(run) == found


@pytest.mark.timeout(150)
def test_training_on_grouped_and_mixed_images(frcnn, frcnn_process, tiny_config, metrics_of, tmp_path):
    """Both processes get equally many batches, though images are grouped by shape, mixed and cached.

    The learning rate is that of four images a step, and of two from where one process alone goes on.
    """
    options = ("--model.optimizer.lr_per_images", 16, "--model.optimizer.ema_decay", 0)
    options += ("--data.group_by_aspect", "true", "--data.augmentation", "mosaic", "--data.cache_images", "memory")
    code, log = run_processes(
        frcnn_process, "fit", "--config", tiny_config, *options, "--data.num_workers", 1, cwd=tmp_path
    )
    assert code == 0, log
    assert log.count("group_by_aspect: ") == 1
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert metrics_of(run)["step"] == 3
    assert log.count("a step has 4 images, so the learning rate is 0.003 * 4 / 16 = 0.00075\n") == 1
    assert base_rates(run) == {0.003 * 4 / 16}
    go_on = ("--ckpt_path", run / "checkpoints" / "last.ckpt", "--resume_changed", "true", "--trainer.max_epochs", 2)
    assert frcnn("fit", "--config", tiny_config, *options, *go_on, cwd=tmp_path).code == 0
    assert metrics_of(run)["step"] == 3 + 6
    assert base_rates(run) == {0.003 * 2 / 16}
