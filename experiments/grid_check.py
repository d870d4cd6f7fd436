"""What can be known of a grid's cells before any of them runs: bad values, missing data, bad anchors, training steps."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from datamodules.voc_ground_truth import SplitTruth, read_ground_truth
from datamodules.voc_splits import check_overlap, find_split
from detector.backbones.base import BackboneConfig
from detector.errors import InputError
from detector.optimization import OptimizerConfig
from detector.roi_heads import RoIConfig
from experiments.anchor_audit import audit
from experiments.anchors import AuditInput, audit_input
from experiments.grid_plan import Plan, hashed_options

AUDITED_IMAGES = 1000


@dataclass
class Checks:
    """What a check found.

    Attributes:
        steps: Optimiser steps of each cell, in order; None where unknown.
        warnings: Of the audit: text -> settings of the cells that it is true of.
        notes: Why something could not be checked.
    """

    steps: list[int | None] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for each warning and note."""
        lines = []
        for text, settings in self.warnings.items():
            more = f", and {len(settings) - 3} more" if len(settings) > 3 else ""
            lines.append(f"warning: {'; '.join(settings[:3])}{more}: {text}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def check(plan: Plan, need_data: bool = True, devices: int = 1) -> Checks:
    """Look at every cell's options and data, as its training would, and audit its anchors on at most 1000 images.

    Args:
        plan: The grid.
        need_data: False: a dataset that is not there is a note, not an error.
        devices: Of each run, for the number of its steps.

    Raises:
        InputError: A cell cannot run; names it.
    """
    checker = _Checker(devices)
    for planned in plan.cells:
        try:
            checker.values(planned.config)
            try:
                checker.data(planned.config, planned.cell.setting or planned.cell.name, bool(plan.grid.evaluate))
            except InputError as error:
                voc = planned.config.data_format == "voc"
                if need_data and voc and not planned.config.data.get("download"):
                    raise
                checker.found.steps.append(None)
                if str(error) not in checker.found.notes:
                    checker.found.notes.append(str(error))
        except InputError as error:
            raise InputError(f"{plan.grid.path}: cell {planned.cell.name}: {error}") from None
    return checker.found


class _Checker:
    """Checks one cell after the other, and remembers what they share: annotations, and audits of the same anchors."""

    def __init__(self, devices: int) -> None:
        self.found = Checks()
        self.devices = devices
        self._truths: dict[str, SplitTruth] = {}
        self._audits: dict[str, Sequence[str]] = {}
        self._splits: set[str] = set()

    def values(self, config: Namespace) -> None:
        """What the parser leaves to the config classes: ranges, and options that exclude one another."""
        for kind, options in (
            (RoIConfig, config.model.roi),
            (OptimizerConfig, config.model.optimizer),
            (BackboneConfig, config.model.backbone),
        ):
            kind(**options.as_dict())
        audit_input(config, _read_nothing)

    def data(self, config: Namespace, setting: str, evaluated: bool) -> None:
        """Splits, annotations, anchors and steps."""
        if config.data_format != "voc":
            raise InputError(f"anchors and steps of --data_format {config.data_format} are not looked at beforehand")
        self._check_splits(config, evaluated)
        if evaluated:
            self.found.steps.append(0)
            return
        given = audit_input(config, self._read)
        self.found.steps.append(_steps(config, len(given.truth.sizes), self.devices))
        for line in self._warnings(config, given):
            settings = self.found.warnings.setdefault(line, [])
            if setting not in settings:
                settings.append(setting)

    def _check_splits(self, config: Namespace, evaluated: bool) -> None:
        data = config.data
        key = json.dumps([data.root, data.train_splits, data.val_splits, data.test_splits], default=str)
        if key in self._splits:
            return
        root = Path(data.root).expanduser()
        names = {"train": data.train_splits, "val": data.val_splits, "test": data.test_splits or []}
        splits = {part: [find_split(root, name) for name in names[part]] for part in names}
        missing = [split.path for part in splits.values() for split in part if not split.path.is_file()]
        if missing:
            raise InputError(f"{missing[0]}: no such split file")
        if not evaluated and not data.allow_overlap:
            check_overlap(splits)
        self._splits.add(key)

    def _read(self, root: Any, splits: list[str], class_names: list[str] | None, option: str) -> SplitTruth:
        key = json.dumps([root, splits, class_names], default=str)
        if key not in self._truths:
            self._truths[key] = read_ground_truth(root, splits, class_names, option)
        return self._truths[key]

    def _warnings(self, config: Namespace, given: AuditInput) -> Sequence[str]:
        parts = ("model.anchors.", "model.image.", "model.rpn.", "model.backbone.name", "model.difficult", "data.")
        options = {key: value for key, value in hashed_options(config).items() if key.startswith(parts)}
        key = json.dumps(options, sort_keys=True)
        if key not in self._audits:
            self._audits[key] = _audit_some(given)
        return self._audits[key]


def _audit_some(given: AuditInput) -> list[str]:
    """The audit's warnings on evenly spread images."""
    sizes, objects = given.truth.sizes, given.truth.objects
    chosen = np.arange(0, len(sizes), max(1, math.ceil(len(sizes) / AUDITED_IMAGES)))
    position = np.full(len(sizes), -1)
    position[chosen] = np.arange(len(chosen))
    kept = given.kept & (position[objects.image_id] >= 0)
    result = audit(
        given.anchors,
        given.strides,
        given.image,
        sizes[chosen],
        objects.box[kept],
        position[objects.image_id[kept]],
        rpn=given.rpn,
    )
    part = "" if len(chosen) == len(sizes) else f" (from {len(chosen)} of {len(sizes)} images)"
    return [line + part for line in result.warnings]


@functools.cache
def _nothing() -> SplitTruth:
    from detector.metrics.voc_ap import GroundTruth

    none = np.zeros(0, np.int64)
    objects = GroundTruth(none, none, np.zeros((0, 4)), none.astype(bool))
    return SplitTruth((), (), (), objects, np.zeros((0, 2), np.int64))


def _read_nothing(*_: Any) -> SplitTruth:
    return _nothing()


def _steps(config: Namespace, images: int, devices: int) -> int | None:
    """Optimiser steps of a training, as far as its options tell."""
    trainer, data = config.trainer, config.data
    batches = max(1, images // (data.batch_size * devices))
    if isinstance(trainer.limit_train_batches, int):
        batches = min(batches, trainer.limit_train_batches)
    elif trainer.limit_train_batches is not None:
        batches = int(batches * trainer.limit_train_batches)
    an_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is None and not limits:
        return 1000 * an_epoch  # Lightning's default
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * an_epoch)
    return min(limits, default=None)
