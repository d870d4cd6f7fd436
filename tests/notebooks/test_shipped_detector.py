"""The small trained detector in the package: its size, and how well it detects."""

import importlib.util
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


def test_a_checkpoint_is_shrunk_to_what_detecting_needs(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "notebooks/train_detector.py"
    spec = importlib.util.spec_from_file_location("train_detector", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = torch.load(CHECKPOINT, weights_only=True)
    state = {name: tensor.float() for name, tensor in given["state_dict"].items()}
    torch.save(given | {"state_dict": state, "optimizer_states": [torch.zeros(9)]}, tmp_path / "large.ckpt")
    script.shrink(tmp_path / "large.ckpt", tmp_path / "small.ckpt")
    small = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert small.keys() == given.keys() and "optimizer_states" not in small
    for name, tensor in small["state_dict"].items():
        assert tensor.dtype == (torch.float16 if tensor.dim() > 1 else torch.float32)
        assert torch.equal(tensor.float(), state[name])
