"""Whatever the loggers: a run's own files are in its run folder, where `frcnn validate --ckpt_path` finds them."""

from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

FILES = ("config.yaml", "metrics.json", "predictions.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
TENSORBOARD = "{class_path: TensorBoardLogger, init_args: {save_dir: events}}"
CSV = "{class_path: pytorch_lightning.loggers.CSVLogger, init_args: {save_dir: tables}}"


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.logger", "pytorch_lightning.loggers.CSVLogger", "--trainer.logger.save_dir", "tables"),
        ("--trainer.logger", f"[{TENSORBOARD}, {CSV}]"),
        ("--trainer.logger", f"[{CSV}, {TENSORBOARD}]"),
        ("--trainer.logger", "false"),
        ("--trainer.logger", "[]"),
    ],
    ids=["csv", "tensorboard_and_csv", "csv_and_tensorboard", "false", "empty_list"],
)
def test_a_run_is_whole_and_found_again_with_any_loggers(options, tmp_path, tiny_config, frcnn) -> None:
    assert frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path).code == 0
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert [path for path in tmp_path.rglob("config.yaml") if path.parent != run] == []
    table, events = "CSVLogger" in "".join(options), "TensorBoardLogger" in "".join(options)
    assert len(list(tmp_path.glob("tables/**/metrics.csv"))) == table
    assert len(list(tmp_path.glob("events/**/events.*"))) == events

    (run / "predictions.json").unlink()
    assert frcnn("validate", "--ckpt_path", run / "checkpoints" / "best.ckpt", cwd=tmp_path).code == 0
    assert (run / "predictions.json").is_file()  # the run's own configuration was found, and its folder written to


class PictureLogger(CSVLogger):
    """Takes images as Weights & Biases does."""

    taken: ClassVar[dict[str, tuple[Any, int]]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert step is not None
        (picture,) = images
        self.taken[key] = (picture, step)


def test_every_logger_gets_what_it_can_take(tmp_path, tiny_config, frcnn, metrics_of, monkeypatch) -> None:
    monkeypatch.setattr("pytorch_lightning.loggers.PictureLogger", PictureLogger, raising=False)
    picture_logger = "{class_path: pytorch_lightning.loggers.PictureLogger, init_args: {save_dir: pictures}}"
    result = frcnn("fit", "--config", tiny_config, "--trainer.logger", f"[{CSV}, {picture_logger}]", cwd=tmp_path)
    assert result.code == 0, result.err

    assert "train_anchors/table" in PictureLogger.taken
    assert len([name for name in PictureLogger.taken if name.startswith("val_images/")]) == 7, "of the split `odd`"
    for name, (picture, step) in PictureLogger.taken.items():
        expected = 5 if name.startswith("val_curves/") else 6  # curves are logged with the numbers of the validation
        assert (picture.dtype, picture.ndim, picture.shape[2], step) == (np.uint8, 3, 3, expected)
        (file,) = tmp_path.glob(f"tables/lightning_logs/version_0/{name}/00000{expected}.png")
        assert np.array_equal(np.asarray(Image.open(file)), picture)
    assert len(list(tmp_path.glob("tables/**/*.png"))) == len(PictureLogger.taken)

    (table,) = tmp_path.glob("tables/**/metrics.csv")
    header, *rows = [line.split(",") for line in table.read_text().splitlines()]
    column = header.index("val/AP50_voc07")
    (value,) = [float(row[column]) for row in rows if row[column]]
    assert value == pytest.approx(metrics_of(tmp_path / "runs" / "tiny" / "seed0")["val/AP50_voc07"], abs=1e-6)
    assert any(row[header.index("train/peak_memory_mib")] for row in rows)
    for folder in (tmp_path / "tables", tmp_path / "pictures"):
        (written,) = folder.glob("**/hparams.yaml")
        assert "optimizer/lr: 0.003" in written.read_text()
