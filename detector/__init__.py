"""Faster R-CNN; here the names of PASCAL VOC's classes, and what uses a trained detector."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detector.use.class_names import VOC_CLASSES, VOC_TO_COCO

if TYPE_CHECKING:
    from detector.use.detections import Detections
    from detector.use.loading import TrainedDetector, load

__all__ = ["VOC_CLASSES", "VOC_TO_COCO", "Detections", "TrainedDetector", "load"]
_LATER = {"Detections": "detections", "TrainedDetector": "loading", "load": "loading"}  # torch takes seconds to import


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"detector.use.{_LATER[name]}"), name)
    raise AttributeError(f"module 'detector' has no attribute {name!r}")
