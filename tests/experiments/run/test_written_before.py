"""What an earlier version wrote goes on working: `written_before` holds files of a run.

The run trained `tiny.yaml` (see `TINY`) for 60 epochs on `mini_voc`, from a working folder beside the dataset `mini`,
with `SmallBody` replaced by `NarrowBody`, so that the file is small. Its config.yaml names classes by former paths.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from detector.backbones import small
from detector.backbones.base import Body
from experiments.run.former_paths import FORMER

BEFORE = Path(__file__).with_name("written_before")


class NarrowBody(small.SmallBody):
    channels = (8,)

    def __init__(self) -> None:
        Body.__init__(self)
        stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = small.ResidualBlock(8, 8, stride=2)
        self.layer2 = small.ResidualBlock(8, 8, stride=2)
        self.layer3 = nn.Sequential(small.ResidualBlock(8, 8, dilation=2))


@pytest.fixture
def run(tmp_path: Path, mini_voc: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder, as it was left."""
    monkeypatch.setattr(small, "SmallBody", NarrowBody)
    (tmp_path / "mini").symlink_to(mini_voc)
    folder = tmp_path / "runs" / "tiny" / "seed0"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(BEFORE / "last.ckpt", folder / "checkpoints")
    for name in ("config.yaml", "metrics.json"):
        shutil.copy(BEFORE / name, folder)
    return folder


def test_a_checkpoint_is_validated_with_the_configuration_of_its_run(frcnn, run, tmp_path, metrics_of):
    before = metrics_of(run)
    (run / "metrics.json").unlink()
    result = frcnn("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", cwd=tmp_path)
    assert result.code == 0, result.err
    after = metrics_of(run)
    assert (after["epoch"], after["step"]) == (60, 360)
    # 17 objects, so that one detection more or less on another processor moves these by a few hundredths.
    assert before["val/AP50_voc07"] == pytest.approx(0.2264, abs=1e-4)
    before["val/proposal_recall@30"] = before["val/proposal_recall@300"]  # its configuration gives 30 proposals
    for name in ("val/AP50_voc07", "val/AP", "val/proposal_recall@30"):
        assert after[name] == pytest.approx(before[name], abs=0.05)
    assert "val/proposal_recall@300" not in after


def test_a_training_goes_on_from_its_own_files(frcnn, run, tmp_path, metrics_of):
    config = yaml.safe_load((run / "config.yaml").read_text())
    named = [item["class_path"] for item in (*config["data"]["augmentation"], *config["trainer"]["callbacks"])]
    assert named == [
        "datamodules.transforms.HorizontalFlip",
        "datamodules.transforms.ColorJitter",
        "datamodules.transforms.MinIoUCrop",
        "datamodules.mixing.MixUp",
        "datamodules.transforms.MultiScale",
        "experiments.cell_progress.CellProgress",
    ]
    checkpoint = run / "checkpoints" / "last.ckpt"
    before = torch.load(checkpoint, weights_only=True)
    again = ("--config", run / "config.yaml", "--ckpt_path", checkpoint, "--trainer.max_epochs", 61)
    result = frcnn("fit", *again, cwd=tmp_path)
    assert result.code == 0, result.err
    assert metrics_of(run)["step"] == 366
    assert json.loads((tmp_path / "progress" / "cell.progress.json").read_text())["step"] >= 361
    after = torch.load(checkpoint, weights_only=True)
    assert after["averaging_state"]["n_averaged"] == before["averaging_state"]["n_averaged"] + 6
    moments = (file["optimizer_states"][0]["state"][0]["step"] for file in (before, after))
    assert [int(step) for step in moments] == [360, 366]


@pytest.mark.parametrize("former", FORMER)
def test_former_names_are_the_present_modules(former):
    from importlib import import_module

    module = import_module(former)
    assert module is import_module(FORMER[former])
    assert module.__name__ == FORMER[former] == module.__spec__.name
