"""Which anchors earn the average precision: what becomes of each level x scale x aspect ratio in training."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detector.metrics.flat_states import FlatStateMetric, first_of_each_image, image_ids_of, rows_of
from detector.metrics.voc_ap import TRUE_POSITIVE, IntArray, assign, canonical_order, judge
from detector.rpn import RegionProposalNetwork
from detector.sampling import POSITIVE
from detector.step_record import StepRecord
from detector.training.callbacks.inside_steps import InsideSums, log_scalars
from detector.training.lightning_module import FasterRCNNModule
from detector.training.loggers import picture_writers

Values = NDArray[np.float64]

COUNTED: Final = ("positives", "rescued", "negatives", "proposals", "width", "height")
COLUMNS: Final = ("expected", "positives", "rescued", "negatives", "proposals", "true positives", "mean size")
_DEAD: Final = (192, 32, 32)


class AnchorTelemetry(InsideSums):
    """Log what becomes of each anchor shape, as scalars and as one heat map.

    Scalars are named `train_anchors/<quantity>/stride<s>_scale<s>_ratio<r>`, of the steps since the last log:

    - `positives`: its share of all positive anchors; `rescued`: the share of its positives that are so only as the best
      of an object, below `rpn.positive_iou`; none where `rpn.matcher` has no such rule;
    - `negatives`: its share of the sampled negatives;
    - `proposals`: its share of the proposals that survive NMS; `width` and `height`: their mean sides in pixels of the
      resized image (table 1 of the paper);
    - `val_anchors/true_positives/...`: its share of the true positives of a validation (IoU 0.5, as in VOC's AP), by
      the anchor of each detection's proposal. Not with test-time augmentation.

    At the end of each epoch the picture `train_anchors/table` shows all of it, of that epoch, and in its column
    `expected` the share of the positives that the anchor audit expects. Dead shapes, which have matched no object since
    the training began or went on, are red there, and `train_anchors/dead` counts them.

    Costs 2 ms of a step of 470 ms on two CPU cores (two images of 320 pixels, MobileNetV2), logs included, or two dozen
    small kernels on a GPU and one transfer to the host per log; 1% of a validation, for matching detections once more.

    Args:
        every_n_steps: How often to see inside a step, in optimiser steps; 0: no telemetry at all.
        log_every_n_steps: How often to log.

    Attributes:
        expected: Share of all positives that each shape should get, by level and in the order of the RPN's outputs, for
            whoever knows to fill in: the command line's anchor audit. Empty: unknown.
    """

    def __init__(self, every_n_steps: int = 1, log_every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps, log_every_n_steps)
        self.expected: Sequence[float] = ()
        self._of_epoch: Tensor | None = None
        self._ever_positive = torch.zeros(0)
        self._found: Values | None = None
        self._shapes_found: ShapesOfDetections | None = None

    def sums_of(self, pl_module: FasterRCNNModule, record: StepRecord) -> Tensor:
        """Return the numbers of `COUNTED` for each anchor shape, (6, shapes)."""
        shapes, device = record.shape_of_anchor, record.level_anchors[0].device
        sums = torch.zeros(len(COUNTED), sum(record.anchors_per_location), device=device)
        if record.anchor_matches:
            positive_from = pl_module.model.rpn.matcher.positive_from
            kinds = [
                torch.stack([found.kind == POSITIVE for found in record.anchor_matches]),
                torch.stack([found.rescued(positive_from) for found in record.anchor_matches]),
            ]
            sums[:2].index_add_(1, shapes, torch.stack(kinds).sum(dim=1).float())
            negatives = shapes[torch.cat([drawn.negatives for drawn in record.sampled_anchors])]
            sums[2].index_add_(0, negatives, torch.ones_like(negatives, dtype=torch.float32))
        if record.proposals:
            boxes = torch.cat([found.boxes[found.kept] for found in record.proposals])
            one_and_sides = torch.cat((torch.ones_like(boxes[:, :1]), boxes[:, 2:] - boxes[:, :2]), dim=1)
            survivors = torch.cat([found.anchors[found.kept] for found in record.proposals])
            sums[3:].index_add_(1, shapes[survivors], one_and_sides.T)
        self._of_epoch = sums if self._of_epoch is None else self._of_epoch + sums
        return sums

    def log_sums(self, trainer: pl.Trainer, pl_module: FasterRCNNModule, sums: Tensor) -> None:
        """Log the scalars."""
        names = shape_names(pl_module.model.rpn)
        scalars = {
            f"train_anchors/{quantity}/{name}": value
            for quantity, values in shares(sums).items()
            for name, value in zip(names, values.tolist(), strict=True)
        }
        log_scalars(trainer, scalars)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the epoch's heat map."""
        assert isinstance(pl_module, FasterRCNNModule)
        if self._of_epoch is None:
            return
        sums, self._of_epoch = trainer.strategy.reduce(self._of_epoch.clone(), reduce_op="sum"), None
        if not trainer.is_global_zero:
            return
        assert isinstance(sums, Tensor)
        sums = sums.cpu()
        self._ever_positive = sums[0] + (self._ever_positive if len(self._ever_positive) else 0)
        dead = ((self._ever_positive == 0) & self._ever_positive.any()).numpy()  # none where nothing was matched at all
        picture = self.heat_map(pl_module.model.rpn, sums, dead)
        log_scalars(trainer, {"train_anchors/dead": float(dead.sum())})
        for write in picture_writers(trainer):
            write("train_anchors/table", picture, trainer.global_step)

    def heat_map(self, rpn: RegionProposalNetwork, sums: Tensor, dead: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Return a picture (H, W, 3) of sums (6, shapes), of what is expected, and of the last validation.

        `dead` (shapes,) are marked.
        """
        values = shares(sums)
        width, height = values.pop("width", None), values.pop("height", None)
        columns: dict[str, Values | None] = {name: values.get(name) for name in COLUMNS}
        columns |= {
            "expected": np.nan_to_num(self.expected) if len(self.expected) else None,
            "true positives": self._found,
        }
        texts = [
            [""] * sums.shape[1] if part is None else [f"{100 * value:.1f}" for value in part]
            for part in columns.values()
        ]
        if width is not None and height is not None:
            columns["mean size"] = np.sqrt(width * height)
            texts[-1] = [f"{w:.0f}x{h:.0f}" for w, h in zip(width, height, strict=True)]
        names = [name.replace("_", " ") for name in shape_names(rpn)]
        if len(rpn.anchor_generator.strides) == 1:
            names = [name.partition(" ")[2] for name in names]
        return draw_table(names, list(columns), list(columns.values()), texts, dead)

    # Validation

    def wants_validation_batch(self, trainer: pl.Trainer, batch: Any) -> bool:
        """Return whether the detections lead back to anchors."""
        module = trainer.lightning_module
        assert isinstance(module, FasterRCNNModule)
        image = module.model.image_config
        several_views = image.test_flip or image.test_shortest_sides
        return bool(self.every_n_steps and module.scheme.detects and not several_views)

    def see_validation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: StepRecord, batch: Any
    ) -> None:
        """Keep the anchor shape of each detection."""
        if self._shapes_found is None:
            self._shapes_found = ShapesOfDetections().to(pl_module.device)
        shapes = record.shape_of_anchor
        self._shapes_found.update(
            [
                shapes[found.anchors[found.kept[detections.rois]]]
                for found, detections in zip(record.proposals, record.detections, strict=True)
            ],
            batch[1],
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the true positives; Lightning calls this before the module resets its metrics."""
        assert isinstance(pl_module, FasterRCNNModule)
        if trainer.sanity_checking or not self.wants_validation_batch(trainer, None):
            return
        metric = self._shapes_found or ShapesOfDetections().to(pl_module.device)
        self._shapes_found = None
        pl_module.val_ap.compute()  # of all processes, as the next
        shapes = metric.compute()["shape"].cpu().numpy()
        split = pl_module.val_ap.evaluated()
        if trainer.is_global_zero and len(shapes) == len(split.detections):  # else the metric has seen something else
            order = canonical_order(split.detections)
            flags = judge(split.ground_truth, assign(split.detections, split.ground_truth), order, 0.5)
            names = shape_names(pl_module.model.rpn)
            found = np.bincount(shapes[flags == TRUE_POSITIVE], minlength=len(names))
            self._found = found / max(found.sum(), 1)
            rows = zip(names, self._found.tolist(), strict=True)
            log_scalars(trainer, {f"val_anchors/true_positives/{name}": value for name, value in rows})


class ShapesOfDetections(FlatStateMetric):
    """The anchor shape of each detection of a split, in the order of `DetectionAP.evaluated`, each image once."""

    def __init__(self) -> None:
        super().__init__((), ("image_id", "count", "shape"), ())

    def update(self, shapes: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> None:
        """Add the shapes (D,) of the detections of each image of a batch, whose targets hold its `image_id`."""
        counts = torch.tensor([len(of_image) for of_image in shapes])
        self.append(image_id=image_ids_of(list(targets)), count=counts, shape=torch.cat(list(shapes)))

    def compute(self) -> dict[str, Tensor]:
        """Return `shape` (D,), int64, over all processes."""
        shapes: IntArray = self.array("shape")
        rows = rows_of(first_of_each_image(self.array("image_id")), self.array("count"))
        return {"shape": torch.from_numpy(shapes[rows])}


def shape_names(rpn: RegionProposalNetwork) -> list[str]:
    """Return the names of all anchor shapes, such as stride16_scale8_ratio0.5 or stride16_37x52, level by level."""
    generator = rpn.anchor_generator
    return [
        f"stride{stride:g}_{name}"
        for level, stride in enumerate(generator.strides)
        for name in generator.config.names_of_level(level)
    ]


def shares(sums: Tensor) -> dict[str, Values]:
    """Return the quantities of `COUNTED` as they are logged, from their sums (6, shapes), without what was not seen.

    A shape that has none has 0, also as the mean size of its proposals.
    """
    counts = dict(zip(COUNTED, sums.double().numpy(), strict=True))
    values = {
        name: counts[name] / counts[name].sum()
        for name in ("positives", "negatives", "proposals")
        if counts[name].any()
    }
    for name, whole in (("rescued", "positives"), ("width", "proposals"), ("height", "proposals")):
        if whole in values:
            values[name] = counts[name] / np.maximum(counts[whole], 1)
    return values


def draw_table(
    names: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Values | None],
    texts: Sequence[Sequence[str]],
    dead: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3) of a table whose cells are the darker, the larger a value is within its column.

    Args:
        names: Of the rows.
        columns: Titles; words stand below each other.
        values: Of each column, per row; None: unknown.
        texts: What stands in the cells, column by column.
        dead: Which rows to mark, in red.
    """
    font, row, column, margin = ImageFont.load_default(size=15), 24, 70, 6
    left = margin * 2 + max(round(font.getlength(f"{name} dead")) for name in names)
    top = 44
    picture = Image.new("RGB", (left + column * len(columns) + margin, top + row * len(names) + margin), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((margin, top - 6), "%, pixels", "#777777", font, anchor="ls")
    for index, name in enumerate(names):
        color = _DEAD if dead[index] else (0, 0, 0)
        text = f"{name} dead" if dead[index] else name
        draw.text((margin, top + row * (index + 0.5)), text, color, font, anchor="lm")
    for place, (title, of_column, of_texts) in enumerate(zip(columns, values, texts, strict=True)):
        x = left + place * column
        center = x + column / 2
        draw.multiline_text((center, top - 6), title.replace(" ", "\n"), "black", font, anchor="md", align="center")
        shades = np.zeros(len(names)) if of_column is None else of_column / max(float(of_column.max()), 1e-12)
        for index, (shade, text) in enumerate(zip(shades.tolist(), of_texts, strict=True)):
            y = top + index * row
            fill = tuple(round(255 + shade * (full - 255)) for full in (8, 69, 148))
            draw.rectangle((x + 1, y + 1, x + column - 2, y + row - 2), fill=fill)
            color = (255, 255, 255) if shade > 0.5 else _DEAD if dead[index] else (0, 0, 0)
            draw.text((center, y + row / 2), text, color, font, anchor="mm")
    return np.asarray(picture)
