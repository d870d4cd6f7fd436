"""A run that goes on inside an epoch sees exactly what remains of it, under Lightning's own trainer."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from detector.errors import InputError

STEPS = {"max_epochs": -1, "max_steps": 15}


class _Recorder(pl.LightningModule):
    """Records (epoch, image_id, boxes) of all it is trained on."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        for target in batch[1]:
            self.seen.append((self.current_epoch, target["image_id"].item(), target["boxes"].tolist()))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def fit(plain, voc_data):
    """`fit(callback, ckpt_path, fail_at, data, **limits)`: train for three epochs of five steps of two images; gives
    back what was seen."""

    def run(callback=None, ckpt_path=None, fail_at=None, data=None, **limits):
        module, options = _Recorder(fail_at), {"max_epochs": 3, **limits}
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=callback is not None,
            callbacks=[callback] if callback else None,
            num_sanity_val_steps=1,
            **options,
        )
        trainer.fit(module, datamodule=data or voc_data(plain, seed=1), ckpt_path=ckpt_path)
        return module.seen

    return run


@pytest.mark.parametrize("limits", [{}, STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({"every_n_train_steps": 1}, (3, 5, 8)),  # 5: the last batch of an epoch
        ({"save_on_train_epoch_end": True}, (5, 10)),
        ({"save_on_train_epoch_end": False}, (5, 10)),  # at the end of the validation
    ],
    ids=["batch_end", "epoch_end", "validation_end"],
)
def test_resumed_run_sees_exactly_what_remains(tmp_path, limits, when, steps, fit):
    callback = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{step}", save_top_k=-1, **when)
    whole = fit(callback, **limits)
    assert len(whole) == 30 and {epoch for epoch, _, _ in whole} == {0, 1, 2}
    for step in steps:
        assert fit(ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt", **limits) == whole[2 * step :]


@pytest.mark.parametrize("fail_at", [0, 4, 5, 7])
def test_run_that_failed_goes_on_where_it_failed(tmp_path, fail_at, fit):
    whole = fit()
    callback = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(callback, fail_at=fail_at)
    assert fit(ckpt_path=tmp_path / "failed.ckpt") == whole[2 * fail_at :]


def test_resume_with_workers_and_validation_inside_the_epoch(tmp_path, plain, voc_data, fit):
    options = {"val_check_interval": 2, "max_epochs": 2}
    callback = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    whole = fit(callback, **options)
    data = voc_data(plain, seed=1, num_workers=2)
    assert fit(ckpt_path=tmp_path / "step=7.ckpt", data=data, **options) == whole[14:]


def test_changed_batch_size_is_refused_in_the_middle_of_an_epoch_only(tmp_path, plain, voc_data, fit):
    for when in ({"every_n_train_steps": 3}, {"save_on_train_epoch_end": True}):
        fit(ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **when), max_epochs=1)
    with pytest.raises(InputError, match=r"middle of epoch 0 with batch_size 2, now 5"):
        fit(ckpt_path=tmp_path / "step=3.ckpt", data=voc_data(plain, seed=1, batch_size=5))
    seen = fit(ckpt_path=tmp_path / "step=5.ckpt", data=voc_data(plain, seed=1, batch_size=5), max_epochs=2)
    assert sorted(image for _, image, _ in seen) == list(range(10)) and {epoch for epoch, _, _ in seen} == {1}
