"""`precision auto`: what it chooses on which device, and that a run keeps what was chosen."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.accelerators import CUDAAccelerator, MPSAccelerator

from detector.image_batch import ImageConfig
from detector.kernels import processor
from experiments.run.precision import automatic_precision, emulation, resolve_precision, say_range, slowdown
from experiments.run.training_options import OptionsCLI


@pytest.fixture
def machine(monkeypatch):
    """`machine(flags, gpus)`: a computer with such a CPU, and with GPUs of such compute capabilities."""

    def make(flags: set[str] = frozenset(), gpus: list[tuple[int, int]] | None = None, mps: bool = False) -> None:
        gpus = gpus or []
        monkeypatch.setattr(processor, "cpu_flags", lambda: flags)
        monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: mps))
        monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: bool(gpus)))
        monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: len(gpus)))
        monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(_indices))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(current.append(index)))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")

    current: list[int] = []  # the devices that were made the current one for questions

    def _indices(devices: Any) -> list[int]:
        return devices if isinstance(devices, list) else list(range(int(devices)))

    make.current = current
    return make


@pytest.mark.parametrize(
    ("flags", "chosen", "reason"),
    [
        ({"avx2", "avx512_bf16", "amx_bf16", "amx_tile"}, "bf16-mixed", "this CPU has AMX"),
        ({"avx2", "avx512_bf16"}, "bf16-mixed", "this CPU has AVX-512 BF16"),
        ({"neon", "bf16"}, "bf16-mixed", "this CPU has NEON BF16"),
        ({"avx2", "avx512_f", "amx_tile"}, "32-true", "this CPU has no bfloat16 arithmetic"),
    ],
)
def test_cpus(machine, flags, chosen, reason) -> None:
    machine(flags)
    assert automatic_precision("cpu") == automatic_precision("auto") == (chosen, reason)


@pytest.mark.parametrize(
    ("capability", "chosen", "words"),
    [
        ((9, 0), "bf16-mixed", "9.0"),
        ((8, 0), "bf16-mixed", "8.0"),
        ((7, 5), "16-mixed", "7.5"),
        ((6, 1), "32-true", "6.1"),
    ],
)
def test_gpus(machine, capability, chosen, words) -> None:
    machine({"amx_bf16"}, [capability])
    for accelerator in ("auto", "gpu", "cuda"):
        found, reason = automatic_precision(accelerator)
        assert found == chosen
        assert words in reason
    assert automatic_precision("cpu") == ("bf16-mixed", "this CPU has AMX")


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [("auto", "16-mixed"), (2, "16-mixed"), (1, "bf16-mixed"), ([1], "16-mixed"), ([0], "bf16-mixed")],
)
def test_the_weakest_of_the_gpus_that_are_used_decides(machine, devices, chosen) -> None:
    machine(gpus=[(8, 6), (7, 0)])
    assert automatic_precision("gpu", devices)[0] == chosen


@pytest.mark.parametrize(
    ("variable", "devices", "own"), [("LOCAL_RANK", "auto", 1), ("SLURM_LOCALID", [0, 2], 2), ("", 3, 0)]
)
def test_questions_are_asked_on_the_own_gpu(machine, monkeypatch, variable, devices, own) -> None:
    """Or every process would take memory of the first one; all choose by the weakest of the GPUs."""
    machine(gpus=[(8, 6), (8, 0), (7, 0)])
    monkeypatch.setenv(variable or "UNUSED", "1")
    automatic_precision("gpu", devices)
    assert machine.current == [own]


def test_other_accelerators(machine) -> None:
    machine({"amx_bf16"}, mps=True)
    assert automatic_precision("auto")[0] == automatic_precision("gpu")[0] == "32-true"
    machine({"amx_bf16"})
    assert automatic_precision("gpu")[0] == "32-true"  # there is none: the Trainer says so


def test_anything_else_stays_as_it_is(machine, caplog) -> None:
    machine({"amx_bf16"})
    assert [resolve_precision(value, "cpu") for value in ("16-mixed", 64, None)] == ["16-mixed", 64, None]
    assert caplog.text == ""


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "bf16", "16-mixed", "16", 16])
def test_what_the_cpu_emulates_is_said_in_one_line(machine, monkeypatch, caplog, precision) -> None:
    machine({"avx2", "avx512_f"})
    monkeypatch.setattr("experiments.run.precision.slowdown", lambda dtype: 165.93)
    assert resolve_precision(precision, "cpu") == precision
    name = precision if str(precision).startswith("bf16") else "bf16-mixed"  # that is what Lightning then does
    assert caplog.messages == [
        f"warning: precision {name} is slow here: this CPU has no bfloat16 arithmetic and emulates it, so that a "
        "product of matrices takes 165.9 times as long as in float32. Better: --trainer.precision auto"
    ]


def test_float16_on_a_cpu(machine, monkeypatch, caplog) -> None:
    machine({"avx2", "avx512_f", "avx512_bf16"})
    native = False
    monkeypatch.setattr("experiments.run.precision._onednn_computes_float16", lambda: native)
    assert "has no float16 arithmetic" in str(emulation("16-true", "cpu"))
    native = True
    assert emulation("16-true", "cpu") is None


@pytest.mark.parametrize("precision", ["32-true", "64-true", 32, None, "auto", "transformer-engine"])
def test_nothing_is_said_of_others(machine, caplog, precision) -> None:
    machine({"avx2"})
    resolve_precision(precision, "cpu")
    assert "slow" not in caplog.text


def test_gpus_that_emulate_bfloat16(machine, caplog) -> None:
    """The weakest of those that are used; float16 is at home on all."""
    machine({"avx2"}, gpus=[(8, 6), (7, 0)])
    resolve_precision("bf16-mixed", "gpu", 1)
    resolve_precision("16-mixed", "gpu", 2)
    assert caplog.messages == []
    resolve_precision("bf16-mixed", "auto", 2, option="--precision")
    (line,) = caplog.messages
    assert line.startswith("warning: precision bf16-mixed is slow here: GPU 1 (compute capability 7.0) has no bfloat16")
    assert line.endswith("Better: --precision auto")
    machine({"avx2"})  # no GPU: the Trainer says so
    assert emulation("bf16-mixed", "gpu") is None
    machine({"avx2"}, mps=True)
    assert emulation("bf16-mixed", "auto") is None


CAFFE = {"pixel_max": 255.0, "mean": [102.9801, 115.9465, 122.7717], "std": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("precision", "accelerator", "options", "said"),
    [
        ("16-mixed", "gpu", CAFFE, "the network's input reaches 152 (image.pixel_max, mean, std), and float16 ends"),
        (16, "gpu", CAFFE, "precision 16 may overflow"),
        ("16-mixed", "gpu", {}, ""),
        ("16-mixed", "cpu", CAFFE, ""),  # Lightning takes bfloat16 there
        ("bf16-mixed", "gpu", CAFFE, ""),
    ],
)
def test_where_float16_may_overflow_is_said(machine, caplog, precision, accelerator, options, said) -> None:
    machine(gpus=[(7, 5)])
    say_range(precision, accelerator, ImageConfig(**options))
    assert (said in caplog.text) if said else caplog.text == ""


def test_emulated_products_of_matrices_are_timed() -> None:
    """No random number is drawn, so that the training's are the same."""
    state = torch.get_rng_state()
    assert slowdown(torch.float16) > 0.05
    assert torch.equal(torch.get_rng_state(), state)


def test_no_experiment_names_a_precision() -> None:
    """What one device computes another emulates: `auto` chooses, and without it Lightning's float32 holds."""
    files = sorted((Path(__file__).resolve().parents[3] / "experiments").rglob("*.yaml"))
    named = [re.findall(r"precision:? *=? *([\w-]+)", path.read_text()) for path in files]
    assert {value for values in named for value in values} == {"auto"}


@pytest.mark.parametrize("name", ["mini_voc.yaml", "voc12_subset_mobilenet_v2.yaml"])
def test_commands_without_a_training_take_auto_too(name) -> None:
    """`frcnn anchors`, `show-data`, `benchmark` and `ablate` read the same files."""
    file = Path(__file__).resolve().parents[3] / "experiments" / name
    assert OptionsCLI(["--config", str(file)]).config.trainer.precision == "auto"


def test_a_run_keeps_what_was_chosen(machine, frcnn, tiny_config, mini_voc, tmp_path, caplog) -> None:
    """Resumed, validated or repeated from its config.yaml on another machine, it computes in the same precision."""
    machine({"amx_bf16"})
    fit = ("fit", "--config", tiny_config, "--trainer.precision", "auto", "--trainer.limit_val_batches", 0)
    result = frcnn(*fit, "--trainer.max_steps", 2, cwd=tmp_path)
    assert result.code == 0, result.err
    assert caplog.text.count("precision auto: bf16-mixed, this CPU has AMX") == 1
    assert "slow" not in caplog.text
    run = tmp_path / "runs" / "tiny" / "seed0"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"

    machine()
    checkpoint = run / "checkpoints" / "last.ckpt"
    for options, used in (((), True), (("--trainer.precision", "auto"), False)):
        caplog.clear()
        result = frcnn("validate", "--config", run / "config.yaml", "--ckpt_path", checkpoint, *options, cwd=tmp_path)
        assert result.code == 0, result.err
        assert ("Using bfloat16 Automatic Mixed Precision" in caplog.text) == used
        assert caplog.text.count("warning: precision bf16-mixed is slow here: this CPU has no bfloat16") == used

    caplog.clear()
    machine({"avx512_bf16"})
    images = mini_voc / "JPEGImages"
    predict = ("predict", "--ckpt_path", checkpoint, "--images", next(images.iterdir()), "--output", tmp_path / "out")
    assert frcnn(*predict, "--precision", "auto", "--accelerator", "cpu", cwd=tmp_path).code == 0
    assert caplog.text.count("precision auto: bf16-mixed, this CPU has AVX-512 BF16") == 1

    caplog.clear()
    machine()
    assert frcnn(*predict, "--precision", "bf16-mixed", "--accelerator", "cpu", cwd=tmp_path).code == 0
    (line,) = [line for line in caplog.messages if "slow" in line]
    assert line.endswith("Better: --precision auto")


def test_unknown_precision(frcnn, tiny_config, tmp_path) -> None:
    result = frcnn("fit", "--config", tiny_config, "--trainer.precision", "automatic", cwd=tmp_path)
    assert result.code == 2
    assert "trainer.precision" in result.err and "auto" in result.err
