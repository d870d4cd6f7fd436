"""Which scalars TensorBoard shows together: pages of charts in its tab for custom scalars."""

from collections.abc import Mapping, Sequence
from typing import Final

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

PARTS: Final = {"rpn_cls": "RPN scores", "rpn_reg": "RPN boxes", "roi_cls": "RoI scores", "roi_reg": "RoI boxes"}
PAGES: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "Losses in training and validation": {"all, weighted": ["train/loss$", "val/loss$"]}
    | {title: [f"train/loss_{name}$", f"val/loss_{name}$"] for name, title in PARTS.items()},
    "Average precision": {
        "VOC": [r"val/AP50_voc(07)?$"],
        "COCO": [r"val/AP(50|75)?$"],
        "by object size": [r"val/AP_(small|medium|large)$"],
        "of classes": [r"val/AP50_voc_class/"],
    },
    "Recall of proposals": {
        "by their number": [r"val/proposal_recall@\d+$"],
        "by their number, mean over IoU": [r"val/proposal_AR@\d+$"],
        "by object size": [r"val_recall/(small|medium|large)$"],
        "by feature level": [r"val_recall/stride"],
    },
    "Optimisation": {
        "learning rate": [r"weights/learning_rate/"],
        "gradient norm before clipping": [r"weights/gradient_norm/"],
        "RPN samples of an image": [r"train_samples/rpn_"],
        "RoI samples of an image": [r"train_samples/roi_"],
    },
    "Speed": {
        "ms of a batch": [r"train_time/.*_ms$"],
        "images per second": [r"train/images_per_second$"],
        "peak memory (MiB)": [r"train/peak_memory_mib$"],
        "GPU utilisation": [r"train_time/gpu_utilization$"],
    },
}
"""By title of the page and of the chart, regular expressions of the tags of its curves; the same for all detectors."""


class ScalarPages(pl.Callback):
    """Lay out TensorBoard's custom scalars in pages: losses, average precision, recall, optimisation, speed.

    Layouts of several runs are merged chart by chart, so equal ones give one. Costs nothing.

    Args:
        pages: By title of the page and of the chart, regular expressions of the tags of its curves, instead of the
            usual ones; {}: no pages.
    """

    def __init__(self, pages: dict[str, dict[str, list[str]]] | None = None) -> None:
        self.pages: Mapping[str, Mapping[str, Sequence[str]]] = PAGES if pages is None else pages

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the layout."""
        layout = {
            page: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
            for page, charts in self.pages.items()
        }
        for logger in trainer.loggers if trainer.is_global_zero and layout else ():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)
