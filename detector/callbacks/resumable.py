"""An interrupted training can always go on: Ctrl-C and SIGTERM leave `last.ckpt` at the step that was reached."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException


class SaveOnInterrupt(Checkpoint):
    """Save the state when a training is interrupted.

    A `Checkpoint`, because Lightning runs those after all other callbacks: averaged weights are swapped out by then.
    Only for interrupts, which reach all ranks: saving takes all of them, and after an error on one rank it would hang.

    Args:
        path: The checkpoint, the same as the one saved after every epoch.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save, unless nothing was trained yet."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException) or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking or trainer.global_step == 0:
            return
        trainer.save_checkpoint(self.path)
        rank_zero_info(f"Interrupted at step {trainer.global_step}. To go on: add --ckpt_path {self.path}")
