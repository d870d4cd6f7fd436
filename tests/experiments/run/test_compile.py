"""`--model.compile` on the command line: the same training, exact resuming, ordinary checkpoints."""

import shutil

import pytest
import torch

from detector.errors import InputError
from detector.training import compilation
from detector.training.lightning_module import FasterRCNNModule, read_checkpoint
from experiments.run import lightning_cli


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile for the CPU with")
def test_compiled_training(frcnn, tiny_config, mini_voc, tmp_path) -> None:
    """Resumed at another image size than it began with, so that its graphs are made from other examples."""
    fit = ("fit", "--config", tiny_config, "--trainer.max_epochs", 2, "--model.image.shortest_side", "[48, 64]")
    runs = {}
    # Not with AdamW, which makes whole steps of gradients that are nothing but rounding.
    sgd = ("--model.optimizer.name", "sgd", "--model.optimizer.lr", 0.01)
    for name, options in (("eager", sgd), ("whole", (*sgd, "--model.compile", "default"))):
        (tmp_path / name).mkdir()
        torch._dynamo.reset()
        assert frcnn(*fit, *options, cwd=tmp_path / name).code == 0
        runs[name] = tmp_path / name / "runs" / "tiny" / "seed0"
    weights = {name: read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for name, run in runs.items()}
    assert list(weights["eager"]) == list(weights["whole"])
    for key, tensor in weights["eager"].items():
        difference = (weights["whole"][key] - tensor).abs().max().item()
        assert difference <= 5e-4, (key, difference)

    (tmp_path / "parts").mkdir()
    for epochs, options in ((1, ()), (2, ("--ckpt_path", "runs/tiny/seed0/checkpoints/last.ckpt"))):
        torch._dynamo.reset()
        # The schedule is that of two epochs in both.
        schedule = ("--trainer.max_epochs", epochs, "--model.optimizer.schedule", "constant")
        assert frcnn(*fit, *schedule, "--model.compile", "default", *options, cwd=tmp_path / "parts").code == 0
    (tmp_path / "constant").mkdir()
    torch._dynamo.reset()
    whole = (*fit, "--model.optimizer.schedule", "constant", "--model.compile", "default")
    assert frcnn(*whole, cwd=tmp_path / "constant").code == 0
    states = [
        read_checkpoint(tmp_path / name / "runs/tiny/seed0/checkpoints/last.ckpt")["state_dict"]
        for name in ("parts", "constant")
    ]
    assert [key for key, tensor in states[0].items() if not torch.equal(tensor, states[1][key])] == []

    checkpoint = runs["whole"] / "checkpoints" / "last.ckpt"
    assert FasterRCNNModule.from_checkpoint(checkpoint).compile_mode == "none"
    predict = ("predict", "--ckpt_path", checkpoint, "--images", next((mini_voc / "JPEGImages").iterdir()))
    assert frcnn(*predict, "--output", tmp_path / "out", cwd=tmp_path).code == 0


def test_without_a_compiler_nothing_is_left_behind(frcnn, tiny_config, tmp_path, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compilation, "_trivial", lambda x: x)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    compilation.check_compiler.cache_clear()
    result = frcnn("fit", "--config", tiny_config, "--model.compile", "default", cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "compile: nothing can be compiled" in result.err and "No working C++ compiler found" in result.err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_deterministic_leaves_nothing_behind(frcnn, tiny_config, tmp_path, monkeypatch) -> None:
    """The device is asked about the pooling once PyTorch has been told to be deterministic."""

    def refuse(pooling: str, device: torch.device) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise InputError(f"{pooling} on {device.type}")

    monkeypatch.setattr(lightning_cli, "check_deterministic", refuse)
    options = ("--trainer.deterministic", "true", "--model.roi.pooling", "roi_pool")
    try:
        result = frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (result.code, result.err) == (2, "frcnn: roi_pool on cpu\n")
    assert list(tmp_path.iterdir()) == []
