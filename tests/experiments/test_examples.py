"""The examples as a user has them: copied into a package of one's own, beside the installed project, in another folder.

Nothing of the checkout is on the path: `frcnn` comes from the wheel.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "experiments" / "examples"
PLAIN = {"class_path": "lab.backbone.Plain", "init_args": {"width": 8}}
WING = {"class_path": "lab.loss.Wing", "init_args": {"omega": 2.0}}
TURNS = [{"class_path": "lab.augmentation.QuarterTurns", "init_args": {"most": 1}}]
SEEN = {"class_path": "lab.callback.ImagesSeen", "init_args": {"every": 2}}
CSV_LOGGER = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "tables"}}
TENSORBOARD = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "events"}}
STRANGERS = "lab.csv_format.CsvFormat"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as pip installs it, from a copy of the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("detector", "datamodules", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-compile", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode and "No module named pip" in ended.stderr:
        pytest.skip("pip is not installed")
    assert ended.returncode == 0, ended.stderr
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mini_voc: Path, tiny_config: Path) -> Path:
    """A user's folder: `lab/` with the examples, `lab.yaml`, and `shapes/` with images and CSV files."""
    here = tmp_path_factory.mktemp("user")
    shutil.copytree(EXAMPLES, here / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    write_csv_files(mini_voc, here / "shapes")
    config = yaml.safe_load(tiny_config.read_text())
    config["data_format"] = {"class_path": "lab.csv_format.CsvFormat", "init_args": {"delimiter": ";"}}
    config["data"] |= {"root": "shapes", "train_splits": ["train"], "val_splits": ["val"], "test_splits": []}
    config["data"] |= {"augmentation": TURNS}
    config["model"]["backbone"] |= {"name": PLAIN}
    config["model"]["roi"]["reg_loss"] = WING
    config["trainer"] |= {"callbacks": [SEEN], "logger": [TENSORBOARD, CSV_LOGGER], "max_epochs": 2}
    (here / "lab.yaml").write_text(yaml.safe_dump(config))
    return here


def write_csv_files(voc: Path, folder: Path) -> None:
    """Write each split of a VOC dataset by VOC's own numbers, which count from 1."""
    from xml.etree import ElementTree

    shutil.copytree(voc / "JPEGImages", folder)
    for split in ("train", "val"):
        lines = ["filename;class;xmin;ymin;xmax;ymax"]
        for stem in (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            for node in ElementTree.parse(voc / "Annotations" / f"{stem}.xml").getroot().iter("object"):
                x1, y1, x2, y2 = (int(node.findtext(f"bndbox/{key}") or 0) for key in ("xmin", "ymin", "xmax", "ymax"))
                lines.append(f"{stem}.jpg;{node.findtext('name')};{x1 - 1};{y1 - 1};{x2};{y2}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def call(installed: Path, folder: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`call(*arguments)`: a command of the installed `frcnn`, in the user's folder."""
    kept = {key: value for key, value in os.environ.items() if key not in ("FRCNN_RUN_DIR", "PL_GLOBAL_SEED")}
    environment = kept | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "import sys, experiments.cli as cli; assert cli.__file__.startswith(sys.argv.pop(1)); sys.exit(cli.main())"

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-c", code, str(installed), *map(str, arguments)]
        return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def run(call: Callable[..., Any], folder: Path) -> Path:
    """The run of a training of five steps that went on to the end of its second epoch, of six."""
    ended = call("fit", "--config", "lab.yaml", "--trainer.max_steps", 5)
    assert ended.returncode == 0, ended.stderr
    assert "names classes of others" not in ended.stderr  # it is the user's own config
    run = folder / "runs" / "lab" / "seed0"
    again = ("--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    ended = call("fit", *again, "--trainer.max_steps", -1)
    assert ended.returncode == 0, ended.stderr
    line = next(line for line in ended.stderr.splitlines() if "names classes of others" in line)
    assert line.startswith(f"{run / 'config.yaml'}: ") and all(
        name in line
        for name in (STRANGERS, PLAIN["class_path"], "lab.loss.Wing", TURNS[0]["class_path"], SEEN["class_path"])
    )
    return run


def test_a_training_has_all_parts_and_goes_on_with_their_state(run: Path, folder: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data_format"] == {"class_path": "lab.csv_format.CsvFormat", "init_args": {"delimiter": ";"}}
    assert config["model"]["backbone"]["name"] == PLAIN
    assert config["model"]["roi"]["reg_loss"]["class_path"] == "lab.loss.Wing"
    assert config["model"]["roi"]["reg_loss"]["init_args"] == {"omega": 2.0, "epsilon": 0.5}
    assert config["data"]["augmentation"] == TURNS and config["trainer"]["callbacks"][0]["init_args"] == {"every": 2}
    assert json.loads((run / "metrics.json").read_text())["step"] == 5 + 6  # the first part ended its epoch early
    values: dict[int, float] = {}
    for file in sorted((folder / "events").rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        if "train/images_seen" in events.Tags()["scalars"]:
            values |= {item.step: item.value for item in events.Scalars("train/images_seen")}
    assert values and max(values.values()) == 2 * 10, values  # at the tenth step, of two images each
    assert list((folder / "tables").rglob("metrics.csv"))


def test_validation_and_detection_find_the_parts_by_the_checkpoint(call: Callable[..., Any], run: Path) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    ended = call("validate", "--ckpt_path", checkpoint)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("names classes of others") == 1 and STRANGERS in ended.stderr
    assert "val/AP50_voc07" in json.loads((run / "metrics.json").read_text())
    ended = call("predict", "--ckpt_path", checkpoint, "--images", "shapes", "--output", "found", "--save", "json")
    assert ended.returncode == 0, ended.stderr
    assert (
        f"{checkpoint}: names classes of others, which are imported now: lab.backbone.Plain, lab.loss.Wing\n"
        in ended.stderr
    )
    assert json.loads((run.parents[2] / "found" / "predictions.json").read_text())


def test_a_grid_over_two_of_them(call: Callable[..., Any], folder: Path) -> None:
    axes = {
        "loss": {"option": "model.roi.reg_loss", "values": {"l1": "smooth_l1", "wing": "lab.loss.Wing"}},
        "turns": {"option": "data.augmentation", "values": {"no": "none", "yes": TURNS}},
    }
    overrides = {"trainer.max_steps": 1, "trainer.logger": False}
    grid = {"base": "lab.yaml", "axes": axes, "seeds": [0], "overrides": overrides}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    ended = call("ablate", "grid.yaml", "--jobs", 1)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    ended = call("report", "runs/grid", "--format", "json")
    cells = json.loads(ended.stdout)["cells"]
    assert sorted(tuple(cell["axes"].values()) for cell in cells) == [
        *(("l1", "no"), ("l1", "yes"), ("wing", "no"), ("wing", "yes"))
    ]
    assert {cell["status"] for cell in cells} == {"done"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30
