"""What Lightning says of its own inside, or wrongly of this project: kept away from the user. All else is shown."""

import logging
import re
import warnings
from typing import Final

LOG: Final = {
    "Tip:": "advertising",
    "TPU available: False": "no device of this project",
    "HPU available: False": "the same",
    "Loading `train_dataloader` to estimate": "a step on the way",
    "Found current_model_state in the checkpoint": "how averaged weights are stored",
    "`weights_only` was not set": "checkpoints are read by `read_checkpoint` first",
}
"""Beginnings or parts of log messages, and why nobody needs them."""
LOGGERS: Final = (
    "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
)
WARNINGS: Final = {
    "LightningCLI's args parameter is intended": "it is given on purpose",
    ".*isinstance\\(treespec, LeafSpec\\).*": "torch's, of its own inside",
    "Found .* module.* in eval mode at the start of training": "frozen batch norm stays in it, as it should",
    ".*does not have many workers which may be a bottleneck": "num_workers is an option with a default",
    "You're resuming from a checkpoint that ended before the epoch ended": "`EpochSampler` goes on where it stopped",
    "Checkpoint directory .* exists and is not empty": "so it is in a run that goes on",
    ".*could not find the monitored key": "so it is until a resumed run's first validation; later it is an error",
    "The dirpath has changed from": "`BestCheckpoint` sees to it",
    "Your `IterableDataset` has `__len__` defined": "there is one process that reads",
}
"""Patterns for beginnings of warnings, and why nobody needs them."""


def keep_quiet() -> None:
    """Leave out of the logs and warnings of this process what misleads."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_of_interest)
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return re.search("|".join(map(re.escape, LOG)), record.getMessage()) is None
