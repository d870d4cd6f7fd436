"""Operators that become ONNX's own: non-maximum suppression within groups, and RoIPool."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
import torchvision  # noqa: F401  # for its operators
from onnx import numpy_helper
from onnxscript import opset18 as op
from torch import Tensor

from experiments.export.network import suppress_by_torchvision


@torch.library.custom_op("frcnn::nms_in_groups", mutates_args=())
def suppress_in_onnx(boxes: Tensor, scores: Tensor, threshold: float, iou: float) -> Tensor:
    """Return the mask (G, n) of the boxes (G, n, 4) with scores (G, n) that are kept."""
    return suppress_by_torchvision(boxes, scores, threshold, iou)


@suppress_in_onnx.register_fake
def _mask_of(boxes: Tensor, scores: Tensor, threshold: float, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _in_onnx(boxes: Any, scores: Any, threshold: float, iou: float) -> Any:
    """Return the mask in ONNX's operators: groups are its images, each with a single class."""
    number = op.Shape(scores, start=1, end=2)
    rows = op.Unsqueeze(scores, op.Constant(value_ints=[1]))
    limits = op.Constant(value_floats=[iou]), op.Constant(value_floats=[threshold])
    kept = op.NonMaxSuppression(boxes, rows, number, *limits)  # (kept boxes, 3): group, class, box
    none = op.ConstantOfShape(op.Shape(rows), value=numpy_helper.from_array(np.zeros(1, np.float32)))
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(kept, start=0, end=1))
    return op.Cast(op.Squeeze(op.ScatterND(none, kept, ones), op.Constant(value_ints=[1])), to=9)  # 9: bool


def _roi_pool(features: Any, rois: Any, scale: float, height: int, width: int) -> Any:
    """Return what RoIPool does in ONNX, and in place of the cells of its maxima, which nobody asks for, the same."""
    pooled = op.MaxRoiPool(features, rois, pooled_shape=[height, width], spatial_scale=scale)
    return pooled, op.Identity(pooled)


TRANSLATIONS: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    torch.ops.frcnn.nms_in_groups.default: _in_onnx,
    torch.ops.torchvision.roi_pool.default: _roi_pool,
}
