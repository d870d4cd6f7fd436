"""What a run shows: on terminals of two widths, in a file, and in the tables at its end."""

import fcntl
import logging
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl

from detector.training import progress_line as progress
from detector.training.callbacks.progress import main_metrics
from experiments.run import quiet
from experiments.run.summary import print_evaluation, print_training, program, shown_path

BAR = ("--trainer.enable_progress_bar", "true")
NOISE = (
    *("TPU", "HPU", "Tip", "FLOPs", "DataLoader 0", "eval mode", "not have many workers", "weights_only", "val_recall"),
    *("Loading `train_dataloader`", "current_model_state", "exists and is not empty", "not resumable", "ModelSummary"),
)


def on_terminal(width: int, *arguments: object, cwd: Path) -> str:
    """Run `frcnn` in a terminal of its own, and return all that it wrote; its rows fit, and are about this project."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    left_out = ("COLUMNS", "FRCNN_RUN_DIR", "PL_GLOBAL_SEED", "NO_COLOR")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                read = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not read:
                break
            written += read
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;]*m", "", written.decode()).replace("\r\n", "\n")
    assert process.returncode == 0, text
    for row in re.split(r"[\r\n]", text):  # a terminal folds the long lines of texts
        assert len(row) <= width or row.startswith(("warning: ", "cpu_kernels ", "Restoring ", "Loaded ")), row
    assert [noise for noise in NOISE if noise in text] == []
    return text


@pytest.mark.parametrize("width", [80, 160])
def test_on_a_terminal(tiny_config, mini_voc, metrics_of, tmp_path, width):
    """A training of two epochs."""
    shutil.copytree(mini_voc, tmp_path / "data")
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 2, "--trainer.num_sanity_val_steps", 1, *BAR)
    text = on_terminal(width, *fit, "--data.root", "data", cwd=tmp_path)
    run, rows = tmp_path / "runs" / "tiny" / "seed0", re.split(r"[\r\n]", text)
    bars = [row for row in rows if row.startswith("epoch ") and "━" in row]
    assert re.match(r"epoch 2/2  step \d+/12  ━+╌*  \d:\d\d:\d\d left  ", bars[-1])
    assert ("roi_reg" in bars[-1]) == (width == 160)
    matches = [re.match(r"\d:\d\d:\d\d  epoch (\d)/2  step (\d+)/12  AP50_voc07 (\d.\d{3})  AP ", row) for row in rows]
    validations = [match.groups() for match in matches if match]
    assert [(epoch, step) for epoch, step, _ in validations] == [("1", "6"), ("2", "12")]
    assert validations[1][2] == f"{metrics_of(run)['val/AP50_voc07']:.3f}"
    assert "train/loss" in text and "val/AP50_voc07 " in text


def test_an_evaluation_on_a_terminal(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0")
    text = on_terminal(80, "validate", "--ckpt_path", "runs/tiny/seed0/checkpoints/last.ckpt", cwd=tmp_path)
    assert "│ ring " in text


def test_a_line_a_minute_in_a_file(frcnn, tiny_config, tmp_path, with_callback, monkeypatch):
    """Each step takes 25 s by this clock, a validation 100 s: of twelve steps every third one is told, and how long
    the rest takes."""
    clock = [0.0]

    class Slow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clock[0] += 25

        def on_validation_start(self, trainer, pl_module):
            clock[0] += 100

    for module in (progress, sys.modules["detector.training.callbacks.progress"]):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with_callback(Slow())
    result = frcnn("fit", "--config", tiny_config, "--trainer.max_epochs", 2, *BAR, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "\r" not in result.out + result.err
    lines = [line for line in result.out.splitlines() if re.match(r"\d:\d\d:\d\d  ", line)]
    heads = [line.partition("  loss ")[0] for line in lines]
    assert [head for head in heads if "AP" not in head] == [
        "0:01:15  epoch 1/2  step 3/12  0:03:45 left  0.08 images/s",
        "0:02:30  epoch 1/2  step 6/12  0:02:30 left  0.08 images/s",
        "0:04:10  validation 1/4  0:00:00 left",
        "0:05:25  epoch 2/2  step 9/12  0:01:48 left  0.08 images/s",
        "0:06:40  epoch 2/2  step 12/12  0:00:00 left  0.08 images/s",
        "0:08:20  validation 1/4  0:00:00 left",
    ]
    names = ["loss", "rpn_cls", "rpn_reg", "roi_cls", "roi_reg"]
    assert all(
        re.findall(r"([a-z_]+) \d+\.\d{3}(?=  |$)", line)[-5:] == names for line in lines if "validation" not in line
    )


def test_losses_are_means_of_the_last_steps(frcnn, tiny_config, tmp_path, with_callback, monkeypatch):
    """Twenty at most; what the line of the validation says is checked against what the module computed."""
    losses: list[float] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(pl_module.last_losses["loss"]))

    with_callback(Keep())
    options = ("--trainer.max_epochs", 4, "--trainer.check_val_every_n_epoch", 4)
    result = frcnn("fit", "--config", tiny_config, *options, *BAR, cwd=tmp_path)
    (said,) = re.findall(r"AP .*  loss (\S+)", result.out)
    assert len(losses) == 24
    assert float(said) == pytest.approx(sum(losses[4:]) / 20, abs=0.0006)


@pytest.mark.parametrize("columns", [80, 160])
def test_table_at_the_end_of_a_training(frcnn, tiny_config, metrics_of, tmp_path, monkeypatch, columns):
    """Numbers are those of metrics.json, paths are there, and the commands run as they are printed."""
    monkeypatch.setenv("COLUMNS", str(columns))
    result = frcnn("fit", "--config", tiny_config, "--trainer.max_epochs", 2, cwd=tmp_path)
    run = tmp_path / "runs" / "tiny" / "seed0"
    metrics = metrics_of(run)
    shown = {name: value for name, value in re.findall(r"│ (\S+/\S+)\s+│ +(\S+) │", result.out)}
    assert {"val/AP50_voc07", "val/AP", "train/loss"} < set(shown)
    assert shown == {name: f"{metrics[name]:.3f}" for name in shown}
    said = dict(re.findall(r"^(\S+(?: \S+)?)  +(\S.*)$", result.out, re.MULTILINE))
    assert said["trained"] == f"{metrics['epoch']} epochs, {metrics['step']} steps" == "2 epochs, 12 steps"
    assert re.fullmatch(r"\d+ s", said["wall time"])
    assert said["run"] == "runs/tiny/seed0"
    best, _, score = said["best checkpoint"].partition(" (val/AP50_voc07 ")
    assert (tmp_path / best).samefile(run / "checkpoints" / "best.ckpt")
    assert float(score.rstrip(")")) >= float(shown["val/AP50_voc07"])
    assert (tmp_path / said["last checkpoint"]).samefile(run / "checkpoints" / "last.ckpt")
    commands = [
        shlex.split(text.replace("\\\n", ""))
        for text in re.split(r"\n(?!   )", result.out.partition("next:\n")[2].rstrip())
    ]
    arguments = [words[len(program()) :] for words in commands]
    assert [words[0] for words in arguments] == ["test", "predict", "tensorboard"]
    assert arguments[2][1:] == ["runs/tiny"]
    for words in arguments[:2]:
        assert frcnn(*words, cwd=tmp_path).code == 0
    assert len(list((run / "predictions").glob("*.jpg"))) == 1


def test_table_of_a_training_that_went_on(frcnn, trained, tmp_path):
    """The time is that since the checkpoint. No test split: the next command is a validation."""
    run = Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))
    last = run / "checkpoints" / "last.ckpt"
    more = ("--trainer.max_epochs", 15, "--data.test_splits", "[]", "--trainer.limit_val_batches", 0)
    more += ("--resume_changed", "true")
    result = frcnn("fit", "--config", run / "config.yaml", "--ckpt_path", last, *more, cwd=tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"^wall time +\d+ s, from step 84 on$", result.out, re.MULTILINE)
    assert re.search(r"frcnn validate (\\\n +)?--ckpt_path runs/tiny/seed0/checkpoints/last.ckpt", result.out)


def test_no_table_where_nothing_is_kept(frcnn, tiny_config, tmp_path):
    result = frcnn("fit", "--config", tiny_config, "--trainer.fast_dev_run", "true", cwd=tmp_path)
    assert (result.code, result.out) == (0, "")


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
@pytest.mark.parametrize("columns", [80, 160])
def test_tables_of_an_evaluation(frcnn, trained, metrics_of, tmp_path, monkeypatch, columns, command, stage):
    """All metrics of metrics.json are in a table, each with three digits."""
    monkeypatch.setenv("COLUMNS", str(columns))
    run = Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))
    (run / "metrics.json").unlink()
    result = frcnn(command, "--ckpt_path", run / "checkpoints" / "last.ckpt", cwd=tmp_path)
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) < columns
    shown = re.findall(r"(\S+) +│ +(\d\.\d{3}|-)(?= │)", result.out)
    metrics = {name: value for name, value in metrics_of(run).items() if name.startswith(f"{stage}/")}
    assert Counter(shown) == Counter(
        (re.sub(".*/|proposal_", "", name), "-" if value is None else f"{value:.3f}") for name, value in metrics.items()
    )
    assert any(len(str(value)) > 6 for value in metrics.values())
    assert "all digits: runs/tiny/seed0/metrics.json" in result.out


def test_metrics_of_one_s_own_are_shown_apart(capsys):
    print_evaluation({"val/AP": 0.5, "val/loss": 1.25, "val/AP50_voc": float("nan"), "test/AP": 1.0}, "val", None)
    rows = [re.findall(r"[\w.-]+", row) for row in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row] == [
        ["VOC", "COCO", "others"],
        ["AP50_voc", "-", "AP", "0.500", "loss", "1.250"],
    ]


def test_silent_evaluation(frcnn, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))
    result = frcnn("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--verbose", "false", cwd=tmp_path)
    assert (result.code, result.out) == (0, "")


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_many_classes_and_long_names_fit(capsys, monkeypatch, columns):
    """Eighty classes, one with a wide and one with a long name: all are there, and in order within the columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ["汽车", "a [bold] name", *(f"class {number}" for number in range(78))]
    metrics = {f"val/AP50_voc_class/{name}": index / 100 for index, name in enumerate(names)}
    print_evaluation({"val/AP": 0.5, **metrics}, "val", None)
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in names)
    assert max(map(len, out.splitlines())) <= columns
    classes = out.partition("class ")[2]
    assert len(re.findall(r"\d\.\d{3}", classes)) == 80


def test_commands_that_are_too_long_go_on_in_further_lines(capsys, monkeypatch):
    """A shell takes them as they are, with names that it would take apart."""
    monkeypatch.setenv("COLUMNS", "60")
    words = ["frcnn", "predict", "--ckpt_path", "my runs/last.ckpt", "--images", "a" * 30, "--output", "out"]
    print_training({}, [], [words, ["frcnn", "test"]])
    out = capsys.readouterr().out.partition("next:\n")[2]
    assert max(map(len, out.splitlines())) < 60
    assert shlex.split(out.replace("\\\n", "")) == [*words, "frcnn", "test"]


def test_paths_are_shown_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs" / "a") == "runs/a"
    assert shown_path("/elsewhere/a") == "/elsewhere/a"
    assert shown_path("runs/a") == "runs/a"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["AP50_voc07", "AP", "proposal_recall@50", "proposal_recall@300", "proposal_recall@1000"], 300),
        (["AP50_voc07", "AP", "proposal_recall@50", "proposal_recall@100"], 100),
    ],
)
def test_main_metrics(names, chosen):
    logged = [f"val/{name}" for name in names]
    assert main_metrics(logged, "val") == ["val/AP50_voc07", "val/AP", f"val/proposal_recall@{chosen}"]
    assert main_metrics(["val/proposal_recall@50"], "val") == ["val/proposal_recall@50"]
    assert main_metrics([], "val") == []


def test_what_is_silenced_is_said_by_the_libraries_that_are_installed() -> None:
    """A message that they word otherwise would be seen again. TPUs and HPUs come and go with Lightning's versions."""
    sources: list[str] = []
    for package in ("pytorch_lightning", "torch/utils"):
        name, _, below = package.partition("/")
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        sources += [path.read_text() for path in (Path(spec.origin).parent / below).rglob("*.py")]
    text = "\n".join(sources)
    for message in quiet.LOG:
        assert message.partition(": ")[0] in text or message.startswith("HPU"), message
    for pattern in quiet.WARNINGS:
        assert re.search(pattern.removeprefix(".*").replace("Found .* module.*", ""), text), pattern


def test_what_misleads_is_silenced_and_the_rest_is_not(frcnn, tmp_path, caplog) -> None:
    frcnn("--help", cwd=tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        quiet.keep_quiet()
        warnings.warn("Found 36 module(s) in eval mode at the start of training. This may lead to", stacklevel=1)
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("`ModelCheckpoint(monitor='val/AP')` could not find the monitored key in", stacklevel=1)
        warnings.warn("GPU available but not used. You can set it by doing `Trainer(accelerator='gpu')`.", stacklevel=1)
    assert [str(one.message)[:26] for one in seen] == ["GPU available but not used"]
    log = logging.getLogger(quiet.LOGGERS[0])
    with caplog.at_level(logging.INFO, quiet.LOGGERS[0]):
        for message in ("💡 Tip: try", "TPU available: False, using: 0 TPU cores", "GPU available: False, used: False"):
            log.info(message)
    assert [record.getMessage() for record in caplog.records if record.name == log.name] == [
        "GPU available: False, used: False"
    ]
