"""The input of an audit of anchors, read from the configuration of a training and its dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from datamodules.ground_truth import SplitTruth
from detector.anchors import AnchorConfig, AnchorGenerator
from detector.backbones import backbone_strides
from detector.backbones.base import BackboneConfig
from detector.image_batch import ImageConfig
from detector.rpn import RPNConfig
from experiments.anchors.audit import AuditResult, audit
from experiments.anchors.views import TrainingView, training_views
from experiments.arguments import DataOptions
from experiments.dataset.annotations import read_annotations
from experiments.dataset.formats import dataset_format


@dataclass(frozen=True)
class AuditInput:
    """The configuration of a training, as far as an audit needs it, and its objects."""

    anchors: AnchorConfig
    strides: tuple[int, ...]
    image: ImageConfig
    rpn: RPNConfig
    difficult: str
    truth: SplitTruth

    def audit(self) -> AuditResult:
        """Audit the objects that training uses."""
        objects, kept = self.truth.objects, self.kept
        return audit(
            self.anchors,
            self.strides,
            self.image,
            self.truth.sizes,
            objects.box[kept],
            objects.image_id[kept],
            objects.label[kept],
            self.truth.class_names,
            self.rpn,
        )

    def views(self) -> list[TrainingView]:
        """Return the same objects at the sizes of training."""
        objects, kept = self.truth.objects, self.kept
        return training_views(self.image, self.truth.sizes, objects.box[kept], objects.image_id[kept])

    @property
    def kept(self) -> Any:
        """Return a mask (M,): objects marked difficult only where training keeps them."""
        return ~self.truth.objects.difficult | (self.difficult == "keep")


def audit_input(config: Namespace, lists: Sequence[Path] = ()) -> AuditInput:
    """Read the annotations of the training splits that the parsed options of `frcnn fit` name, or that are made.

    Args:
        config: The options.
        lists: Folders in which runs may have kept lists of the same made splits.

    Raises:
        InputError: A bad value, or anything wrong with the dataset.
    """
    model, data = config.model, config.data.get("init_args", config.data)
    anchors = AnchorConfig(**model.anchors.as_dict())
    backbone = BackboneConfig(**model.backbone.as_dict())
    strides = backbone_strides(backbone.name, backbone.model, backbone.levels)
    AnchorGenerator(anchors, strides)  # refuses lists that do not fit the levels, before files are read
    given = {option.name: data[option.name] for option in fields(DataOptions) if data.get(option.name) is not None}
    format = dataset_format(config.get("data_format", "voc"), data.root, data.get("image_dirs"))
    return AuditInput(
        anchors,
        strides,
        ImageConfig(**model.image.as_dict()),
        RPNConfig(**model.rpn.as_dict()),
        model.difficult,
        read_annotations(format, DataOptions(**given), "train", lists),
    )
