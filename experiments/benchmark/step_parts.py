"""One training step or one inference of the detector in parts, each timed by itself.

A training step is cut where its parts meet: the backward pass of each part runs by itself on the gradients that the
next one gave. The sum of the parts is the same step, and the same gradients.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from detector.faster_rcnn import FasterRCNN
from detector.image_batch import all_to_original, ground_truth, make_batch
from detector.kernels.parts import (
    BACKBONE,
    BOX_HEAD,
    DETECTIONS,
    IMAGES,
    LOSSES,
    OPTIMIZER,
    POOLING,
    PROPOSALS,
    RPN_HEAD,
    TARGETS,
)
from detector.rpn import RPNOutput
from experiments.benchmark.measuring import Clock, Parts
from experiments.benchmark.models import Batch
from experiments.benchmark.programs import Setting, autocast, our_optimizer, products_of

NETWORK_PARTS: Final = (BACKBONE, BOX_HEAD)
"""The parts that any detector with these layers has to run; all others are the detector's own."""


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _backward(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Send the gradients that came to `leaves`, copies of `outputs`, through the graph of `outputs`."""
    pairs = [(out, leaf.grad) for out, leaf in zip(outputs, leaves, strict=True) if out.requires_grad]
    pairs = [(out, gradient) for out, gradient in pairs if gradient is not None]
    torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])


def parts_program(model: FasterRCNN, batch: Batch, precision: str, setting: Setting) -> Callable[[], Parts]:
    """Return a function that runs one step, or inference, in parts, and returns the milliseconds of each."""
    context = autocast(precision, setting.device)
    optimizer = our_optimizer(model) if setting.kind == "train" else None

    def run() -> Parts:
        with products_of(precision):
            if optimizer is None:
                return inference_parts(model, batch[0], context)
            return training_parts(model, batch, optimizer, context)

    return run


def training_parts(
    model: FasterRCNN, images_and_targets: Batch, optimizer: torch.optim.Optimizer, autocast: torch.autocast
) -> Parts:
    """Return the milliseconds of each part of one training step, which changes the weights as any other."""
    images, targets = images_and_targets
    clock = Clock(images[0].device)
    optimizer.zero_grad()
    with autocast:
        with clock(IMAGES):
            batch = make_batch(images, model.image_config, training=True)
            truths = ground_truth(targets, batch)
        with clock(BACKBONE):
            features = model.backbone(batch.tensors)
        features_in = [_leaf(level) for level in features]
        with clock(RPN_HEAD):
            output = model.rpn(features_in)
        rpn_leaves = [_leaf(tensor) for tensor in (*output.logits, *output.deltas)]
        levels = len(features)
        output_in = RPNOutput(rpn_leaves[:levels], rpn_leaves[levels:], output.anchors)
        with clock(PROPOSALS):
            proposals = model.rpn.proposals(output_in, batch)
        with clock(TARGETS):
            anchors = model.rpn.sample_anchors(output_in, batch, truths, model.difficult)
            rois = model.roi_heads.sample_rois(proposals, truths, model.difficult, features_in)
        with clock(POOLING):
            pooled = model.roi_heads.pool(features_in, [roi.boxes for roi in rois])
        pooled_in = _leaf(pooled)
        with clock(BOX_HEAD):
            logits, deltas = model.roi_heads.predict(pooled_in)
        logits_in, deltas_in = _leaf(logits), _leaf(deltas)
        with clock(LOSSES):
            losses = model.rpn.losses_of(output_in, anchors, batch)
            losses |= model.roi_heads.losses(logits_in, deltas_in, rois)
            total = model.with_total(losses)["loss"]
    with clock(LOSSES):
        total.backward()
    with clock(BOX_HEAD):
        _backward([logits, deltas], [logits_in, deltas_in])
    with clock(POOLING):
        _backward([pooled], [pooled_in])
    with clock(RPN_HEAD):
        _backward([*output.logits, *output.deltas], rpn_leaves)
    with clock(BACKBONE):
        _backward(features, features_in)
    with clock(OPTIMIZER):
        optimizer.step()
    return clock.times


def inference_parts(model: FasterRCNN, images: Sequence[Tensor], autocast: torch.autocast) -> Parts:
    """Return the milliseconds of each part of one inference."""
    clock = Clock(images[0].device)
    with torch.inference_mode(), autocast:
        with clock(IMAGES):
            batch = make_batch(images, model.image_config, training=False)
        with clock(BACKBONE):
            features = model.backbone(batch.tensors)
        with clock(RPN_HEAD):
            output = model.rpn(features)
        with clock(PROPOSALS):
            proposals = model.rpn.proposals(output, batch)
        with clock(POOLING):
            pooled = model.roi_heads.pool(features, proposals)
        with clock(BOX_HEAD):
            logits, deltas = model.roi_heads.predict(pooled)
        with clock(DETECTIONS):
            model.roi_heads.detections(logits, deltas, proposals, batch)
            all_to_original(proposals, batch)
    return clock.times
