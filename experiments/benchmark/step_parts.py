"""One training step or one inference of the detector in parts, each timed by itself.

A training step is cut where its parts meet: the backward pass of each part runs by itself on the gradients that the
next one gave. The sum of the parts is the same step, and the same gradients.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from detector.cascade import mean_logits, next_proposals, refined, summed
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


class _Cut:
    """Outputs of a part, and copies of them, the leaves, that the next part takes: their gradients come back here."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = outputs
        self.leaves = [output.detach().requires_grad_() for output in outputs]

    def backward(self) -> None:
        """Send the gradients that came to the leaves through the graph of the outputs."""
        pairs = [(out, leaf.grad) for out, leaf in zip(self.outputs, self.leaves, strict=True) if out.requires_grad]
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
            features = _Cut(model.backbone(batch.tensors))
        with clock(RPN_HEAD):
            output = model.rpn(features.leaves)
        rpn, levels = _Cut([*output.logits, *output.deltas]), len(features.leaves)
        output_in = RPNOutput(rpn.leaves[:levels], rpn.leaves[levels:], output.anchors)
        with clock(PROPOSALS):
            proposals = model.rpn.proposals(output_in, batch)
        with clock(TARGETS):
            anchors = model.rpn.sample_anchors(output_in, batch, truths, model.difficult)
        stages, of_stages = model.roi_heads.stages, list[dict[str, Tensor]]()
        pools, heads = list[_Cut](), list[_Cut]()
        for stage in stages:
            with clock(TARGETS):
                rois = stage.sample_rois(proposals, truths, model.difficult, features.leaves)
            with clock(POOLING):
                pools.append(_Cut([stage.pool(features.leaves, [own.boxes for own in rois])]))
            with clock(BOX_HEAD):
                heads.append(_Cut(stage.predict(*pools[-1].leaves)))
            with clock(LOSSES):
                logits, deltas = heads[-1].leaves
                of_stages.append(stage.losses(logits, deltas, rois))
            if stage is not stages[-1]:
                with clock(TARGETS):
                    proposals = next_proposals(stage, deltas, rois, proposals, batch)
        with clock(LOSSES):
            losses = model.rpn.losses_of(output_in, anchors, batch)
            losses |= summed(of_stages, model.roi_heads.config.cascade_weights)
            total = model.with_total(losses)["loss"]
    with clock(LOSSES):
        total.backward()
    for name, cuts in ((BOX_HEAD, heads), (POOLING, pools), (RPN_HEAD, [rpn]), (BACKBONE, [features])):
        with clock(name):
            for cut in cuts:
                cut.backward()
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
        stages, of_stages, rois = model.roi_heads.stages, list[Tensor](), proposals
        for stage in stages:
            with clock(POOLING):
                pooled = stage.pool(features, rois)
            with clock(BOX_HEAD):
                logits, deltas = stage.predict(pooled)
            of_stages.append(logits)
            if stage is not stages[-1]:
                with clock(DETECTIONS):
                    rois = refined(stage, deltas, rois, batch)
        with clock(DETECTIONS):
            model.roi_heads.detections(mean_logits(of_stages), deltas, rois, batch)
            all_to_original(proposals, batch)
    return clock.times
