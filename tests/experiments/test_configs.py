"""Every experiment file: the command in its first line works, and the model that it describes can be built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from detector.training.lightning_module import FasterRCNNModule
from experiments.run.option_table import config_of_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "experiments").glob("*.yaml"))

# Ren et al. 2015 (NIPS; arXiv 1506.01497v3): section 3.1.1 (anchors), 3.1.3 (sampling and optimiser), 3.3
# (implementation) and 4; the RoI part is Fast R-CNN's (Girshick 2015, section 2.3), whose end-to-end release set
# 50,000 of 70,000 steps for the first learning rate.
PAPER: dict[str, Any] = {
    "model.backbone.name": "vgg16",
    "model.backbone.frozen_stages": 2,
    "model.backbone.dropout": 0.5,
    "model.anchors.scales": [8.0, 16.0, 32.0],
    "model.anchors.base_size": 16.0,
    "model.anchors.aspect_ratios": [0.5, 1.0, 2.0],
    "model.anchors.straddling": "drop",
    "model.rpn.hidden_channels": 512,
    "model.rpn.objectness": "softmax",
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.best_per_object": True,
    "model.rpn.samples_per_image": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.nms_iou": 0.7,
    "model.rpn.pre_nms_train": 12000,
    "model.rpn.post_nms_train": 2000,
    "model.rpn.pre_nms_test": 6000,
    "model.rpn.post_nms_test": 300,
    "model.rpn.min_side": 16.0,
    "model.roi.samples_per_image": 128,
    "model.roi.positive_fraction": 0.25,
    "model.roi.positive_iou": 0.5,
    "model.roi.pooling": "roi_pool",
    "model.roi.reg_beta": 1.0,
    "model.roi.nms_iou": 0.3,
    "model.image.shortest_side": [600],
    "model.image.longest_side": 1000,
    "model.optimizer.name": "sgd",
    "model.optimizer.lr": 0.001,
    "model.optimizer.momentum": 0.9,
    "model.optimizer.weight_decay": 0.0005,
    "model.optimizer.gamma": 0.1,
    "trainer.max_steps": 70000,
    "data.train_splits": ["2007_trainval"],
    "data.batch_size": 1,
    "data.augmentation": "flip",
}


def test_there_are_experiments():
    assert {path.name for path in CONFIGS} >= {"mini_voc.yaml", "voc07_vgg16.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_first_line_is_the_command_that_runs_it(resolve_first_line, path):
    resolve_first_line(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_model_is_built(resolve, path):
    """Without memory (VGG-16 has half a gigabyte), and with random weights, which nothing may freeze."""
    options = resolve("--config", path.relative_to(ROOT))
    model = options.model.as_dict()
    model["backbone"] |= {"weights": "none", "frozen_stages": 0, "norm": "batch"}
    with torch.device("meta"):
        module = FasterRCNNModule(**(model | {"class_names": [f"class{n}" for n in range(20)]}))
    anchors = options.model.anchors
    scales = anchors.scales[0] if isinstance(anchors.scales[0], list) else anchors.scales
    per_location = len(scales) * len(anchors.aspect_ratios)
    assert module.model.rpn.head.deltas.out_channels == 4 * per_location
    assert module.model.roi_heads.predictor.scores.out_features == 21
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert len(options.data.train_splits) >= 1
    if options.model.optimizer.ema_decay == 0:
        assert options.model.optimizer.name == "sgd"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_training_image_is_evaluated_on(resolve, path):
    data = resolve("--config", path.relative_to(ROOT)).data
    assert not set(data.train_splits) & {*data.val_splits, *(data.test_splits or [])}


@pytest.mark.parametrize("key", PAPER)
def test_vgg16_options_are_those_of_the_paper(vgg16_options, key):
    assert vgg16_options[key] == PAPER[key]


@pytest.fixture(scope="module")
def vgg16_options(resolve) -> Any:
    return resolve("--config", "experiments/voc07_vgg16.yaml")


def test_vgg16_drops_the_learning_rate_once_after_50000_steps(vgg16_options):
    from detector.training.optimization import OptimizerConfig, lr_factor

    factor = lr_factor(OptimizerConfig(**vgg16_options.model.optimizer.as_dict()), 70000)
    assert [factor(step) for step in (0, 1, 49_900)] == [1, 1, 1]
    assert [factor(step) for step in (50_100, 69_999)] == pytest.approx([0.1, 0.1])


def test_configuration_of_a_checkpoint_in_a_folder_named_by_axes(tmp_path: Path) -> None:
    run = tmp_path / "scales=4-8,seed=0-12345678"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    path = str(run / "checkpoints" / "last.ckpt")
    Path(path).touch()
    expected = ["--config", str(run / "config.yaml")]
    assert config_of_checkpoint(["--ckpt_path", path]) == expected
    assert config_of_checkpoint([f"--ckpt_path={path}"]) == expected
