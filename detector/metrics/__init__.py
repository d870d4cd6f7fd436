"""Metrics: VOC and COCO average precision of detections, recall of proposals."""

from detector.metrics.detection_ap import DetectionAP
from detector.metrics.proposal_recall import ProposalRecall
from detector.metrics.voc_ap import evaluate_voc

__all__ = ["DetectionAP", "ProposalRecall", "evaluate_voc"]
