"""The parts of a check that are commands: the GPU's tests, a training on genuine images, a grid of trainings."""

import json
import math
import os
import platform
import re
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

import yaml

from datamodules.parallel import available_cores
from detector.errors import InputError
from experiments.benchmark.gpu_check.limited import ROOT, Ended, run_limited, started, wait_for
from experiments.benchmark.gpu_check.record import Values
from experiments.results.curves import read_curves

PACKAGES: Final = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "numpy", "triton")
WEIGHTS: Final = "mobilenet_v2_imagenet.safetensors"
LONG: Final = 150.0
"""Seconds from which on a grid trains as long as on a CPU."""


@dataclass(frozen=True)
class Check:
    """Hold what all parts share: folders of results and drafts, the data, what computes, whether sizes are tiny."""

    output: Path
    drafts: Path
    data: Path | None
    accelerator: str
    quick: bool
    stop_if_asked: Callable[[], None] = lambda: None
    writers: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def run(
        self, arguments: list[object], log: str, seconds: float, environment: Mapping[str, str] | None = None
    ) -> Ended:
        """Run `python -m ARGUMENTS` with a time limit; its output is added to a file of the results."""
        return run_limited(arguments, self.output / log, seconds, environment, self.stop_if_asked)

    def written(self, seconds: float) -> None:
        """Wait until synthetic data is written."""
        for writer in self.writers:
            wait_for(writer, seconds, self.stop_if_asked)

    @property
    def trainer(self) -> list[str]:
        """Return the options of a training here."""
        precision = "32-true" if self.accelerator == "cpu" else "bf16-mixed"
        where = ["--trainer.accelerator", self.accelerator, "--trainer.devices", "1"]
        return [*where, "--trainer.precision", precision, "--trainer.enable_progress_bar", "false"]

    @property
    def mini_voc(self) -> Path:
        """Return the folder of a synthetic dataset, once it is written."""
        self.written(math.inf)
        return self.drafts / "mini_voc"


Task = Callable[[Check, float], Values]


def machine(check: Check, seconds: float) -> Values:
    """Return versions, the processor, and all that nvidia-smi tells."""
    found: Values = {"python": platform.python_version(), "system": platform.platform(), "cores": available_cores()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,pcie.link.gen.max"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        found["nvidia_smi"] = None
    return found


def tests(check: Check, seconds: float) -> Values:
    """Run `pytest -m gpu` over the files that hold such tests; return the outcomes, as far as it came."""
    found = (path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    files = sorted(found, reverse=True)[-1 if check.quick else 0 :]  # what compiles for long comes late
    log = "tests.txt"
    options = ["-m", "gpu", "-vv", "-rfEs", "--tb=short", "--durations=10", "-p", "no:cacheprovider"]
    if find_spec("xdist") and not check.quick:  # one process takes more than two minutes, mostly of its processor
        options += ["-n", str(max(1, min(6, available_cores() - 2))), "--dist", "worksteal"]
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # read once by a process; for `deterministic`
    if check.accelerator == "cpu":
        environment["FRCNN_GPU_TESTS_ON"] = "cpu"
    ended = check.run(["pytest", *options, *(path.relative_to(ROOT) for path in files)], log, seconds, environment)
    text = (check.output / log).read_text(errors="replace")
    outcomes = re.findall(r"^tests/\S+::.+ (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", text, re.MULTILINE)
    counts = {name.lower(): outcomes.count(name) for name in dict.fromkeys(outcomes)}
    failures = re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.+)", text, re.MULTILINE)
    return ended.values() | {
        "outcomes": counts,
        "failures": [line[:300] for line in failures],
    }


def training(check: Check, seconds: float) -> Values:
    """Train MobileNetV2 on the VOC2012 subset; return AP50 over the epochs, images per second and waiting times."""
    root = voc_root(check) if check.data is not None else None
    options: list[object]
    if root is None or check.quick:
        config, epochs = "experiments/mini_voc.yaml", 1
        options = ["--data.root", check.mini_voc, "--trainer.check_val_every_n_epoch", 1]
    else:
        config, epochs = "experiments/voc12_subset_mobilenet_v2.yaml", 24
        workers = max(1, min(12, available_cores() - 2))
        options = ["--data.root", root, "--data.num_workers", workers, "--trainer.check_val_every_n_epoch", 8]
        options += ["--data.batch_size", 8, "--model.optimizer.lr", 0.00021]  # that of 4 images, times a root of 2
        options += ["--model.image.pad_multiple", 128]  # few sizes: a GPU's first step at each takes a second or more
        options += ["--model.backbone.weights", _weights(check)]
    options += ["--trainer.max_epochs", epochs, "--seed_everything", 0, "--run_name", "gpu_check"]
    fit = ["experiments.cli", "fit", "--config", config, "--runs_dir", check.drafts / "runs", *check.trainer, *options]
    ended = check.run(fit, "training.txt", seconds)
    run = check.drafts / "runs" / Path(config).stem / "gpu_check"
    return (
        ended.values()
        | {"command": command_of(fit), "epochs": epochs}
        | figures(run)
        | {"data": "VOC2012 subset" if epochs > 1 else "MiniVOC"}
    )


def _weights(check: Check) -> Path:
    """Return the file of ImageNet weights in the folder of the data, or beside it."""
    assert check.data is not None
    folders = [check.data, check.data.parent]
    found = next((folder / WEIGHTS for folder in folders if (folder / WEIGHTS).is_file()), None)
    if found is None:
        raise InputError(f"{check.data}: there is no {WEIGHTS} in it or beside it")
    return found


def figures(run: Path) -> Values:
    """Return what a run's curves tell: AP50 by epoch, and medians of its speed."""
    times = {"images_per_second": "train/images_per_second", "data_wait_ms": "train_time/data_wait_ms"}
    times |= {"compute_ms": "train_time/compute_ms", "logged_gpu_utilization": "train_time/gpu_utilization"}
    scores = ("val/AP50", "val/AP50_voc07")
    curves = read_curves(run, [*times.values(), *scores])
    found: Values = {name: median(curves[tag].values) for name, tag in times.items() if tag in curves}
    if "data_wait_ms" in found and "compute_ms" in found:
        found["data_wait_share"] = found["data_wait_ms"] / (found["data_wait_ms"] + found["compute_ms"])
    for tag in scores:
        if tag in curves:
            by_epoch = zip(curves[tag].epochs, curves[tag].values, strict=True)
            found[f"{tag} by epoch"] = {f"{epoch:.0f}:": round(value, 4) for epoch, value in by_epoch}
            found[tag] = curves[tag].values[-1]
    return found


def grid(check: Check, seconds: float) -> Values:
    """Train the anchors' grid on MiniVOC, four cells at once on one GPU; return each cell's state and speed."""
    document = yaml.safe_load((ROOT / "experiments/ablations/anchors_mini_voc.yaml").read_text())
    document["seeds"] = [0]
    epochs = 1 if check.quick else 5 if seconds >= LONG else 2
    document["overrides"] = {"data.root": str(check.mini_voc), "trainer.max_epochs": epochs}
    document["overrides"]["trainer.check_val_every_n_epoch"] = epochs
    if check.accelerator == "cpu":
        document["overrides"]["trainer.accelerator"] = "cpu"
    if check.quick:
        document["axes"] = {"ratios": document["axes"]["ratios"]}
        document["baseline"] = {"ratios": document["baseline"]["ratios"]}
    path = check.drafts / "anchors_mini_voc.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    at_once = ["--jobs", 2] if check.accelerator == "cpu" else ["--gpus", "0,0,0,0"]
    ablate = ["experiments.cli", "ablate", path, "--runs_dir", check.drafts / "grid", *at_once]
    ended = check.run(ablate, "grid.txt", seconds)
    cells = [_cell(file.parent) for file in sorted((check.drafts / "grid").rglob("cell.json"))]
    done = sum(cell["status"] == "done" for cell in cells)
    return ended.values() | {"command": command_of(ablate), "epochs": epochs, "done": done, "cells": cells}


def _cell(folder: Path) -> Values:
    state = json.loads((folder / "cell.json").read_text())
    found = {"cell": state["name"], "status": state["status"], "seconds": state.get("seconds")}
    curves = figures(folder)
    names = ("images_per_second", "data_wait_share", "val/AP50_voc07")
    return found | {name: curves.get(name) for name in names} | {"error": state.get("error")}


def command_of(arguments: list[Any]) -> str:
    """Return a command as it may be typed, without this machine's folders."""
    words = [word.name if isinstance(word, Path) else str(word) for word in arguments]
    return " ".join(["frcnn" if word == "experiments.cli" else word for word in words])


def written_data(check: Check) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    """Begin to write MiniVOC, which the first parts need not wait for; give the command."""
    images = 40 if check.quick else 2000
    return started(["experiments.cli", "mini-voc", check.mini_voc, "--images", images], subprocess.DEVNULL)


def voc_root(check: Check) -> Path | None:
    """Return the folder that holds VOC2012, unpacked where the data is a tar file; None where there is none."""
    assert check.data is not None
    tar = check.data if check.data.is_file() else check.data / "voc2012-subset.tar"
    folder = check.data
    if tar.is_file():
        folder = check.drafts / "voc"
        with tarfile.open(tar) as file:
            file.extractall(folder, filter="data")
    return next((found for found in (folder, folder / "VOCdevkit") if (found / "VOC2012").is_dir()), None)


def find_data(given: str | None) -> Path | None:
    """Return the folder or tar file with genuine images: as given, by FRCNN_SHARED_DATA, or where tests look."""
    named = given or os.environ.get("FRCNN_SHARED_DATA")
    candidates = [Path(named)] if named else [ROOT.parent / "shared/data", ROOT / "shared/data"]
    return next((path.resolve() for path in candidates if path.exists()), None)
