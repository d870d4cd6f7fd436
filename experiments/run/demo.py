"""`make demo`: writes MiniVOC, trains on it, tests, predicts, and says where everything is.

Every step is a `frcnn` command that is printed before it runs, so that it can be typed again. A timed second says
beforehand how long it will take on this machine.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.benchmark.expectation import expect_training
from experiments.run.folder import choose_run_folder

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("data/mini_voc")
CONFIG = Path("experiments/mini_voc.yaml")
IMAGES = 2000
BAR = 0.85
"""AP50 by VOC2007's 11 points on the validation images that every machine reaches."""


def main() -> int:
    """Run all steps; return the exit status of the first one that fails, or 1 if the detector is not what it should."""
    os.chdir(ROOT)
    print(expectation(), flush=True)
    run = choose_run_folder("runs", "mini_voc", None, seed=0)
    pictured, pictures = run / "test_images", run / "predictions"
    started = time.monotonic()
    seconds = {}
    for command in (
        f"mini-voc {DATA} --images {IMAGES}",
        f"fit --config {CONFIG} --run_name {run.name}",
        f"test --ckpt_path {run}/checkpoints/last.ckpt",
        f"predict --ckpt_path {run}/checkpoints/last.ckpt --images {pictured} --output {pictures}",
    ):
        print(f"\n$ frcnn {command}", flush=True)
        if command.startswith("predict"):  # which takes a folder: of the first images of the test split
            pictured.mkdir(parents=True, exist_ok=True)
            for name in (DATA / "ImageSets/Main/test.txt").read_text().split()[:24]:
                (pictured / f"{name}.jpg").write_bytes((DATA / f"JPEGImages/{name}.jpg").read_bytes())
        began = time.monotonic()
        status = subprocess.run([sys.executable, "-m", "experiments.cli", *command.split()], check=False).returncode
        seconds[command.split()[0]] = time.monotonic() - began
        if status:
            return status
    metrics = json.loads((run / "metrics.json").read_text())
    _report(run, metrics, pictures, seconds["fit"], time.monotonic() - started)
    return check(metrics)


def expectation() -> str:
    """Return in one line how long the demo will take here, from steps that are timed now."""
    expected = expect_training(CONFIG, IMAGES * 6 // 10)  # 60% of MiniVOC's images are its training split
    low, high = (minutes + others for minutes, others in zip(expected.minutes, (0.5, 1.5), strict=True))
    return f"This takes about {low:.0f} to {high:.0f} minutes here: {expected}."


def check(metrics: dict[str, Any]) -> int:
    """Say so if a detector stays below `BAR`, and return the exit status."""
    reached = metrics["val/AP50_voc07"]
    if reached >= BAR:
        return 0
    print(
        f"The detector reached an AP50 of {reached:.3f} on the validation images, and {BAR} is expected: something is "
        "wrong on this machine, for example a damaged installation (make test would tell).",
        file=sys.stderr,
    )
    return 1


def _report(run: Path, metrics: dict[str, Any], pictures: Path, training: float, all_steps: float) -> None:
    table = Table(title="MiniVOC, 6 classes, trained from scratch")
    for column in ("metric", "validation", "test"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, meaning in (
        ("AP50_voc07", "AP50, VOC2007's 11 points"),
        ("AP50_voc", "AP50, area under the curve"),
        ("AP", "AP, COCO's .50:.95"),
        ("proposal_recall@100", "recall of 100 proposals, IoU 0.5"),
    ):
        table.add_row(meaning, *(f"{metrics[f'{stage}/{name}']:.3f}" for stage in ("val", "test")))
    Console().print(table)
    print(f"training         {training / 60:.1f} minutes, of {all_steps / 60:.1f} for all steps")
    print(f"run              {run}")
    print(f"pictures         {pictures}")
    print(f"TensorBoard      {Path(sys.executable).parent.relative_to(ROOT)}/frcnn tensorboard runs")


if __name__ == "__main__":
    sys.exit(main())
