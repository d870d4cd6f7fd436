"""Files that are spoilt at random: every reader gives a result or one line, within bounded time and memory.

The same files in every run, unless FRCNN_FUZZ_MINUTES says how long each reader gets others; FRCNN_FUZZ_SEED tells
several such runs apart. The report at the end says how many were read and refused. Files are made of small ones that
are written here, and of genuine ones where these are (see CONTRIBUTING.md).
"""

import functools
import io
import itertools
import json
import os
import re
import resource
import socket
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.coco.format import read_coco
from datamodules.ground_truth import SplitTruth, read_ground_truth
from datamodules.voc.format import parse_annotation, parse_annotation_loosely
from datamodules.yolo.format import read_description, read_label
from detector.errors import InputError
from detector.training.checkpoint_content import read_checkpoint
from detector.training.lightning_module import FasterRCNNModule
from detector.training.resuming import check_training_state
from detector.use.reading import read_header, read_image
from experiments.ablation.cell_folder import CellFolder
from experiments.ablation.grid import read_grid
from experiments.ablation.monitor import Monitor
from experiments.results.files import read_results
from experiments.results.runs import read_folder
from experiments.run import lightning_cli
from tests.conftest import ParsedOnly, Result

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FRCNN_SHARED_DATA", ROOT.parent / "shared" / "data"))
MINUTES = float(os.environ.get("FRCNN_FUZZ_MINUTES", "0"))
SEED = int(os.environ.get("FRCNN_FUZZ_SEED", "0"))
SECONDS = 5.0
MEMORY = 3 * 2**30  # beside what the process has when it begins
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 120 * MINUTES)]


def fuzz(examples: int = 1000) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of hypothesis with so many files, and again with others until its time is over."""

    def wrapped(test: Callable[..., None]) -> Callable[..., None]:
        plainly = {"deadline": None, "database": None, "phases": [Phase.generate], "print_blob": False}
        test = settings(max_examples=examples, suppress_health_check=list(HealthCheck), **plainly)(test)

        @functools.wraps(test)
        def rounds(**fixtures: Any) -> None:
            ends = time.monotonic() + 60 * MINUTES
            for number in itertools.count(10**6 * SEED):
                seed(number)(test)(**fixtures)
                if time.monotonic() >= ends:
                    break
            found = [f"{count} times: {said}" for said, count in findings.values()]
            findings.clear()
            assert not found, "\n".join(found)

        return rounds

    return wrapped


TEXTS = st.sampled_from(
    [b"\0", b"<", b"&a;", b"]]>", b"[", b"{", b'"', b"*a", b"&a ", b"!!", b"-", b"1e999", b"NaN", b"../", b"\xff\xfe"]
)
LONG_TEXTS = st.sampled_from(
    [b"9" * 400, b"9" * 5000, b"[" * 100_000, b'{"a":' * 20_000, b"<a>" * 20_000, b"- " * 5000, b"../" * 2000]
)
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 8), st.one_of(TEXTS, LONG_TEXTS, st.binary(max_size=6)))
ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["../x", "<b>", "\x1b[31m", "10" * 200, "nan", "-1", "*a"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def edited(data: bytes, edits: list[tuple[float, int, bytes]], cut: float) -> bytes:
    """Put some bytes in the place of others, and cut the end off."""
    for where, length, text in edits:
        at = int(where * len(data))
        data = data[:at] + text + data[at + length :]
    return data[: int(cut * len(data)) + 1]


bytes_of = st.tuples(st.lists(EDIT, max_size=4), st.one_of(st.just(1.0), st.floats(0, 1)))


def replaced(document: Any, path: list[float], value: Any) -> Any:
    """Return a document with one of its values replaced; each number of the path chooses among the entries."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    at = int(path[0] * (len(document) - 1))
    if isinstance(document, dict):
        key = list(document)[at]
        return document | {key: replaced(document[key], path[1:], value)}
    return [*document[:at], replaced(document[at], path[1:], value), *document[at + 1 :]]


PATHS = st.lists(st.floats(0, 1), min_size=1, max_size=6)
WHICH = st.integers(0, 10**6)
KINDS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000"]
HEADER = 20_000  # bytes of a file of safetensors in which its header ends
counts: Counter[tuple[str, str]] = Counter()
findings: dict[str, tuple[str, int]] = {}


@pytest.fixture(scope="module", autouse=True)
def bounded(trained) -> Iterator[None]:
    """Memory has a limit, once everything is there; at the end the report."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(*(f"\n{reader}: {count} {outcome}" for (reader, outcome), count in sorted(counts.items())))


def survives(reader: str, read: Callable[[], object]) -> None:
    """Accept a result, or one line, of a reader that does not compute for long."""
    began, outcome = time.process_time(), "read"
    try:
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 3000
            outcome = "refused"
        assert time.process_time() - began < SECONDS
    except Exception as error:  # the others are looked for, too, instead of the smallest file that shows this one
        said = traceback.format_exc()
        places = [line for line in said.splitlines() if line.startswith("  File") and str(ROOT) in line]
        key = f"{reader}, {type(error).__name__}, {places[-1]}"
        findings[key] = (said[-3000:], findings.get(key, ("", 0))[1] + 1)
        outcome = "findings"
    counts[reader, outcome] += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("fuzz")
    return path


@fuzz()
@given(bytes_of, st.floats(0, 1), ODD, WHICH)
def test_xml(genuine, spoilt, where, value, which):
    values = list(re.finditer(rb">([^<>\n]+)<", XML))
    at = values[int(where * (len(values) - 1))].span(1)
    text = escape(str(value)).encode("utf-8", "surrogatepass")
    for data in (
        edited(XML, *spoilt),
        edited(XML.replace(b"utf-8", b"utf-16"), *spoilt),
        edited(XML.replace(b"?>", b"?>" + ENTITIES), *spoilt),
        XML[: at[0]] + text + XML[at[1] :],
        *(edited(data, *spoilt) for data in chosen(genuine, "xml", which)),
    ):
        survives("XML", lambda data=data: parse_annotation(data, Path("a.xml")))
        survives("XML, loosely", lambda data=data: parse_annotation_loosely(data, Path("a.xml")))


@fuzz()
@given(bytes_of, PATHS, ODD)
def test_coco(folder, spoilt, path, value):
    file = folder / "instances.json"
    for data in (edited(json.dumps(COCO).encode(), *spoilt), json.dumps(replaced(COCO, path, value)).encode()):
        file.write_bytes(data)
        survives("COCO JSON", lambda: read_coco(file))


@fuzz()
@given(bytes_of, PATHS, ODD)
def test_results(folder, truth, spoilt, path, value):
    file = folder / "results.json"
    for data in (edited(json.dumps(RESULTS).encode(), *spoilt), json.dumps(replaced(RESULTS, path, value)).encode()):
        file.write_bytes(data)
        survives("result JSON", lambda: read_results(file, truth))


@fuzz()
@given(bytes_of, st.sampled_from(KINDS), WHICH)
def test_images(folder, genuine, spoilt, kind, which):
    file = folder / f"image.{kind.lower()}"
    for data in (IMAGES[kind], *chosen(genuine, "jpg", which)):
        file.write_bytes(edited(data, *spoilt))
        survives("image header", lambda: read_header(file))
        survives("image", lambda: read_image(file, upright=True))


@fuzz()
@given(bytes_of, PATHS, ODD)
def test_grids(folder, spoilt, path, value):
    for number, text in enumerate(GRIDS):
        file, odd = folder / f"grid{number}.yaml", replaced(yaml.safe_load(text), path, value)
        for data in (edited(text, *spoilt), yaml.safe_dump(odd, allow_unicode=True).encode("utf-8", "surrogatepass")):
            file.write_bytes(data)
            survives("YAML grid", lambda file=file: read_grid(file))


@fuzz()
@given(bytes_of, PATHS, ODD)
def test_yolo(folder, spoilt, path, value):
    file = folder / "data.yaml"
    for data in (edited(YOLO, *spoilt), yaml.safe_dump(replaced(yaml.safe_load(YOLO), path, value)).encode()):
        file.write_bytes(data)
        survives("YOLO's data.yaml", lambda: read_description(folder))
    label = edited(b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.3 0.1 0.2 0.4\n", *spoilt).decode("latin-1")
    survives("YOLO's labels", lambda: read_label(label, Path("a.txt"), (30, 20), {0: "a", 1: "b"}, False))


@fuzz()
@given(bytes_of, PATHS, ODD)
def test_run_folders(folder, trained, spoilt, path, value):
    runs = folder / "runs"
    (runs / "a").mkdir(parents=True, exist_ok=True)
    whole = {f"a/{name}": (trained / name).read_bytes() for name in ("config.yaml", "metrics.json")}
    whole |= {"a/cell.json": json.dumps(CELL).encode(), "grid.json": json.dumps(GRID).encode()}
    for name, text in whole.items():
        for data in (edited(text, *spoilt), json.dumps(replaced(yaml.safe_load(text), path, value)).encode()):
            for other, content in whole.items():
                (runs / other).write_bytes(content)
            (runs / name).write_bytes(data)
            survives(f"run folder, {name}", lambda: read_folder(runs))
            (runs / "grid.json").unlink()
            survives(f"run folder, {name}, without its plan", lambda: read_folder(runs))
            Monitor("grid", [CellFolder(runs / "a")], 1, io.StringIO())._table()


@fuzz(100)
@given(bytes_of, PATHS, ODD)
def test_training_configs(folder, frcnn, tiny_config, spoilt, path, value):
    file = folder / "config.yaml"
    text, odd = tiny_config.read_bytes(), replaced(yaml.safe_load(tiny_config.read_text()), path, value)
    for data in (edited(text, *spoilt), yaml.safe_dump(odd, allow_unicode=True).encode("utf-8", "surrogatepass")):
        file.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lightning_cli, "DetectorCLI", ParsedOnly)
            survives("training config", lambda: _said(frcnn("fit", "--config", file, cwd=folder)))


def _said(result: Result) -> None:
    """Raise what a command has refused in its line."""
    if result.code:
        assert result.code == 2
        (line,) = [line for line in result.err.splitlines() if line.startswith("frcnn: ")]
        raise InputError(line)


@fuzz(100)
@given(bytes_of, PATHS, ODD)
def test_safetensors(folder, content, spoilt, path, value):
    file = folder / "model.safetensors"
    options = dict(content["hyper_parameters"])
    about = {"class_names": options.pop("class_names"), "bit_depth": 16, "step": 3, "options": options}
    state = content["state_dict"]
    tensors = {name.removeprefix("model."): state[name].clone(memory_format=torch.contiguous_format) for name in state}
    for odd in (about, replaced(about, path, value)):
        data = safetensors.torch.save(tensors, {"frcnn": json.dumps(odd)})
        for written in (data, edited(data, *spoilt), edited(data[:HEADER], *spoilt) + data[HEADER:]):
            file.write_bytes(written)
            survives("safetensors", lambda: read_checkpoint(file))
            survives("safetensors, detector", lambda: FasterRCNNModule.from_checkpoint(file))


@fuzz(100)
@given(bytes_of, PATHS, ODD)
def test_checkpoints(folder, content, spoilt, path, value):
    file, other = folder / "bytes.ckpt", folder / "content.ckpt"
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file.write_bytes(edited(buffer.getvalue(), *spoilt))
    survives("checkpoint, bytes", lambda: read_checkpoint(file))
    torch.save(replaced(content, path, value), other)
    survives("checkpoint, state", lambda: check_training_state(other, read_checkpoint(other)))
    options = replaced(content["hyper_parameters"], path, value)
    torch.save(content | {"hyper_parameters": options}, other)
    survives("checkpoint, detector", lambda: FasterRCNNModule.from_checkpoint(other))


@pytest.fixture(scope="module")
def genuine() -> dict[str, list[bytes]]:
    """Genuine files by suffix, as far as they are here."""
    found: dict[str, list[bytes]] = {"xml": [], "jpg": []}
    archive = SHARED / "voc2012-subset.tar"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            for member in tar:
                files = found.get(member.name[-3:], [])
                if member.isfile() and len(files) < 100:
                    files.append(tar.extractfile(member).read())
    return found


def chosen(genuine: dict[str, list[bytes]], suffix: str, which: int) -> list[bytes]:
    """One of the genuine files, if there are any."""
    files = genuine[suffix]
    return [files[which % len(files)]] if files else []


@pytest.fixture(scope="module")
def content(trained) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def truth(mini_voc) -> SplitTruth:
    from datamodules.voc.reader import VOCFormat

    return read_ground_truth(VOCFormat(mini_voc), ["train"])


def _image(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: _image(kind) for kind in KINDS}
XML = b"""<?xml version="1.0" encoding="utf-8"?>
<annotation><folder>f</folder><filename>a.jpg</filename><size><width>50</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><truncated>1</truncated><bndbox><xmin>1</xmin><ymin>2.5</ymin>
<xmax>30</xmax><ymax>40</ymax></bndbox></object><object><name>dog</name><bndbox><xmin>5</xmin><ymin>2</ymin>
<xmax>8</xmax><ymax>4</ymax></bndbox></object></annotation>"""
ENTITIES = b'<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 24}, {"id": 7, "file_name": "b.jpg"}],
    "categories": [{"id": 1, "name": "cat", "supercategory": "x"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4.5], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6]]},
    ],
}
RESULTS = [
    {"image_id": 0, "file_name": "mini_000001.jpg", "category_name": "star", "score": 0.5, "bbox": [1, 2, 3, 4]},
    {"image_id": 3, "category_id": 2, "score": 1, "bbox": [1.5, 2, 3, 4]},
]
CELL = {
    **{"name": "scales=1,seed=0", "axes": {"scales": "1"}, "seed": 0, "hash": "ab", "status": "running", "attempts": 1},
    **{"host": socket.gethostname(), "pid": 2**22, "seconds": 1.5, "exit_code": None, "error": None, "steps": 84},
    **{"stages": [["fit", "--config=a.yaml"]], "finished_stages": [], "cwd": "/"},
}
GRID = {
    **{"name": "g", "axes": {"scales": ["1"]}, "seeds": [0], "baseline": "scales=1", "paper": {"scales=1": 0.5}},
    "base_options": {"model.rpn.nms_iou": 0.7},
    "cells": [
        {"name": "scales=1,seed=0", "axes": {"scales": "1"}, "seed": 0, "hash": "ab", "folder": "a", "overrides": {}}
    ],
}
YOLO = b"path: .\ntrain: images/train\nval: [images/a, b.txt]\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
GRIDS = [file.read_bytes() for file in sorted((ROOT / "experiments" / "ablations").glob("*.yaml"))]
