"""Checkpoints of the best validation and at an interrupt, which are whole or not there whatever happens meanwhile.

An interrupted training can always go on: Ctrl-C and other signals leave `last.ckpt` at the step that was reached.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_info

from detector.errors import InputError
from detector.files import check_space, keep_former, replacing
from detector.training.lightning_module import FasterRCNNModule
from detector.training.lightning_private import validation_follows
from detector.training.processes import end_at_once

SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Interrupted(SystemExit):
    """The end of a training that was asked to stop; the exit status is that of shells, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class SaveOnInterrupt(Checkpoint):
    """Stop at the end of a step on Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, and save the state there.

    Not at once: in the middle of a step weights, averages and counters do not fit together. A second Ctrl-C stops at
    once, without saving; so does a batch that does not end, because a worker or another rank hangs.

    A `Checkpoint`, because Lightning runs those after all other callbacks: averaged weights are swapped out by then.
    Only for interrupts, which all ranks agree on: saving takes all of them, and after an error on one rank it would
    hang.

    Args:
        path: The checkpoint, the same as the one saved after every epoch.
        seconds: How long a batch may take after the signal.
    """

    def __init__(self, path: str | Path, seconds: float = 300.0) -> None:
        self.path = Path(path)
        self.seconds = seconds
        self._number: int | None = None  # of the signal that asked to stop
        self._training = self._stopping = self._is_saved = False
        self._previous: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what an earlier training was asked."""
        self._number = None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, from Lightning too; only the main thread can.

        What is ignored, as SIGHUP under nohup, or has a handler of somebody else, is left alone.
        """
        self._restore()
        self._training = self._stopping = self._is_saved = False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            handler = signal.getsignal(number)
            free = handler is signal.SIG_DFL or "lightning" in type(handler).__module__
            if free or number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish a step first, from here on."""
        self.on_sanity_check_start(trainer, pl_module)
        if self._number is not None:  # it came while a loader forked: what a handler raises then, Python drops
            raise Interrupted(self._number)
        self._training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if asked to, but not between an epoch's last step and its validation: Lightning cannot resume."""
        rest = (batch_idx + 1) % trainer.accumulate_grad_batches
        # The gradients that a step has accumulated are in no checkpoint.
        self._stop_if_asked(trainer, rest == 0 and not validation_follows(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop here if asked to in an epoch's last step, or since: epochs may have a single step."""
        self._is_saved = True  # at the epoch's end
        self._stop_if_asked(trainer)
        self._is_saved = False

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Stop here if asked to, unless a training step is not complete; all ranks have equally many batches."""
        if self._training:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            accumulating = progress.current.ready % trainer.accumulate_grad_batches != 0 and not progress.is_last_batch
            self._stop_if_asked(trainer, not accumulating)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save, unless nothing was trained yet or Ctrl-C was pressed twice."""
        self._restore()
        if not isinstance(exception, KeyboardInterrupt | SystemExit) or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking or trainer.global_step == 0 or (self._number is not None and not self._stopping):
            return
        if trainer.validating:
            # Lightning would go on with the next batch of the validation, whose metrics would miss the first ones, or
            # leave it out: count it as just begun.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
        if not self._is_saved:
            trainer.save_checkpoint(self.path)
        rank_zero_info(f"Interrupted at step {trainer.global_step}. To go on: give ckpt_path {self.path}")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self._training or (self._number is not None and number == signal.SIGINT):
            self._number = number
            raise Interrupted(number)
        if self._number is None:  # several of the others are usual: from a launcher, and from SLURM
            self._number = number
            self._limit()
            with contextlib.suppress(RuntimeError):  # the signal came while another message was being written
                rank_zero_info("Stopping after this step. Ctrl-C again: at once, without saving.")

    def _stop_if_asked(self, trainer: pl.Trainer, possible: bool = True) -> None:
        if self._number is not None:
            self._limit()
        # Ranks have to agree; Lightning asks them about SIGTERM at every step, too, so no GPU waits longer for this.
        if possible and trainer.strategy.reduce_boolean_decision(self._number is not None, all=False):
            device = trainer.strategy.root_device
            number = torch.tensor(float(self._number or 0), device=device)  # others may have another one, or none
            self._number = round(float(trainer.strategy.reduce(number, reduce_op="max")))
            self._stopping = True
            raise Interrupted(self._number)

    def _limit(self) -> None:
        """Begin to wait for the end of a batch."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(self.seconds, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        print(f"frcnn: no batch ended within {self.seconds:g} s: ended without saving", file=sys.stderr, flush=True)
        end_at_once(128 + (self._number or 0))

    def _restore(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._previous:
            signal.signal(*self._previous.popitem())


class SaveNowAndThen(Checkpoint):
    """Save `last.ckpt` between two steps of an epoch where it has become old, so that a kill costs minutes at most.

    Args:
        path: The checkpoint, the same as the one saved after every epoch.
        minutes: How old it may be; 0: any age.
    """

    def __init__(self, path: str | Path, minutes: float) -> None:
        self.path = Path(path)
        self._seconds = 60 * minutes
        self._saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._saved = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Begin to count again, whoever saves."""
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time; several ranks look at the clock at every 20th step, and save together."""
        steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if not self._seconds or rest or validation_follows(trainer) or (trainer.world_size > 1 and steps % 20):
            return
        old = time.monotonic() - self._saved > self._seconds
        if trainer.strategy.reduce_boolean_decision(old, all=False):
            trainer.save_checkpoint(self.path)


class AtomicCheckpoints(TorchCheckpointIO):
    """Write a checkpoint beside its place, and rename it when it is complete.

    Lightning writes into the system's temporary folder and moves the file, which is a copy where that is another file
    system: a kill or a full disk in the middle of it left half a `last.ckpt`, and the former one was gone. Of
    `last.ckpt` the former one is kept as `last-previous.ckpt`.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save; on a failure the former file stays, and nothing else.

        Raises:
            InputError: The disk is full, or the folder cannot be written.
        """
        if "://" in str(path):  # no file of this machine's file systems
            super().save_checkpoint(dict(checkpoint), path, storage_options)  # type: ignore[arg-type]
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path.parent, size_of(checkpoint), str(path))
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
                if path.name == "last.ckpt" and path.is_file():
                    keep_former(path, path.with_name("last-previous.ckpt"))
        except BaseException as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):  # PyTorch reports a full disk as "unexpected pos"
                raise InputError(f"{path}: cannot write ({cause.strerror})") from error
            raise


def size_of(content: object) -> int:
    """Return the bytes of all tensors in nested mappings and lists, each once."""
    sizes: dict[int, int] = {}

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                add(item)

    add(content)
    return sum(sizes.values())


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, which looks only at validations of the network that the training is to end with.

    In the first three steps of an alternating training a validation is of other networks: it saves nothing.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the run's own best checkpoint, also where the run has been moved.

        A new run, which starts from another's checkpoint, has none, and the other's is left alone.
        """
        own = Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}"
        if own.is_file():
            score, path = state_dict["best_model_score"], str(own)
            kept = {path: score} if state_dict["best_k_models"] else {}
            moved = {"dirpath": self.dirpath, "kth_best_model_path": path, "best_model_path": path}
            super().load_state_dict(state_dict | moved | {"best_k_models": kept})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after an epoch's validation."""
        if _is_candidate(pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation."""
        if _is_candidate(pl_module):
            super().on_validation_end(trainer, pl_module)


def _is_candidate(pl_module: pl.LightningModule) -> bool:
    assert isinstance(pl_module, FasterRCNNModule)
    return pl_module.scheme.is_final
