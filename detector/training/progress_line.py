"""One line that says how far some work is: redrawn where someone watches, written once a minute elsewhere."""

import contextlib
import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final, TextIO, TypeVar

Item = TypeVar("Item")

REDRAWN_EVERY: Final = 0.2  # seconds, on a terminal
WRITTEN_EVERY: Final = 60.0  # seconds, where there is none
SHORTEST_BAR, LONGEST_BAR = 10, 40
RANKS: Final = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


class ProgressLine:
    """A line about work under way: redrawn in place on a terminal, otherwise written once a minute.

    A terminal keeps no trace of it, and whatever else is written there meanwhile stands above it, warnings and logs
    included. The bar and the first parts of the line have the terminal's width; parts for which there is no room are
    left out. Elsewhere a line is whole, begins with the time since the start, and holds no carriage return. Of the
    processes of a distributed run the first one alone writes.

    There is no thread behind it: threads and processes that are forked, as those of data loaders, do not go together.

    Args:
        stream: Where to write: standard output or standard error.
        after: Seconds from the start on in which a terminal shows nothing, for work that may be short.
    """

    def __init__(self, stream: TextIO, after: float = 0.0) -> None:
        self.stream = stream
        self.started = time.monotonic()
        self.on_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._silent = any(os.environ.get(rank, "0") != "0" for rank in RANKS)
        self._next = self.started + (after if self.on_terminal else WRITTEN_EVERY)
        self._drawn = ""
        self._unfinished = False  # something else was written, without the end of its line
        self._process = os.getpid()
        self._replaced: list[tuple[Any, str, Any]] = []

    def due(self) -> bool:
        """Return whether it is time to show something new."""
        return not self._silent and time.monotonic() >= self._next

    def show(self, parts: Sequence[str], share: float | None = None) -> None:
        """Show the parts of the line.

        Args:
            parts: The most important ones come first; a terminal shows the first one in any case.
            share: How much is done, in 0..1: a terminal shows a bar behind the first part.
        """
        self._next = time.monotonic() + (REDRAWN_EVERY if self.on_terminal else WRITTEN_EVERY)
        if not self.on_terminal:
            self.say(parts)
            return
        self._put_above()
        self._clear()
        self._drawn = self._fitted(list(parts), share)
        self._draw()

    def say(self, parts: Sequence[str]) -> None:
        """Write a line that stays, behind the time since the start; a narrow terminal folds it between the parts."""
        if self._silent:
            return
        line = "  ".join([elapsed(time.monotonic() - self.started), *parts])
        if self.on_terminal:
            whole = line.replace("  ", "\n").replace(" ", "\xa0").replace("\n", "  ")
            line = textwrap.fill(whole, self._columns(), subsequent_indent=" " * 4, break_long_words=False)
        self._write_above(self.stream, line.replace("\xa0", " ") + "\n")

    def close(self) -> None:
        """Take the line away."""
        self._clear()
        self._drawn = ""
        for owner, name, value in reversed(self._replaced):
            setattr(owner, name, value)
        self._replaced = []

    def _columns(self) -> int:
        """Return the width; the last column stays free, in which some terminals begin a new line."""
        with contextlib.suppress(OSError, ValueError):
            if not os.environ.get("COLUMNS"):
                return max(20, os.get_terminal_size(self.stream.fileno()).columns - 1)
        return max(20, shutil.get_terminal_size().columns - 1)

    def _fitted(self, parts: list[str], share: float | None) -> str:
        columns = self._columns()
        bar = 0 if share is None else SHORTEST_BAR + 2
        while len(parts) > 1 and len("  ".join(parts)) + bar > columns:
            parts.pop()
        if share is not None:
            room = min(LONGEST_BAR, columns - 2 - len("  ".join(parts)))
            filled, letters = round(room * min(1.0, max(0.0, share))), self._letters()
            parts.insert(1, letters[0] * filled + letters[1] * (room - filled))
        return "  ".join(parts)[:columns]

    def _letters(self) -> str:
        try:
            "━╌".encode(self.stream.encoding or "utf-8")
        except (LookupError, UnicodeEncodeError):
            return "#-"
        return "━╌"

    def _draw(self) -> None:
        if self._drawn and not self._unfinished and os.getpid() == self._process:
            self.stream.write("\r" + self._drawn)
            self.stream.flush()

    def _clear(self) -> None:
        if self._drawn and not self._unfinished:
            self.stream.write("\r" + " " * len(self._drawn) + "\r")
            self.stream.flush()

    def _write_above(self, stream: TextIO, text: str) -> None:
        self._clear()
        stream.write(text)
        stream.flush()
        self._unfinished = not text.endswith("\n") if text else self._unfinished
        self._draw()

    def _put_above(self) -> None:
        """Let what others write to the terminal go above the line, from the first time on that it is shown."""
        if self._replaced:
            return
        handlers = [
            handler
            for logger in logging.Logger.manager.loggerDict.values()
            for handler in getattr(logger, "handlers", [])
            if isinstance(handler, logging.StreamHandler)
        ]
        places: list[tuple[Any, str]] = [(sys, "stdout"), (sys, "stderr"), *((one, "stream") for one in handlers)]
        for owner, name in places:
            stream = getattr(owner, name)
            if stream is self.stream or (stream in (sys.__stdout__, sys.__stderr__) and stream.isatty()):
                self._replaced.append((owner, name, stream))
                setattr(owner, name, _Above(stream, self))


class _Above:
    """A stream whose text goes above a line."""

    def __init__(self, stream: TextIO, line: ProgressLine) -> None:
        self._stream = stream
        self._line = line

    def write(self, text: str) -> int:
        self._line._write_above(self._stream, text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def watched(items: Iterable[Item], total: int, what: str, unit: str, at_a_time: int = 1) -> Iterator[Item]:
    """Yield the items, with a line on standard error about how many there were, where it takes more than a second.

    Args:
        items: What is worked on.
        total: How many they will be.
        what: What is done to them, such as "examining".
        unit: What they are, for the rate: "files".
        at_a_time: How many are there when the first of them comes.
    """
    line = ProgressLine(sys.stderr, after=1.0)
    try:
        for index, item in enumerate(items):
            if line.due():
                done = min(total, (index // at_a_time + 1) * at_a_time)
                seconds = time.monotonic() - line.started
                parts = [f"{what} {done}/{total}", time_left(seconds, done, total), f"{rate(done / seconds)} {unit}/s"]
                line.show(parts, done / total)
            yield item
    finally:
        line.close()


def elapsed(seconds: float) -> str:
    """Return a time such as 0:01:30."""
    return str(timedelta(seconds=round(seconds)))


def time_left(seconds: float, done: float, total: float) -> str:
    """Return how long the rest takes, such as "0:01:30 left", where a part took some seconds."""
    return f"{elapsed(seconds / done * (total - done))} left"


def rate(value: float) -> str:
    """Return a rate such as 0.34, 5.2 or 120."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"
