"""The line about work under way, as a small terminal shows it, and as a file holds it, by a clock set by hand."""

import contextlib
import io
import logging
import os
import sys
from types import SimpleNamespace

import pytest

from detector.training import progress_line as progress
from detector.training.progress_line import ProgressLine, elapsed, rate, time_left, watched


class Terminal(io.StringIO):
    """Keeps what was written to it; `rows` are what it shows."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def rows(self, columns: int = 80) -> list[str]:
        rows, column = [""], 0
        for letter in self.getvalue():
            if letter == "\n":
                rows.append("")
            if letter in "\r\n":
                column = 0
                continue
            if column == columns:
                rows.append("")
                column = 0
            rows[-1] = rows[-1][:column].ljust(column) + letter + rows[-1][column + 1 :]
            column += 1
        return [row.rstrip() for row in rows]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for rank in progress.RANKS:
        monkeypatch.delenv(rank, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return now


PARTS = ["epoch 1/3  step 24/72", "0:01:00 left", "12 images/s", "loss 1.000", "rpn_cls 0.500", "roi_cls 0.500"]


def test_one_whole_line_a_minute_without_a_terminal(clock, monkeypatch):
    """Steps of 7 s: the first step after each full minute, counted from the line before, is the one that is told."""
    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    line = ProgressLine(file)
    for step in range(1, 31):
        clock[0] += 7
        if line.due():
            line.show([f"step {step}/30", *PARTS], step / 30)
    line.say(["done"])
    line.close()
    told = [
        "  ".join([f"0:0{time}", f"step {step}/30", *PARTS]) for time, step in (("1:03", 9), ("2:06", 18), ("3:09", 27))
    ]
    assert file.getvalue().splitlines() == [*told, "0:03:30  done"]
    assert "\r" not in file.getvalue()


@pytest.mark.parametrize("columns", [30, 60, 80, 160])
def test_bar_and_parts_fit_the_terminal(clock, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    line = ProgressLine(terminal)
    line.show(PARTS, 0.25)
    (row,) = terminal.rows(columns)
    shown = [part for part in PARTS if part in row]
    assert len(row) < columns
    assert shown == PARTS[: len(shown)]
    assert len(shown) == {30: 1, 60: 2, 80: 4, 160: 6}[columns]
    bar = row.count("━"), row.count("╌")
    assert sum(bar) == min(40, columns - 3 - len("  ".join(shown)))
    assert bar[0] == round(sum(bar) / 4)
    line.close()
    assert terminal.rows(columns) == [""]


def test_a_shorter_line_leaves_nothing_of_a_longer_one(clock):
    terminal = Terminal()
    line = ProgressLine(terminal)
    line.show(PARTS, 0.5)
    line.show(["step 25"])
    assert terminal.rows() == ["step 25"]


def test_what_others_write_stands_above_the_line(clock, monkeypatch):
    """Prints, warnings and logs, also those that come in pieces; afterwards all streams are as they were."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler()  # keeps the stream
    monkeypatch.setattr(logging.getLogger("detector.test_progress"), "handlers", [handler])
    line = ProgressLine(terminal)
    line.show(["working"], 0.5)
    print("printed", "in pieces")
    print("unfinished", end="", flush=True)
    line.show(["waits"], 0.5)
    print(" and finished")
    print("a warning", file=sys.stderr)
    logging.getLogger("detector.test_progress").error("a log")
    line.say(["a line", "that stays"])
    rows = terminal.rows()
    assert rows[:2] == ["printed in pieces", "unfinished and finished"]
    assert rows[2:-1] == ["a warning", "a log", "0:00:00  a line  that stays"]
    assert rows[-1].startswith("waits  ━")
    line.close()
    assert sys.stdout is terminal and sys.stderr is terminal and handler.stream is terminal
    assert terminal.rows()[-1] == ""


def test_an_interrupt_within_a_write_leaves_one_line(clock, monkeypatch):
    """A signal handler prints between the writing of a text and the drawing of the line below it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    line = ProgressLine(terminal)
    line.show(["working"])
    draw = line._draw

    def interrupted() -> None:
        monkeypatch.setattr(line, "_draw", draw)
        print("stopping")
        draw()

    monkeypatch.setattr(line, "_draw", interrupted)
    sys.stdout.write("something\n")
    line.close()
    assert terminal.rows() == ["something", "stopping", ""]


def test_a_process_that_was_forked_draws_no_line(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    line = ProgressLine(terminal)
    line.show(["working"])
    monkeypatch.setattr(os, "getpid", lambda: -1)
    print("a worker's")
    assert terminal.rows() == ["a worker's", ""]


def test_a_line_that_stays_is_folded_between_its_parts(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    ProgressLine(terminal).say(PARTS)
    assert terminal.rows(40) == [
        "0:00:00  epoch 1/3  step 24/72",
        "    0:01:00 left  12 images/s",
        "    loss 1.000  rpn_cls 0.500",
        "    roi_cls 0.500",
        "",
    ]


@pytest.mark.parametrize("rank", progress.RANKS)
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_ranks_are_silent(clock, monkeypatch, rank, stream):
    monkeypatch.setenv(rank, "1")
    file = stream()
    line = ProgressLine(file)
    clock[0] += 600
    assert not line.due()
    line.say(PARTS)
    line.close()
    assert file.getvalue() == ""


def test_a_terminal_that_cannot_go_back_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    line = ProgressLine(terminal)
    assert not line.due()
    clock[0] += 60
    assert line.due()
    line.show(PARTS, 0.5)
    assert terminal.getvalue() == "0:01:00  " + "  ".join(PARTS) + "\n"


def test_a_terminal_without_unicode(clock):
    terminal = Terminal()
    terminal.encoding = "ascii"
    ProgressLine(terminal).show(["half"], 0.5)
    assert terminal.rows() == ["half  " + "#" * 20 + "-" * 20]


def test_watched_items_come_through_with_a_line_after_a_second(clock, monkeypatch):
    """Ten at a time: when the first of them comes, all are done."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    seen = []
    for item in watched(range(40), 40, "examining", "files", at_a_time=10):
        seen.append((item, terminal.rows()[-1]))
        clock[0] += 2.0 if item % 10 == 9 else 0.0
    assert [item for item, _ in seen] == list(range(40))
    assert seen[9][1] == ""
    assert seen[10][1].startswith("examining 20/40  ━") and seen[10][1].endswith("  0:00:02 left  10.0 files/s")
    assert "examining 40/40" in seen[30][1] and "0:00:00 left" in seen[30][1]
    assert terminal.rows() == [""]


def test_watched_items_end_with_their_error(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def items():
        clock[0] += 2
        yield 1
        raise ValueError("two")

    with pytest.raises(ValueError, match="two"), contextlib.closing(watched(items(), 2, "reading", "files")) as found:
        list(found)
    assert "reading 1/2" in terminal.getvalue() and terminal.rows() == [""]
    assert sys.stderr is terminal


def test_numbers():
    assert [elapsed(seconds) for seconds in (0.4, 90, 3600, 90_061)] == [
        "0:00:00",
        "0:01:30",
        "1:00:00",
        "1 day, 1:01:01",
    ]
    assert time_left(30, 10, 25) == "0:00:45 left"
    assert [rate(value) for value in (0.123, 0.999, 9.96, 99.4, 99.6, 1234)] == [
        "0.12",
        "1.0",
        "10.0",
        "99.4",
        "100",
        "1234",
    ]
