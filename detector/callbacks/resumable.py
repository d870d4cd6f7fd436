"""An interrupted training can always go on: Ctrl-C and SIGTERM leave `last.ckpt` at the step that was reached."""

import contextlib
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException


class SaveOnInterrupt(Checkpoint):
    """Stop at the end of a step on Ctrl-C (as Lightning does on SIGTERM), and save the state there.

    Not at once, as Python would: in the middle of a step weights, averages and counters do not fit together. A second
    Ctrl-C stops at once, without saving.

    A `Checkpoint`, because Lightning runs those after all other callbacks: averaged weights are swapped out by then.
    Only for interrupts, which all ranks agree on: saving takes all of them, and after an error on one rank it would
    hang.

    Args:
        path: The checkpoint, the same as the one saved after every epoch.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._asked = False
        self._stopping = False
        self._terminated = False
        self._previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over Ctrl-C; only the main thread can."""
        self._asked = self._stopping = self._terminated = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if asked to. An epoch's last step is left to its validation: Lightning cannot resume between."""
        steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        self._put_off(trainer, accumulating=rest != 0 and not trainer.is_last_batch)
        between_steps = rest == 0 and not trainer.is_last_batch
        # Ranks have to agree, which makes a GPU wait for its queue: not at every step.
        due = trainer.world_size == 1 or steps % 20 == 0
        if between_steps and due and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._stop()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here if asked to; several ranks, whose numbers of images differ, go on to the next training step.

        So does a training whose step is not complete (see `_put_off`).
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        accumulating = progress.current.ready % trainer.accumulate_grad_batches != 0 and not progress.is_last_batch
        if self._asked and trainer.world_size == 1 and not accumulating:
            self._stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save, unless nothing was trained yet or Ctrl-C was pressed twice."""
        self._restore()
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException) or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking or trainer.global_step == 0 or (self._asked and not self._stopping):
            return
        if trainer.validating:
            # Lightning would go on with the next batch of the validation, whose metrics would miss the first ones, or
            # leave it out: count it as just begun.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
        trainer.save_checkpoint(self.path)
        rank_zero_info(f"Interrupted at step {trainer.global_step}. To go on: add --ckpt_path {self.path}")

    def _put_off(self, trainer: pl.Trainer, accumulating: bool) -> None:
        """Let SIGTERM wait for the end of the step: the gradients that it has accumulated are in no checkpoint."""
        signals = trainer._signal_connector
        if accumulating and signals.received_sigterm:
            self._terminated, signals.received_sigterm = True, False
        elif self._terminated and not accumulating:
            self._terminated, signals.received_sigterm = False, True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()
        with contextlib.suppress(RuntimeError):  # the signal came while another message was being written
            rank_zero_info("Stopping after this step. Ctrl-C again: at once, without saving.")

    def _stop(self) -> None:
        self._stopping = True
        raise KeyboardInterrupt

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
