"""The folder of multiprocessing's sockets: one for all processes of a training, so that nothing stays behind of it."""

import contextlib
import multiprocessing
import os
import shutil
from multiprocessing.util import Finalize, get_temp_dir
from typing import Final, NoReturn

FOLDER: Final = "FRCNN_SOCKETS"
"""Tells the processes that the first one starts for other ranks its folder."""


def share_folder(first: bool) -> None:
    """Let this rank and its data workers have their sockets in the folder of the first rank, which removes it.

    A rank or a worker that is killed would leave a folder of its own behind.
    """
    if first:
        os.environ[FOLDER] = get_temp_dir()
    elif FOLDER in os.environ:
        vars(multiprocessing.current_process())["_config"]["tempdir"] = os.environ[FOLDER]


def remove_folder_as_orphan() -> None:
    """Let the last data worker of a process that was killed remove its folder."""
    folder, parent = get_temp_dir(), os.getppid()

    def remove() -> None:
        if os.getppid() != parent:
            with contextlib.suppress(OSError):  # sockets of others are there
                os.rmdir(folder)

    Finalize(None, remove, exitpriority=-100)  # after the worker's socket


def end_at_once(code: int) -> NoReturn:
    """End this process without waiting for anything, and with it the training."""
    shutil.rmtree(get_temp_dir(), ignore_errors=True)
    os._exit(code)
