"""The options of `frcnn anchors` beside those of `frcnn fit`."""

from dataclasses import dataclass
from typing import Literal

from detector.errors import InputError
from experiments.arguments import FormatOptions, PlotOptions, check_least

Form = Literal["grid", "sizes"]


@dataclass(frozen=True, kw_only=True)
class AuditOptions(FormatOptions, PlotOptions):
    """Audit anchors from the annotations and image sizes of the training splits alone.

    Takes the config file and the options of frcnn fit; --model.anchors, --model.rpn, --model.image,
    --model.backbone.name, .model and .levels, --model.difficult and --data matter, the rest is without effect.

    Args:
        plot: Draw objects and anchors into a .png, .pdf or .svg.
        suggest: Search for better anchors: so many scales (in each level's list where scales are listed per level)
            times as many aspect ratios as are configured; of sizes, so many at most for each level.
        suggest_form: What to search for: `grid` (scales and aspect_ratios, each per level where the configured ones
            are) or `sizes` (widths and heights; on several levels those of the objects that fit its stride for each).
            Default: what is configured.
    """

    suggest: int | None = None
    suggest_form: Form | None = None

    def __post_init__(self) -> None:
        """Refuse a search for nothing."""
        super().__post_init__()
        check_least(self, suggest=1)
        if self.suggest_form is not None and self.suggest is None:
            raise InputError("--suggest_form: goes with --suggest")
