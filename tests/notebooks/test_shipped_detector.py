"""The small trained detector in the package: its size, and how well it detects."""

from pathlib import Path

import torch

import experiments
from datamodules.mini_voc.scene import CLASS_NAMES, draw_scene
from detector.metrics.detection_ap import DetectionAP
from detector.training.lightning_module import FasterRCNNModule

CHECKPOINT = Path(experiments.__file__).parent / "weights/mini_voc.ckpt"


def test_it_detects_shapes_in_images_that_it_was_not_trained_on() -> None:
    """The first test images of MiniVOC, which are the same whatever its number of images."""
    assert CHECKPOINT.stat().st_size < 2_000_000
    module = FasterRCNNModule.from_checkpoint(CHECKPOINT)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    metric = DetectionAP(CLASS_NAMES, coco=False)
    for index in range(3, 203, 5):
        scene = draw_scene(0, index)
        target = {
            "boxes": torch.tensor([item.box for item in scene.objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([CLASS_NAMES.index(item.name) + 1 for item in scene.objects], dtype=torch.int64),
            "difficult": torch.tensor([item.is_difficult() for item in scene.objects], dtype=torch.bool),
            "image_id": torch.tensor(index),
        }
        with torch.inference_mode():
            metric.update(module([torch.from_numpy(scene.image).permute(2, 0, 1)]), [target])
    assert float(metric.compute()["AP50_voc"]) > 0.85
