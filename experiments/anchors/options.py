"""The options of `frcnn anchors` beside those of `frcnn fit`."""

from dataclasses import dataclass

from experiments.arguments import FormatOptions, PlotOptions, check_least


@dataclass(frozen=True, kw_only=True)
class AuditOptions(FormatOptions, PlotOptions):
    """Audit anchors from the annotations and image sizes of the training splits alone.

    Takes the config file and the options of frcnn fit; --model.anchors, --model.rpn, --model.image,
    --model.backbone.name, .model and .levels, --model.difficult and --data matter, the rest is without effect.

    Args:
        plot: Draw objects and anchors into a .png, .pdf or .svg.
        suggest: Search for better anchors: this many scales (in each level's list where scales are listed per level)
            times as many aspect ratios as are configured.
    """

    suggest: int | None = None

    def __post_init__(self) -> None:
        """Refuse a search for nothing."""
        super().__post_init__()
        check_least(self, suggest=1)
