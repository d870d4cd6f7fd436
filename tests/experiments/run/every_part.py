"""One part of each kind."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from detector.anchors import AnchorShapes
from detector.assignment import IoUMatcher, Matcher
from detector.backbones.base import BackbonePart, Body, BoxHeadPart, Kind, SingleLevel
from detector.backbones.box_heads import BoxHead
from detector.boxes import BoxCoder
from detector.losses import BoxLoss, ClassLoss, ObjectnessLoss
from detector.post_processing import Candidates, Suppression
from detector.rpn import RPNHeadPart
from detector.sampling import NEGATIVE, POSITIVE, Sampler
from detector.training.optimization import OptimizerPart, Schedule


class TinyBody(Body):
    strides = (8,)

    def __init__(self, width):
        super().__init__()
        self.channels = (width,)
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())

    def stages(self):
        return [[self.first], [self.second]]


@dataclass
class Tiny(BackbonePart):
    """A tiny network.

    Args:
        width: Channels.
    """

    width: int = 16
    kind = Kind(2, batch_norm=False, imagenet=0)

    def build(self, options):
        return SingleLevel(TinyBody(self.width))


class MeanHead(BoxHead):
    def forward(self, pooled):
        return pooled.mean(dim=(2, 3))


@dataclass
class Mean(BoxHeadPart):
    pool: int = 4

    def build(self, in_channels, options):
        return MeanHead(self.pool, in_channels, in_channels)


@dataclass
class Squares(AnchorShapes):
    sides: list[float] = field(default_factory=lambda: [20.0, 40.0])

    def __call__(self, level):
        half = torch.tensor(self.sides)[:, None] / 2
        return torch.cat((-half, -half, half, half), dim=1)


class Linear(nn.Module):
    def __init__(self, channels, anchors):
        super().__init__()
        self.layer = nn.Conv2d(channels, 5 * anchors, 1)
        nn.init.normal_(self.layer.weight, std=0.01)

    def forward(self, features):
        found = [self.layer(level.float()).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 5)) for level in features]
        return [own[..., 0] for own in found], [own[..., 1:] for own in found]


class LinearHead(RPNHeadPart):
    def build(self, in_channels, anchors_per_location, config):
        return Linear(in_channels, anchors_per_location[0])


@dataclass
class Halves(Matcher):
    iou: float = 0.5

    def __call__(self, candidates, objects, around):
        return IoUMatcher(self.iou, (0.0, self.iou))(candidates, objects, around)


class First(Sampler):
    def __call__(self, matches, number, positive_fraction):
        positives = (matches.kind == POSITIVE).nonzero()[:, 0][: int(number * positive_fraction)]
        return positives, (matches.kind == NEGATIVE).nonzero()[:, 0][: number - len(positives)]


@dataclass
class Corners(BoxCoder):
    unit: float = 16.0

    def encode(self, boxes, references):
        return (boxes.float() - references) / self.unit

    def decode(self, deltas, references):
        return deltas.float() * self.unit + references


@dataclass
class Hinge(ObjectnessLoss):
    margin: float = 1.0

    def __call__(self, logits, is_object):
        return F.relu(self.margin - logits.float() * (2 * is_object.float() - 1)).sum() / max(len(logits), 1)


@dataclass
class Log(BoxLoss):
    factor: float = 2.0

    def __call__(self, pred_deltas, deltas, decode):
        return self.factor * torch.log1p((pred_deltas.float() - deltas).abs())


@dataclass
class Smooth(ClassLoss):
    share: float = 0.1

    def __call__(self, logits, labels, weights):
        return F.cross_entropy(logits.float(), labels, weights, label_smoothing=self.share, reduction="sum") / max(
            len(labels), 1
        )


@dataclass
class Best(Suppression):
    number: int = 3

    def __call__(self, found, threshold, limit):
        kept = found.scores.argsort(descending=True)[: min(limit, self.number)]
        return Candidates(*(part[kept] for part in found))


@dataclass
class RMS(OptimizerPart):
    alpha: float = 0.9

    def __call__(self, groups, lr, weight_decay):
        return torch.optim.RMSprop(groups, lr=lr, weight_decay=weight_decay, alpha=self.alpha)


@dataclass
class Slow(Schedule):
    power: float = 0.5
    needs_length = False

    def __call__(self, progress, step):
        return (1 + step) ** -self.power
