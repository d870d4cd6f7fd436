"""What the tests of exported files share."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detector.errors import InputError
from experiments.export.programs import check_writable

ROOT = Path(__file__).resolve().parents[3]

Read = Callable[[Path, Sequence[str], Path], list[dict[str, Tensor]]]


@pytest.fixture(scope="session")
def needs_packages_of() -> Callable[[str], None]:
    """`needs_packages_of(format)`: skip where what writes and reads it is not installed."""

    def check(format: str) -> None:
        try:
            check_writable(format)
        except InputError as error:
            pytest.skip(str(error))

    return check


@pytest.fixture(scope="session")
def export_of_shipped(tmp_path_factory, frcnn, needs_packages_of) -> Callable[[str], Path]:
    """`export_of_shipped(format)`: the folder of the shipped detector, written once by the command; read-only."""

    @functools.cache
    def export(format: str) -> Path:
        needs_packages_of(format)
        folder: Path = tmp_path_factory.mktemp("export") / "detector"
        shipped = ROOT / "experiments" / "weights" / "mini_voc.ckpt"
        result = frcnn("export", shipped, "--format", format, "--output", folder, cwd=folder.parent)
        assert result.code == 0, result.err
        return folder

    return export


@pytest.fixture(scope="session")
def read_without_torch() -> Read:
    """`read_without_torch(exported, names, folder)`: what its `detect.py` finds in image files of a folder.

    In a process that can import neither torch nor this package.
    """

    def read(exported: Path, names: Sequence[str], folder: Path) -> list[dict[str, Tensor]]:
        (folder / "sitecustomize.py").write_text(
            "import sys\nsys.modules['torch'] = sys.modules['detector'] = sys.modules['experiments'] = None\n"
        )
        packages = [path for path in sys.path if "site" in Path(path).name]
        run = subprocess.run(
            [sys.executable, str(exported / "detect.py"), *names],
            cwd=folder,
            env={"PYTHONPATH": ":".join([str(folder), *packages]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        told = [json.loads(line) for line in run.stdout.splitlines()]
        assert [one["file"] for one in told] == list(names)
        classes = json.loads((exported / "detector.json").read_text())["class_names"]
        return [
            {
                "boxes": torch.tensor([found["box"] for found in one["detections"]]).reshape(-1, 4),
                "labels": torch.tensor([classes.index(found["label"]) + 1 for found in one["detections"]]),
                "scores": torch.tensor([found["score"] for found in one["detections"]]),
            }
            for one in told
        ]

    return read
