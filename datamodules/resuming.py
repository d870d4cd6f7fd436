"""Resuming in the middle of an epoch: what a checkpoint says of it, and how a sampler and Lightning's loops go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytorch_lightning as pl
from pytorch_lightning.loops.progress import _ProcessedTracker

from datamodules.samplers import EpochSampler
from detector.errors import InputError


def done_so_far(trainer: pl.Trainer) -> dict[str, int]:
    """Where training goes on: `epoch` and the number of its `batches` already done on each rank."""
    loop = trainer.fit_loop
    epochs = cast(_ProcessedTracker, loop.epoch_progress.current)
    # Not `completed`: Lightning raises that only after the hook in which checkpoints are written.
    batches = cast(_ProcessedTracker, loop.epoch_loop.batch_progress.current).processed
    epoch = epochs.processed
    if epochs.started == epochs.processed:  # between two epochs
        batches = 0
    elif batches >= trainer.num_training_batches:  # all batches done, the epoch's end hooks not yet
        epoch, batches = epoch + 1, 0
    return {"epoch": epoch, "batches": batches}


def go_on(sampler: EpochSampler, state: Mapping[str, int], terms: Mapping[str, int]) -> None:
    """Let the sampler start behind the batches that are done.

    Args:
        sampler: Of the training images.
        state: `done_so_far` with the terms of that time.
        terms: What the number of batches hangs on, as it is now: `batch_size`, `world_size` and the like.

    Raises:
        InputError: a term has changed, and the state is of the middle of an epoch.
    """
    if state["batches"]:
        changed = [f"{key} {state.get(key, 0)}, now {now}" for key, now in terms.items() if state.get(key, 0) != now]
        if changed:
            raise InputError(
                f"the checkpoint was written in the middle of epoch {state['epoch']} with {'; '.join(changed)}: "
                "resume with the same values, or from a checkpoint of an epoch's end"
            )
    sampler.resume(state["epoch"], state["batches"] * state["batch_size"])


def start_new_epoch_if_finished(trainer: pl.Trainer) -> None:
    """With `max_steps`, Lightning 2.6 takes a checkpoint of an epoch's end for one of its middle and runs one epoch
    without batches, which shifts all epoch numbers by one; tell its loops what it tells them under `max_epochs`."""
    loop = trainer.fit_loop
    epochs = cast(_ProcessedTracker, loop.epoch_progress.current)
    if loop.restarting and epochs.ready == epochs.started == epochs.processed:
        loop._restarting = False
        loop.epoch_loop.restarting = False
