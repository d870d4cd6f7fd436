"""A disk of 90 MB that becomes full in the middle of a training: one line, and the former checkpoints are whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

DISK = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=90m tmpfs "$0" && exec "$@"')
PROGRAM = """
import os, sys
from pathlib import Path
import pytorch_lightning as pl
from detector.files import damage_of
from experiments.cli import main
from experiments.run.lightning_cli import DetectorCLI

disk, left = Path(sys.argv[1]), int(sys.argv[2])

class Fill(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8 and not (disk / "other").exists():
            with (disk / "other").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            os.truncate(disk / "other", (disk / "other").stat().st_size - left)

callbacks = DetectorCLI._callbacks
DetectorCLI._callbacks = lambda self, config: [Fill(), *callbacks(self, config)]
code = main(sys.argv[3:])
files = sorted((disk / "tiny" / "seed0" / "checkpoints").iterdir())
print("left:", code, *(f"{file.name}{damage_of(file)}" for file in files))
"""


@pytest.mark.skipif(
    subprocess.run([*DISK, "/mnt", "true"], capture_output=True).returncode, reason="no own mounts here"
)
@pytest.mark.parametrize(
    ("free", "line", "code"),
    [(0, "No space left on device", 1), (10_000_000, r"checkpoints has \d+ MB free; make room", 2)],
    ids=["nothing is left", "no room for a checkpoint"],
)
def test_the_disk_becomes_full(tiny_config, tmp_path, free, line, code):
    root = Path(__file__).resolve().parents[2]
    program = [sys.executable, "-c", PROGRAM, str(tmp_path), str(free), "fit", "--config", str(tiny_config)]
    options = ["--runs_dir", str(tmp_path), "--trainer.max_epochs", "2"]
    ended = subprocess.run(
        [*DISK, str(tmp_path), *program, *options], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert ended.stdout.splitlines()[-1] == f"left: {code} best.ckpt last.ckpt", ended.stderr
    said = [text for text in ended.stderr.splitlines() if text.startswith("frcnn: ")]
    assert len(said) == 1
    assert re.search(line, said[0])
    assert "Traceback" not in ended.stderr
