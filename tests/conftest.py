"""What many tests share: a small dataset, a tiny experiment, and the command line, run in this process."""

import contextlib
import functools
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml

from datamodules.image_cache import available_memory
from datamodules.mini_voc.writer import write_mini_voc
from datamodules.parallel import available_cores
from experiments.cli import main
from experiments.run import lightning_cli, option_table
from experiments.run.lightning_cli import DetectorCLI
from tests.broken_dataset import BrokenDataset, break_dataset

ROOT = Path(__file__).resolve().parents[1]
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)  # of the terminal that pytest was started in; tables in a pipe have no limit

TINY: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "model": {
        "backbone": {
            "name": "small_c4",
            "weights": "none",
            "frozen_stages": 0,
            "pool_size": 4,
            "box_head_channels": 32,
        },
        "anchors": {"scales": [1, 2], "aspect_ratios": [1], "straddling": "keep"},
        "rpn": {"pre_nms_train": 60, "post_nms_train": 30, "pre_nms_test": 60, "post_nms_test": 30},
        "roi": {"samples_per_image": 16, "score_threshold": 0.01},
        "image": {"shortest_side": [64], "longest_side": 96, "pad_multiple": 8},
        "optimizer": {
            "name": "adamw",
            "lr": 0.003,
            "bias_decay": False,
            "warmup_steps": 2,
            "schedule": "cosine",
            "ema_decay": 0.9,
        },
    },
    "data": {
        "train_splits": ["train"],
        "val_splits": ["odd"],
        "test_splits": ["test"],
        "allow_overlap": True,
        "batch_size": 2,
        "num_workers": 0,
    },
}


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error (Lightning's own log is not in it)."""

    code: int | str | None
    out: str
    err: str


Frcnn = Callable[..., Result]


# One thread for each test and each process that it starts: threads of OpenMP wait busily, and `make test` runs as many
# tests at once as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

WORKER_MEMORY = 2 * 2**30  # of a process that runs tests, with those that it starts


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which is not needed for tests one after the other
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process for each core, within the control group's share of them, that has the memory for it."""
    cores, memory = available_cores(), available_memory()
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, quota // period)
    return max(1, cores if memory is None else min(cores, memory // WORKER_MEMORY))


hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws without a seed of its own is the same in every run, alone and among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def usual_signal_handlers() -> None:
    """What libraries under test installed in this process (Ray, submitit) is not there in the next test; and a shell
    that started the tests in the background, where Ctrl-C is ignored, changes nothing."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The device of the tests marked gpu: CUDA, without TensorFloat-32; by FRCNN_GPU_TESTS_ON=cpu the processor, which
    tries the tests themselves."""
    if os.environ.get("FRCNN_GPU_TESTS_ON") == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or FRCNN_GPU_TESTS_ON=cpu")
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield torch.device("cuda")
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed
    torch.cuda.empty_cache()


@contextlib.contextmanager
def untouched_process(cwd: Path) -> Iterator[None]:
    """Put back what a command sets for its own process: working directory, import path, environment, random states,
    signals."""
    before, environment, threads = Path.cwd(), dict(os.environ), torch.get_num_threads()
    import_path = list(sys.path)
    interrupt = signal.getsignal(signal.SIGINT)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for name in ("FRCNN_RUN_DIR", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that the command starts, as of this one
    os.chdir(cwd)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = import_path
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, interrupt)


@pytest.fixture(scope="session")
def frcnn() -> Frcnn:
    """`frcnn(*arguments, cwd=folder)` runs a command in this process; exceptions other than exits come through."""

    def run(*arguments: object, cwd: Path) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with untouched_process(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: int | str | None = main([str(argument) for argument in arguments])
            except SystemExit as error:
                code = error.code
        return Result(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def mini_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 20 images, read-only: train 12, val 4, test 4, and `odd`: seven of the training images, so that
    briefly trained detectors score above zero on it."""
    folder = write_mini_voc(tmp_path_factory.mktemp("data") / "mini", images=20, seed=10)
    splits = folder / "ImageSets" / "Main"
    (splits / "odd.txt").write_text("\n".join((splits / "train.txt").read_text().split()[:7]) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, mini_voc: Path) -> Path:
    """A config file `tiny.yaml` of the smallest detector on `mini_voc`: six steps of two images in an epoch."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"root": str(mini_voc)}}))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, frcnn: Frcnn) -> Path:
    """The run folder `<cwd>/runs/tiny/seed0` of a finished training of 14 epochs, validated after every seventh;
    read-only."""
    cwd = tmp_path_factory.mktemp("trained")
    result = frcnn(
        "fit",
        *("--config", tiny_config),
        *("--trainer.max_epochs", 14),
        *("--trainer.check_val_every_n_epoch", 7),
        cwd=cwd,
    )
    assert result.code == 0, result.err
    return cwd / "runs" / "tiny" / "seed0"


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], dict[str, Any]]:
    """`metrics_of(run folder)`: its metrics.json."""

    def read(run: Path) -> dict[str, Any]:
        metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
        return metrics

    return read


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Parsed annotations and temporary files are kept in folders of the test session, not in the user's."""
    get_temp_dir()  # of this process, which removes it when it ends, after pytest
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRCNN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        temporary = str(tmp_path_factory.mktemp("t"))
        patch.setenv("TMPDIR", temporary)
        patch.setattr("tempfile.tempdir", temporary)
        yield


class ParsedOnly(DetectorCLI):
    """The real command line up to the point where something is built."""

    last: "ParsedOnly"

    def before_instantiate_classes(self) -> None:
        ParsedOnly.last = self

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


Resolve = Callable[..., Any]


@pytest.fixture(scope="session")
def resolve(frcnn: Frcnn) -> Resolve:
    """`resolve(*arguments)`: the options of `frcnn fit *arguments`, run in the repository's root; nothing is built."""

    def run(*arguments: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lightning_cli, "DetectorCLI", ParsedOnly)
            patch.setattr(option_table, "check_files", lambda *_: None)
            result = frcnn("fit", *arguments, cwd=ROOT)
        assert result.code == 0, result.err
        return ParsedOnly.last.config["fit"]

    return run


@pytest.fixture(scope="session")
def resolve_first_line(resolve: Resolve) -> Callable[[Path], Any]:
    """`resolve_first_line(experiment file)`: the options of the command in its first line, read once, after a check
    that every option of the file has reached the parser under its name, with its value."""
    known: dict[Path, Any] = {}

    def leaves(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]

    def run(path: Path) -> Any:
        if path not in known:
            known[path] = parse(path)
        return known[path]

    def parse(path: Path) -> Any:
        text = path.read_text()
        if yaml.safe_load(text)["model"].get("backbone", {}).get("name") == "timm":
            pytest.importorskip("timm", reason="timm is not installed: pip install '.[timm]'")
        first = text.splitlines()[0]
        assert first.startswith("# ")
        (command,) = re.findall(r"\bfrcnn fit .*", first)
        assert f"--config {path.relative_to(ROOT)}" in command
        words = shlex.split(command)
        options = resolve(*words[2:])
        given = {word.removeprefix("--") for word in words if word.startswith("--")}
        in_file = {key: value for key, value in leaves(yaml.safe_load(text), "") if key not in given}
        assert len(in_file) > 20
        assert {key: options[key] for key in in_file} == in_file
        return options

    return run


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """`shared_file(name)`: a genuine file; skips where it is not at hand."""
    folder = Path(os.environ.get("FRCNN_SHARED_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{folder} does not hold {name} (FRCNN_SHARED_DATA names another folder)")
        return folder / name

    return find


@pytest.fixture(scope="session")
def genuine_voc(tmp_path_factory: pytest.TempPathFactory, shared_file: Callable[[str], Path]) -> Callable[[str], Path]:
    """`genuine_voc(archive)`: the VOCdevkit of a genuine archive, unpacked once; read-only."""

    @functools.cache
    def unpack(name: str) -> Path:
        folder = tmp_path_factory.mktemp("genuine")
        with tarfile.open(shared_file(name)) as archive:
            archive.extractall(folder, filter="data")
        return folder / "VOCdevkit"

    return unpack


@pytest.fixture(scope="session")
def broken_dataset(tmp_path_factory: pytest.TempPathFactory, mini_voc: Path) -> BrokenDataset:
    """A copy of `mini_voc` with one of each defect; read-only."""
    return break_dataset(Path(shutil.copytree(mini_voc, tmp_path_factory.mktemp("broken") / "data")))


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """`wait_for(condition, process=None)`: until it holds; an error after five minutes, or once the process ended."""

    def wait(condition: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            assert process is None or process.poll() is None, process.communicate()
            time.sleep(0.02)

    return wait
