"""What would fail late in a run is one line before its first step, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest

from detector.errors import InputError
from detector.training.lightning_module import read_checkpoint
from experiments.run.checks import check_devkit_names, check_writable

EARLY_STOPPING = ("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor")
CHECKPOINT = ("--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.monitor")
MODE = "--trainer.callbacks.mode"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((*EARLY_STOPPING, "val/mAP", MODE, "max"), ["EarlyStopping: monitor val/mAP", "no such metric", "val/AP50"]),
        ((*CHECKPOINT, "val_loss"), ["ModelCheckpoint: monitor val_loss", "no such metric", "train/loss_rpn_cls"]),
        ((*CHECKPOINT, "val/AP50_voc_class/zebra", MODE, "max"), ["no such metric", "val/proposal_recall@30"]),
        ((*CHECKPOINT, "val/AP", MODE, "max", "--trainer.limit_val_batches", "0"), ["no validations"]),
        ((*EARLY_STOPPING, "val/AP"), ["monitor val/AP", "higher", "mode: max"]),  # min is Lightning's default
        ((*CHECKPOINT, "train/loss", MODE, "max"), ["monitor train/loss", "lower", "mode: min"]),
        (("--runs_dir", "taken"), ["--runs_dir taken/tiny/seed0: ", "taken is a file; a folder is needed"]),
        (("--runs_dir", "taken/below"), ["--runs_dir taken/below/tiny/seed0: ", "taken is a file"]),
        (("--runs_dir", "/proc/nowhere"), ["--runs_dir /proc/nowhere/tiny/seed0: cannot be written to"]),
        (("--run_name", "n" * 300), ["n" * 300, "255 bytes"]),
        (("--trainer.precision", "64-true"), ["--trainer.precision 64-true: is not supported", "32-true, bf16-mixed"]),
        (("--trainer.precision", "16-true"), ["16-true: is not supported"]),
        (("--trainer.precision", "bf16-true"), ["bf16-true: is not supported"]),
        (("--trainer.precision", "64"), ["--trainer.precision 64: is not supported"]),
        (("--trainer.precision", "transformer-engine"), ["transformer-engine: is not supported"]),
        (
            ("--trainer.callbacks+", "LearningRateFinder", "--model.training_scheme", "alternating"),
            ["LearningRateFinder", "alternating has four optimisers"],
        ),
        (
            ("--data.augmentation", "[{class_path: albumentations.RandomCrop, init_args: {height: 900, width: 9}}]"),
            [".jpg: --data.augmentation: RandomCrop: ", "(900, 9)", "(width ", "height "],
        ),
        (
            (
                "--data.augmentation",
                "[{class_path: albumentations.CenterCrop, init_args: {height: 9, width: 900}}]",
            ),
            [".jpg: --data.augmentation: CenterCrop: ", "(width "],
        ),
        (("--trainer.accumulate_grad_batches", "0"), ["accumulate_grad_batches 0", "at least 1"]),
    ],
)
def test_one_line_before_the_first_step(options, wanted, tmp_path, tiny_config, frcnn) -> None:
    (tmp_path / "taken").write_text("a file")
    result = frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith("frcnn: ")
    assert [part for part in wanted if part not in line] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_precision_of_predict_that_is_not_supported(tmp_path, trained, frcnn) -> None:
    options = ("--ckpt_path", trained / "checkpoints" / "last.ckpt", "--images", tmp_path, "--output", tmp_path / "out")
    result = frcnn("predict", *options, "--precision", "bf16-true", cwd=tmp_path)
    assert result.code == 2
    assert "--precision bf16-true: is not supported" in result.err
    assert not (tmp_path / "out").exists()


def test_what_lightning_says_once_it_knows_the_data_is_one_line(tmp_path, tiny_config, frcnn) -> None:
    result = frcnn("fit", "--config", tiny_config, "--trainer.val_check_interval", 100, cwd=tmp_path)
    assert result.code == 2
    assert (
        "`val_check_interval` (100) must be less than or equal to the number of the training batches (6)"
        in (result.err.splitlines()[-1])
    )


def test_metrics_that_are_logged_can_be_watched(tmp_path, tiny_config, frcnn) -> None:
    (tmp_path / "logging_module.py").write_text(
        "import pytorch_lightning as pl\n"
        "class Own(pl.Callback):\n"
        "    def on_validation_epoch_end(self, trainer, pl_module): pl_module.log('own/number', 1.0)\n"
    )
    watch = ("val/AP50_voc_class/star", "val/proposal_AR@30_small", "val/AR@10", "own/number")
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": name, "mode": "max", "filename": f"watch{number}"}}
        for number, name in enumerate(watch)
    ]
    callbacks.append({"class_path": "logging_module.Own"})
    callbacks.append({"class_path": "EarlyStopping", "init_args": {"monitor": "train/loss"}})
    result = frcnn("fit", "--config", tiny_config, "--trainer.callbacks", json.dumps(callbacks), cwd=tmp_path)
    assert result.code == 0, result.err
    saved = {path.name for path in (tmp_path / "runs" / "tiny" / "seed0" / "checkpoints").iterdir()}
    assert {f"watch{number}.ckpt" for number in range(4)} <= saved


@pytest.mark.parametrize("name", ["traffic light/red", "a\0b", "new\nline", "x" * 250, "猫" * 90])
def test_class_names_that_are_no_file_names(name) -> None:
    with pytest.raises(InputError, match=r"--save_devkit_results: .*for the class"):
        check_devkit_names(["star", name])


def test_class_names_that_are_file_names() -> None:
    check_devkit_names(["..", ".hidden", "traffic light", "a.b", "猫", "x" * 235, "-"])


def test_devkit_files_are_thought_of_before_the_test(tmp_path, mini_voc, tiny_config, trained, frcnn) -> None:
    data = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    for path in (data / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<name>star</name>", "<name>star/sun</name>"))
    run = Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))
    options = ("test", "--config", tiny_config, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    result = frcnn(*options, "--data.root", data, "--save_devkit_results", "devkit", cwd=tmp_path)
    assert result.code == 2
    assert "'star/sun'" in result.err.splitlines()[-1]
    result = frcnn(*options, "--save_devkit_results", tiny_config / "devkit", cwd=tmp_path)
    assert result.code == 2
    assert "tiny.yaml is a file" in result.err.splitlines()[-1]
    result = frcnn(*options, "--results_dir", tiny_config, cwd=tmp_path)
    assert result.code == 2
    assert f"--results_dir {tiny_config}: " in result.err.splitlines()[-1]
    assert not (tmp_path / "devkit").exists()


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)  # root may write everywhere
    with pytest.raises(InputError, match=r"--runs_dir .*new: cannot be written to \(Permission denied\)"):
        check_writable(tmp_path / "new", "--runs_dir")


RATES = """
import json
import pytorch_lightning as pl

class Rates(pl.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        self.steps.append([rates, [target["file_name"] for target in batch[1]]])

    def on_train_end(self, trainer, pl_module):
        json.dump({"steps": self.steps, "lr": pl_module.lr}, open("rates.json", "w"))
"""


def test_the_learning_rate_finder_only_changes_the_rate(tmp_path, tiny_config, frcnn) -> None:
    (tmp_path / "rates_module.py").write_text(RATES)
    finder = {"num_training_steps": 16, "min_lr": 1e-4, "max_lr": 1e-2, "early_stop_threshold": None}
    found = {"class_path": "LearningRateFinder", "init_args": finder}
    witness = {"class_path": "rates_module.Rates"}
    epochs = ("--trainer.max_epochs", 3, "--model.optimizer.new_layer_lr_factor", 2)
    seen = []
    for callbacks in ([witness], [found, witness]):
        options = ("--config", tiny_config, *epochs, "--trainer.callbacks", json.dumps(callbacks))
        result = frcnn("fit", *options, cwd=tmp_path)
        assert result.code == 0, result.err
        seen.append(json.loads((tmp_path / "rates.json").read_text()))
    without, after = seen
    assert without["lr"] == 0.003
    assert 1e-4 < after["lr"] < 1e-2
    assert after["lr"] != 0.003
    assert [files for _, files in after["steps"]] == [files for _, files in without["steps"]]
    for (rates, _), (old, _) in zip(after["steps"], without["steps"], strict=True):  # the same schedule, scaled
        assert rates == pytest.approx({name: rate * after["lr"] / 0.003 for name, rate in old.items()})
    last = tmp_path / "runs" / "tiny" / "seed0-2" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["hyper_parameters"]["optimizer"]["lr"] == after["lr"]
