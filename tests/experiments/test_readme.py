"""The commands of the README, as they stand there: every one is parsed by what would run it."""

import argparse
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed.run import get_args_parser

from experiments import cli

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(text for language, text in blocks if not language).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"(frcnn|torchrun|srun) ", line)]
    assert len(words) > 20
    return words


def frcnn_of(words: list[str]) -> list[str]:
    """The arguments of frcnn, by whatever it is started."""
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        assert (parsed.module, parsed.training_script) == (True, "experiments.cli")
        return list(parsed.training_script_args)
    return words[words.index("frcnn") + 1 :]


@pytest.fixture
def parsed(monkeypatch, tmp_path, tiny_config) -> Any:
    """`parsed(arguments)`: the name of the function that a command would call, and what it would be given.

    All files that the README names are there.
    """
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for folder in ("data/VOCdevkit", "data/shapes/JPEGImages", "FOLDER", "RESULTS"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("CONFIG.yaml", "shapes.yaml", "GRID.yaml", "data/vgg16_caffe.pth"):
        (tmp_path / name).symlink_to(tiny_config)
    for run in ("shapes/seed0", "anchors_mini_voc/A", "anchors_mini_voc/B"):
        (tmp_path / "runs" / run / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "checkpoints/best.ckpt"):
            (tmp_path / "runs" / run / name).symlink_to(tiny_config)
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, Any]] = []
    load = cli._load

    def stand_in(place: str) -> Any:
        rows = [row for row in cli.COMMANDS if place in (row.function, row.check)]
        return (lambda *given: calls.append((place, given))) if rows else load(place)

    monkeypatch.setattr(cli, "_load", stand_in)

    def parse(arguments: list[str]) -> tuple[str, Any]:
        assert cli.main(arguments) == 0
        return calls[-1]

    return parse


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_it_is_parsed(words, parsed):
    function, _ = parsed(
        [word.replace("LAST.ckpt", "runs/shapes/seed0/checkpoints/best.ckpt") for word in frcnn_of(words)]
    )
    (row,) = {row.function for row in cli.COMMANDS if row.name.split()[0] == frcnn_of(words)[0] and row.function}
    assert function == row


def test_trainings_on_two_machines_ask_for_the_processes_that_are_started(monkeypatch):
    """Two machines of eight devices each, in both ways."""
    found = {}
    for words in commands():
        if words[0] == "torchrun":
            parsed = get_args_parser().parse_args(words[1:])
            found["torchrun"] = (int(parsed.nnodes), int(parsed.nproc_per_node))
            assert (parsed.master_addr, parsed.master_port, parsed.node_rank) == ("HOST", 29500, 0)
        elif words[0] == "srun":
            parser = argparse.ArgumentParser()
            for name in ("nodes", "ntasks-per-node", "gpus-per-node"):
                parser.add_argument(f"--{name}", type=int, required=True)
            parsed = parser.parse_args(words[1 : words.index("frcnn")])
            found["srun"] = (parsed.nodes, parsed.ntasks_per_node)
            assert parsed.gpus_per_node == parsed.ntasks_per_node
            monkeypatch.setenv("SLURM_NNODES", str(parsed.nodes))
            monkeypatch.setenv("SLURM_NTASKS_PER_NODE", str(parsed.ntasks_per_node))
        else:
            continue
        options = dict(pairwise(words))
        asked = int(options["--trainer.num_nodes"]), int(options["--trainer.devices"])
        assert asked == found[words[0]] == (2, 8)
    SLURMEnvironment().validate_settings(num_devices=8, num_nodes=2)
    assert found.keys() == {"torchrun", "srun"}
