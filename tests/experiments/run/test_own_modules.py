"""Modules in the current folder are found by their class paths, and hide nothing of this project or of Python."""

import pytest

EXAMPLES = "experiments.examples"
CALLBACK = """
import json, sys
import pytorch_lightning as pl

class Witness(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        json.dump(sys.path, open("seen.json", "w"))
"""
AUGMENTATION = """
from datamodules.augmentation.transforms import HorizontalFlip

class Mirror(HorizontalFlip):
    def apply(self, sample, rng, partner):
        open("mirrored", "w").close()
        return super().apply(sample, rng, partner)
"""


def test_callbacks_and_augmentations_of_the_current_folder_are_found(tmp_path, tiny_config, frcnn) -> None:
    (tmp_path / "witness_module.py").write_text(CALLBACK)
    (tmp_path / "own_steps").mkdir()
    (tmp_path / "own_steps" / "mirror_module.py").write_text(AUGMENTATION)
    result = frcnn(
        "fit",
        *("--config", tiny_config),
        *("--trainer.callbacks+", "witness_module.Witness"),
        *("--data.augmentation", "[{class_path: own_steps.mirror_module.Mirror, init_args: {p: 1.0}}]"),
        *("--data.num_workers", 1),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert (tmp_path / "mirrored").is_file()  # written by the worker that loads the images
    assert str(tmp_path) == eval((tmp_path / "seen.json").read_text())[-1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--trainer.callbacks+", "nowhere.Callback"), ["--trainer.callbacks nowhere.Callback: No module", "{cwd}"]),
        (("--trainer.logger", "nowhere.Logger"), ["--trainer.logger nowhere.Logger: No module", "{cwd}"]),
        (("--data.augmentation", "[{class_path: nowhere.Step}]"), ["nowhere.Step: No module", "{cwd}"]),
        (("--trainer.callbacks+", "present_module.Misspelt"), ["present_module.Misspelt", "no attribute 'Misspelt'"]),
        (("--data.augmentation", "[{class_path: present_module.Misspelt}]"), ["no attribute 'Misspelt'"]),
        (("--trainer.callbacks+", "broken_module.Any"), ["--trainer.callbacks", "broken_module.py, line 1"]),
        (("--data.augmentation", "[{class_path: broken_module.Any}]"), ["broken_module.Any", "broken_module.py, line"]),
        (("--data.augmentation", "[{class_path: importing_module.Any}]"), ["importing_module.Any", "'not_there'"]),
        (
            ("--trainer.callbacks+", "collections.OrderedDict"),
            ["callbacks collections.OrderedDict: is not a class that"],
        ),
        (("--trainer.logger", "collections.OrderedDict"), ["collections.OrderedDict: is not a class that inherits"]),
        (
            ("--trainer.callbacks+", f"{EXAMPLES}.callback.ImagesSeen", "--trainer.callbacks.evry", "3"),
            [f"--trainer.callbacks {EXAMPLES}.callback.ImagesSeen: has no argument evry"],
        ),
        (
            ("--trainer.callbacks", f"[{{class_path: {EXAMPLES}.callback.ImagesSeen, init_args: {{every: [1]}}}}]"),
            ["--trainer.callbacks.every [1]: must be a whole number"],
        ),
        (
            ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "x", "--trainer.logger.nam", "y"),
            ["--trainer.logger pytorch_lightning.loggers.CSVLogger: has no argument nam"],
        ),
        (
            ("--data.augmentation", f"[{{class_path: {EXAMPLES}.augmentation.QuarterTurns, init_args: {{least: 1}}}}]"),
            ["--data.augmentation: ", "QuarterTurns", "unexpected keyword argument 'least'"],
        ),
        (
            ("--data.augmentation", f"[{{class_path: {EXAMPLES}.callback.ImagesSeen}}]"),
            ["ImagesSeen: it is no transform of albumentations or torchvision.transforms.v2"],
        ),
        (("--trainer.logger", "CSVLogger"), ["--trainer.logger", "CSVLogger: the following arguments", "save_dir"]),
        (
            ("--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.mode", "most"),
            ["--trainer: ", "`mode` can be", "but got most", "ModelCheckpoint"],
        ),
    ],
)
def test_a_class_that_is_not_found_is_one_line(options, wanted, tmp_path, tiny_config, frcnn) -> None:
    (tmp_path / "present_module.py").write_text("")
    (tmp_path / "broken_module.py").write_text("def f(:\n")
    (tmp_path / "importing_module.py").write_text("import not_there\n")
    result = frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith("frcnn: --")
    assert [part for part in wanted if part.replace("{cwd}", str(tmp_path)) not in line] == []
    assert "Expected a" not in line
    assert not (tmp_path / "runs").exists()
