"""Faster R-CNN; here the names of PASCAL VOC's classes."""

from detector.use.class_names import VOC_CLASSES, VOC_TO_COCO

__all__ = ["VOC_CLASSES", "VOC_TO_COCO"]
