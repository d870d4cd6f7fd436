import subprocess
import sys

import pytest
import torch

from experiments.run import lightning_cli
from experiments.run.host_memory import keep_freed_memory

SCRIPT = """
import resource, torch
from experiments.run.host_memory import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(2**n) for n in (22, 22, 22, 21, 20)]  # 16 to 4 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages()
print(pages(), keep_freed_memory(torch.device("cpu")), *(pages() for _ in range(12)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
def test_blocks_are_found_again():
    before, kept, *rounds = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(before) >= 15 * 2**20 * 4 / 2**16  # all 60 MB, in pages of 4 to 64 kB
    assert kept == "True"
    assert sum(map(int, rounds[6:])) < int(before) / 2  # it takes some rounds until all have their place


def test_gpus_need_none_of_it():
    assert not keep_freed_memory(torch.device("cuda"))


def test_systems_without_it(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory(torch.device("cpu"))


def test_trainings_on_cpus_keep_it(tiny_config, frcnn, tmp_path, monkeypatch):
    devices = []
    monkeypatch.setattr(lightning_cli, "keep_freed_memory", devices.append)
    result = frcnn("fit", "--config", tiny_config, "--trainer.fast_dev_run", "true", cwd=tmp_path)
    assert result.code == 0
    assert devices == [torch.device("cpu")]
