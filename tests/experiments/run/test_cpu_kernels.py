"""`--model.cpu_kernels` on the command line: what was chosen is said and kept with the run."""

import json

import pytest
import yaml

from detector.kernels import cpu_paths, processor
from detector.training import lightning_module


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What a training said, on a processor with AVX2 alone; the choice is undone after the test."""
    lines: list[str] = []
    monkeypatch.setattr(lightning_module, "rank_zero_info", lines.append)
    monkeypatch.setattr(cpu_paths, "_chosen", "auto")
    monkeypatch.setattr(processor, "_processor_flags", lambda: frozenset({"avx2"}))
    return lines


def test_a_run_says_and_keeps_which(frcnn, tiny_config, mini_voc, tmp_path, said) -> None:
    fit = ("fit", "--config", tiny_config, "--data.root", mini_voc, "--trainer.max_steps", 1)
    fit += ("--trainer.limit_val_batches", 1)
    lines = {"auto": "cpu_kernels auto: winograd, this processor's instructions are avx2", "plain": "cpu_kernels plain"}
    names = {"auto": "winograd", "plain": "plain"}
    for option, line in lines.items():
        chosen = () if option == "auto" else ("--model.cpu_kernels", option)
        assert frcnn(*fit, *chosen, "--run_name", option, cwd=tmp_path).code == 0
        assert said[-1] == line
        (folder,) = tmp_path.glob(f"runs/*/{option}")
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["cpu_kernels"] == option
        assert json.loads((folder / "metrics.json").read_text())["cpu_kernels"] == names[option]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    validate = ("validate", "--ckpt_path", checkpoint, "--data.root", mini_voc, "--model.cpu_kernels", "onednn")
    assert frcnn(*validate, "--trainer.limit_val_batches", 1, cwd=tmp_path).code == 0
    assert said[-1] == "cpu_kernels onednn"
    assert json.loads((folder / "metrics.json").read_text())["cpu_kernels"] == "plain"  # of the training


def test_a_name_that_there_is_not(frcnn, tiny_config, tmp_path) -> None:
    result = frcnn("fit", "--config", tiny_config, "--model.cpu_kernels", "fast", cwd=tmp_path)
    assert result.code == 2
    (line,) = result.err.strip().splitlines()
    assert "cpu_kernels" in line and "winograd" in line
    assert not list(tmp_path.glob("runs"))
