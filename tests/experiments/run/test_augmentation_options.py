"""Every augmentation, cache and batching option trains from the command line."""

import pytest
import yaml

from datamodules.augmentation.recipes import AUGMENTATIONS

LIST = (
    "[{class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}, "
    "{class_path: torchvision.transforms.v2.RandomIoUCrop}, {class_path: datamodules.augmentation.mixing.Mosaic}]"
)


@pytest.mark.parametrize("augmentation", [*AUGMENTATIONS, LIST])
def test_fast_dev_run(frcnn, tiny_config, tmp_path, augmentation):
    result = frcnn(
        *("fit", "--config", tiny_config, "--data.augmentation", augmentation, "--trainer.fast_dev_run", "true"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err


def test_a_run_with_everything_goes_on_from_its_own_config(frcnn, tiny_config, tmp_path, metrics_of):
    """A list, grouped batches and a cache on disk: the saved config holds them, and the run resumes with it."""
    options = ("--data.augmentation", LIST, "--data.group_by_aspect", "true", "--data.cache_images", "disk")
    cache = tmp_path / "cache"
    result = frcnn("fit", "--config", tiny_config, *options, "--data.image_cache_dir", cache, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "group_by_aspect: " in result.err and len(list(cache.rglob("*.npy"))) == 12
    run = tmp_path / "runs" / "tiny" / "seed0"
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert data["augmentation"] == yaml.safe_load(LIST)
    assert data["group_by_aspect"] is True and data["cache_images"] == "disk"
    again = ("--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    result = frcnn("fit", *again, "--trainer.max_epochs", 2, cwd=tmp_path)
    assert result.code == 0, result.err
    assert metrics_of(run)["step"] == 12


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("augmentation", "[{class_path: albumentations.HorizontalFlip, init_args: {q: 1}}]", "'q'"),
        ("augmentation", "[{class_path: collections.OrderedDict}]", "no transform of albumentations"),
        ("augmentation", "cutmix", "'cutmix' is unknown"),
        ("cache_images", "ram", "ram"),
        ("group_by_aspect", "perhaps", "group_by_aspect"),
    ],
)
def test_bad_values(frcnn, tiny_config, tmp_path, option, value, words):
    result = frcnn("fit", "--config", tiny_config, f"--data.{option}", value, cwd=tmp_path)
    assert result.code == 2 and words in result.err
    assert "Traceback" not in result.err and not (tmp_path / "runs").exists()
