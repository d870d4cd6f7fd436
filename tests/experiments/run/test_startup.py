"""What a command imports, builds and frees: counted, not timed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.run import lightning_cli, option_table
from tests.conftest import ParsedOnly

ROOT = Path(__file__).resolve().parents[3]

Python = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def python() -> Python:
    """Run a program in a process of its own."""

    def run(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)

    return run


def test_help_imports_no_torch(python: Python) -> None:
    ended = python(
        """
import contextlib, io, sys
from experiments.cli import COMMANDS, main
for command in ("", *(row.name for row in COMMANDS)):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    assert f"frcnn {command}" in text.getvalue(), command
print(sorted({"torch", "pytorch_lightning", "numpy", "cv2", "matplotlib"} & set(sys.modules)))
"""
    )
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


def test_a_class_that_is_not_there_is_told_without_what_only_a_training_needs(python: Python) -> None:
    """Nor does Python free what was imported; the collector works again, and leaves it alone."""
    ended = python(
        """
import atexit, gc, sys
class Last:
    def __del__(self):
        print("freed")
def report():
    unneeded = {"albumentations", "tensorboard", "pycocotools", "faster_coco_eval", "pandas", "transformers", "ray"}
    unneeded |= {"scipy.signal", "matplotlib"}
    print(sorted(unneeded & set(sys.modules)), gc.isenabled(), gc.get_freeze_count() > 100_000)
from experiments.cli import main
sys.argv[1:] = ["fit", "--data.root", ".", "--trainer.callbacks", "nowhere.Callback"]
last = Last()
last.itself = last
status = main()
report()
sys.exit(status)
"""
    )
    assert ended.returncode == 2
    assert ended.stdout == "[] True True\n"
    assert ended.stderr.count("\n") == 1 and "--trainer.callbacks nowhere.Callback" in ended.stderr


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_only_the_options_of_the_command_asked_for_are_looked_up(
    command: str, monkeypatch: pytest.MonkeyPatch, frcnn: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(lightning_cli, "DetectorCLI", ParsedOnly)
    monkeypatch.setattr(option_table, "check_files", lambda *_: None)
    result = frcnn(command, "--data.root", "nowhere", cwd=tmp_path)
    assert result.code == 0, result.err
    parsers = ParsedOnly.last._subcommand_parsers
    options = {name: {action.dest for action in parser._actions} for name, parser in parsers.items()}
    assert set(options) == {"fit", "validate", "test"}
    for name, found in options.items():
        assert ("trainer.max_epochs" in found) == ("model.rpn.nms_iou" in found) == (name == command)


ENDING = """
import atexit, logging, sys
from experiments.run.startup import run_process
class Last:
    def __del__(self):
        print("freed")
last = Last()
last.itself = last
def command():
    atexit.register(print, "closed")
    print("done", end=" ")
    {end}
sys.exit(run_process(command))
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("return 2", 2, "done closed\n"),
        ("sys.exit(0)", 0, "done closed\n"),  # as a help text does
        ("sys.exit()", 0, "done closed\n"),
        ("return 0", 0, "done closed\nfreed\n"),
        ("sys.exit(1)", 1, "done closed\nfreed\n"),
        ("sys.exit(143)", 143, "done closed\nfreed\n"),
        ("raise ValueError", 1, "done closed\nfreed\n"),
    ],
)
def test_after_help_or_bad_usage_exit_handlers_run_and_nothing_is_freed(
    end: str, status: int, said: str, python: Python
) -> None:
    ended = python(ENDING.format(end=end))
    assert (ended.returncode, ended.stdout) == (status, said)
    assert ("ValueError" in ended.stderr) == ("ValueError" in end)


def test_imports_happen_without_the_collector_which_then_leaves_them_alone(python: Python) -> None:
    ended = python(
        """
import atexit, gc
from experiments.run.startup import quick_imports
atexit.register(lambda: print(gc.get_freeze_count()))
try:
    with quick_imports():
        print(gc.isenabled(), gc.get_freeze_count())
        import decimal
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
gc.disable()
with quick_imports():
    pass
print(gc.isenabled())
"""
    )
    assert ended.stdout.splitlines() == ["False 0", "True True", "False", "0"], ended.stderr


def test_nothing_is_done_where_torch_is_imported_already(python: Python) -> None:
    ended = python(
        """
import gc, sys
from experiments.run.startup import quick_imports
sys.modules["torch"] = sys
with quick_imports():
    print(gc.isenabled())
print(gc.get_freeze_count())
"""
    )
    assert ended.stdout.splitlines() == ["True", "0"], ended.stderr


def test_what_torchmetrics_is_not_given_is_there_for_others(python: Python) -> None:
    ended = python(
        """
import sys
from experiments.run.startup import quick_imports
with quick_imports():
    import torchmetrics
before = "scipy.signal" in sys.modules
import scipy.signal
print(before, scipy.signal.find_peaks([0, 1, 0, 2, 0])[0].tolist())
print("matplotlib" in sys.modules)
metric = torchmetrics.MeanMetric()
metric.update(3.0)
figure, axes = metric.plot()
import matplotlib.figure
print(isinstance(figure, matplotlib.figure.Figure), axes.lines[0].get_ydata().tolist())
"""
    )
    assert (ended.returncode, ended.stdout) == (0, "False [1, 3]\nFalse\nTrue [3.0]\n"), ended.stderr
