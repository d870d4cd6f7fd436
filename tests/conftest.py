"""What many tests share: a small dataset, a tiny experiment, and the command line, run in this process."""

import contextlib
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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps

from datamodules.mini_voc.writer import write_mini_voc
from experiments.cli import main
from experiments.run import lightning_cli
from experiments.run.lightning_cli import DetectorCLI

ROOT = Path(__file__).resolve().parents[1]

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
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Parsed annotations are kept in a folder of the test session, not in the user's."""
    before = os.environ.get("FRCNN_CACHE_DIR")
    os.environ["FRCNN_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FRCNN_CACHE_DIR")
    if before is not None:
        os.environ["FRCNN_CACHE_DIR"] = before


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
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ")
        (command,) = re.findall(r"\bfrcnn fit .*", first)
        assert f"--config {path.relative_to(ROOT)}" in command
        words = shlex.split(command)
        options = resolve(*words[2:])
        given = {word.removeprefix("--") for word in words if word.startswith("--")}
        in_file = {key: value for key, value in leaves(yaml.safe_load(path.read_text()), "") if key not in given}
        assert len(in_file) > 20
        assert {key: options[key] for key in in_file} == in_file
        return options

    return run


MINI_CLASSES = ["cross", "ellipse", "rectangle", "ring", "star", "triangle"]


@dataclass(frozen=True)
class BrokenDataset:
    """A dataset with one of each defect.

    Attributes:
        root: Its folder.
        problems: All there is to find, as (file relative to `root`, object, kind), with `class_names`.
        stops: Those of them that stop a training on train, validated on val.
        class_names: The six classes that there are, and one that there is not.
        usable: Names of the training images that are left when all these are skipped.
    """

    root: Path
    problems: set[tuple[str, int | None, str]]
    stops: set[tuple[str, int | None, str]]
    class_names: list[str]
    usable: set[str]


@pytest.fixture(scope="session")
def broken_dataset(tmp_path_factory: pytest.TempPathFactory, mini_voc: Path) -> BrokenDataset:
    """A copy of `mini_voc` with one of each defect; read-only."""
    return break_dataset(Path(shutil.copytree(mini_voc, tmp_path_factory.mktemp("broken") / "data")))


def break_dataset(root: Path) -> BrokenDataset:
    """Spoil a copy of `mini_voc`."""
    train, val = ((root / "ImageSets" / "Main" / f"{name}.txt").read_text().split() for name in ("train", "val"))
    found: set[tuple[str, int | None, str]] = set()

    def image(stem: str) -> Path:
        return root / "JPEGImages" / f"{stem}.jpg"

    def annotation(stem: str) -> Path:
        return root / "Annotations" / f"{stem}.xml"

    def expect(path: Path, kind: str, index: int | None = None) -> None:
        found.add((path.relative_to(root).as_posix(), index, kind))

    image(train[0]).write_bytes(image(train[0]).read_bytes()[:-700])
    expect(image(train[0]), "truncated_image")
    image(train[1]).write_text("no image")
    expect(image(train[1]), "unreadable_image")
    image(train[2]).unlink()
    expect(image(train[2]), "missing_image")
    annotation(train[3]).unlink()
    expect(annotation(train[3]), "missing_annotation")
    annotation(train[4]).write_text("<annotation><object></annotation>")
    expect(annotation(train[4]), "unreadable_annotation")

    tree = ElementTree.parse(annotation(train[5]))
    size = tree.find("size")
    assert size is not None
    width, height = (int(size.findtext(key) or 0) for key in ("width", "height"))
    first = tree.find("object")
    assert first is not None
    name = first.findtext("name") or ""
    old = [int(first.findtext(f"bndbox/{key}") or 0) for key in ("xmin", "ymin", "xmax", "ymax")]
    count = len(tree.findall("object"))
    for kind, of_class, box in (
        ("negative_box", "ring", (21, 5, 20, 9)),
        ("box_outside", "ring", (width + 1, 5, width + 30, 9)),
        ("box_partly_outside", "ring", (5, height - 8, 20, height + 9)),
        ("one_pixel_box", "ring", (7, 5, 7, 9)),
        ("duplicate_object", name, old),
        ("unknown_class", "zebra", (3, 5, 14, 11)),
        ("misspelt_class", "Elipse", (3, 5, 15, 12)),
        ("incomplete_object", "ring", ()),
    ):
        node = ElementTree.SubElement(tree.getroot(), "object")
        ElementTree.SubElement(node, "name").text = of_class
        bndbox = ElementTree.SubElement(node, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False):
            ElementTree.SubElement(bndbox, key).text = str(value)
        expect(annotation(train[5]), kind, count)
        count += 1
    tree.write(annotation(train[5]))

    def rewrite(stem: str, pattern: str, by: str, to: str | None = None) -> None:
        text = re.sub(pattern, by, annotation(stem).read_text(), flags=re.DOTALL)
        annotation(to or stem).write_text(text)

    rewrite(train[6], r"<width>\d+</width>", "<width>1234</width>")
    expect(annotation(train[6]), "size_mismatch")
    rewrite(train[7], "<object>.*</object>", "")
    expect(annotation(train[7]), "empty_image")
    rewrite(train[8], "<filename>.*</filename>", "<filename>other.jpg</filename>")
    expect(annotation(train[8]), "file_name_mismatch")
    rewrite(train[9], re.escape(train[9]), val[1], to=val[1])
    with Image.open(image(train[9])) as picture:
        picture.save(image(val[1]), quality=60)
    expect(image(train[9]), "leak_by_content")
    rewrite(train[10], re.escape(train[10]), "zz_copy", to="zz_copy")
    with Image.open(image(train[10])) as picture:
        picture.resize((2 * picture.width, 2 * picture.height)).save(image("zz_copy"))
        ImageOps.flip(picture).save(image("zz_unnamed"))
    rewrite("zz_copy", r"<width>\d+</width><height>\d+</height>|<size>.*</size>", "")
    expect(image("zz_copy"), "duplicate_image")
    rewrite(train[10], re.escape(train[10]), "zz_unnamed", to="zz_unnamed")
    expect(image("zz_unnamed"), "not_in_split")

    splits = root / "ImageSets" / "Main"
    (splits / "train.txt").write_text("\n".join([*train, "zz_copy", "zz_nothere", val[0]]) + "\n")
    expect(image("zz_nothere"), "missing_image")
    expect(annotation("zz_nothere"), "missing_annotation")
    expect(splits / "train.txt", "leak_by_name")
    (splits / "nothing.txt").write_text("\n")
    expect(splits / "nothing.txt", "unusable_split")
    (splits / "twice.txt").write_text(f"{train[9]}\n{train[8]}\n{train[9]}\n")
    expect(splits / "twice.txt", "named_twice")
    expect(root, "class_without_objects")
    harmless = {
        "box_partly_outside",
        "one_pixel_box",
        "duplicate_object",
        "size_mismatch",
        "empty_image",
        "not_in_split",
    }
    harmless |= {"file_name_mismatch", "leak_by_content", "duplicate_image", "class_without_objects"}
    stops = {item for item in found if item[2] not in harmless | {"unusable_split", "named_twice"}}
    return BrokenDataset(root, found, stops, [*MINI_CLASSES, "hexagon"], {*train[5:], "zz_copy"})


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
