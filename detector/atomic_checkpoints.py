"""Checkpoint files that are whole or not there, whatever happens while they are written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import TorchCheckpointIO

from detector.errors import InputError


class AtomicCheckpoints(TorchCheckpointIO):
    """Write a checkpoint beside its place, and rename it when it is complete.

    Lightning writes into the system's temporary folder and moves the file, which is a copy where that is another file
    system: a kill or a full disk in the middle of it left half a `last.ckpt`, and the former one was gone.
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
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(place.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            os.replace(partial, place)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):  # PyTorch reports a full disk as "unexpected pos"
                raise InputError(f"{place}: cannot write ({cause.strerror})") from error
            raise
