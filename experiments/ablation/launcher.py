"""What the launchers, which run the cells of a grid here or on other machines, have in common."""

import contextlib
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from detector.errors import InputError
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.processes import STOPPING


class Launcher(ABC):
    """What runs cells, on whatever machines.

    Attributes:
        stops: How often the user or the system has asked to stop, by SIGINT, SIGTERM or SIGHUP: the first time commands
            save, and end; the second time they are killed.
        signal: The first of these signals; None: not asked.
        reason: Why no more cells are started, if not for that.
    """

    def __init__(self) -> None:
        self.stops = 0
        self.signal: int | None = None
        self.reason: str | None = None

    @abstractmethod
    def run(self, folders: Sequence[CellFolder], tick: Callable[[], None] = lambda: None) -> None:
        """Run what is not done; return when all cells have been tried, here or by others, or after a request to stop.

        `tick` is called again and again.

        Raises:
            InputError: What shows only when it begins: a folder that cannot be written, an option of the engine.
        """

    def stop(self, number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        """Ask to stop; the signal handler, too."""
        self.stops += 1
        self.signal = self.signal or number

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals that ask to stop; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [signal.signal(number, self.stop) for number in STOPPING]
        try:
            yield
        finally:
            for number, handler in zip(STOPPING, before, strict=True):
                signal.signal(number, handler)


def import_engine(launcher: str, module: str) -> Any:
    """Import the engine of a launcher.

    Raises:
        InputError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"--launcher {launcher}: needs {error.name}, which is not installed; "
            f"pip install 'faster-rcnn-lightning[{launcher}]'"
        ) from None
