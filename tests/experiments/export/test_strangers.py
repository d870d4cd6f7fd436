"""Files that are no detectors, of other versions, or made to run code: one line each, and nothing is executed."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import detector
from detector.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "experiments" / "weights" / "mini_voc.ckpt"
TRAP = "sprung"
"""A folder that appears where the tests run once any of the files has its way."""


class Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (TRAP,)


def changed(**values: object) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(SHIPPED, weights_only=True)
    return content | values


def with_option(part: str, key: str) -> dict[str, Any]:
    content = changed()
    content["hyper_parameters"][part][key] = 1
    return content


CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "code": (lambda: Trap(), "not a readable checkpoint of frcnn fit (UnpicklingError)"),
    "code among options": (lambda: changed(hyper_parameters=Trap()), "not a readable checkpoint of frcnn fit"),
    "a state dict": (lambda: {"fc.weight": torch.zeros(2, 2)}, "not a checkpoint of frcnn fit (it lacks one of"),
    "a module": (lambda: torch.nn.Linear(2, 2), "not a readable checkpoint of frcnn fit (UnpicklingError)"),
    "no options": (lambda: changed(hyper_parameters={}), "not a checkpoint of frcnn fit"),
    "an option of another version": (lambda: with_option("rpn", "from_the_future"), "from_the_future"),
}


@pytest.fixture(params=CONTENTS)
def stranger(request, tmp_path) -> tuple[Path, str]:
    make, line = CONTENTS[request.param]
    torch.save(make(), tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt", line


def test_load_says_what_it_is(stranger, tmp_path, monkeypatch):
    path, line = stranger
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        detector.load(path)
    assert str(caught.value).startswith(f"{path}: ") and line in str(caught.value)
    assert "\n" not in str(caught.value) and not Path(TRAP).exists()


@pytest.mark.parametrize("content", ["code", "a state dict"])
@pytest.mark.parametrize("command", ["export", "predict", "evaluate", "benchmark"])
def test_commands_say_what_it_is(command, content, tmp_path, frcnn, mini_voc):
    make, line = CONTENTS[content]
    torch.save(make(), tmp_path / "x.ckpt")
    words: dict[str, tuple[object, ...]] = {
        "export": ("export", "x.ckpt", "--format", "torch_export", "--output", "out"),
        "predict": ("predict", "--ckpt_path", "x.ckpt", "--images", mini_voc / "JPEGImages", "--output", "out"),
        "evaluate": ("evaluate", "x.ckpt", "--data.root", mini_voc, "--data.val_splits", "[val]"),
        "benchmark": ("benchmark", "infer", "--detectors", "[x.ckpt]"),
    }
    result = frcnn(*words[command], cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert line in result.err and "Traceback" not in result.err and result.err.count("\n") == 1
    assert not (tmp_path / TRAP).exists()


# ---- programs of torch.export ----


@pytest.fixture(scope="module")
def program(export_of_shipped) -> Path:
    return export_of_shipped("torch_export") / "model.pt2"


def rewritten(source: Path, target: Path, suffix: str, change: Callable[[bytes], bytes]) -> None:
    """Copy an archive with one of its files, the one whose name ends so, changed."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        names = [name for name in before.namelist() if name.endswith(suffix)]
        assert len(names) == 1
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, change(content) if name == names[0] else content)


def trap_of_torch(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save(Trap(), file)
    return file.getvalue()


def of_model(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        model = json.loads(content)
        change(model)
        return json.dumps(model).encode()

    return apply


def call_a_stranger(model: dict[str, Any]) -> None:
    next(iter(model["graph_module"]["graph"]["nodes"]))["target"] = "torch.serialization.os.mkdir"


@pytest.mark.parametrize(
    ("suffix", "change", "line"),
    [
        ("sample_inputs/model.pt", trap_of_torch, "cannot be read (Weights only load failed"),
        (
            "models/model.json",
            of_model(call_a_stranger),
            "would run torch.serialization.os.mkdir, which no file of frcnn export does",
        ),
        (
            "models/model.json",
            of_model(lambda model: model["guards_code"].append(f"__import__('os').mkdir('{TRAP}')")),
            "would evaluate __import__, which no file of frcnn export does",
        ),
        (
            "models/model.json",
            lambda content: content.replace(b"Integer(2)", b"open('/etc/passwd')"),
            "would evaluate open, which no file of frcnn export does",
        ),
    ],
)
def test_programs_do_not_run_code(suffix, change, line, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewritten(program, tmp_path / "model.pt2", suffix, change)
    with pytest.raises(InputError) as caught:
        detector.load(tmp_path / "model.pt2")
    assert str(caught.value).startswith(f"{tmp_path / 'model.pt2'}: ") and line in str(caught.value)
    assert "\n" not in str(caught.value) and not Path(TRAP).exists()


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_files_that_are_no_programs(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if suffix == ".xml":
        pytest.importorskip("openvino", reason="openvino is not installed")
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"<net>nothing</net>")
    with pytest.raises(InputError) as caught:
        detector.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        detector.load(path)


def test_a_program_of_another_version(program, tmp_path):
    rewritten(
        program, tmp_path / "model.pt2", "extra/frcnn", lambda content: content.replace(b'"bit_depth"', b'"depth"')
    )
    with pytest.raises(InputError, match=r"was not written by this version of frcnn export \(KeyError: 'bit_depth'\)"):
        detector.load(tmp_path / "model.pt2")
    shutil.copy(program, tmp_path / "other.pt2")
    assert detector.load(tmp_path / "other.pt2").class_names[1] == "cross"
