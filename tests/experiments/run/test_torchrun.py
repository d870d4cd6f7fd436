"""Two processes that torchrun starts: what they agree on before and while they train."""

import subprocess

import pytest

CPU = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")

PROGRAM = """
import os, signal, sys, time
import pytorch_lightning as pl
from experiments.cli import main
from experiments.run import lightning_cli

rank = int(os.environ["RANK"])

class PressKey(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if rank == 1 and trainer.global_step == int(os.environ["PRESS"]):
            signal.raise_signal(signal.SIGINT)

    def on_train_end(self, trainer, pl_module):
        print(f"rank {rank} ended at step {trainer.global_step}", flush=True)

callbacks = lightning_cli.DetectorCLI._callbacks
lightning_cli.DetectorCLI._callbacks = lambda self, config: [PressKey(), *callbacks(self, config)]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def torchrun(process_group, tmp_path):
    """`torchrun(*arguments, press=step)`: the command in two processes on the CPU; its exit status and output."""

    def run(*arguments: object, press: int = -1) -> tuple[int, str]:
        (tmp_path / "program.py").write_text(PROGRAM)
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "program.py"]
        process = process_group([*words, *arguments, *CPU], cwd=tmp_path, stderr=subprocess.STDOUT, PRESS=str(press))
        output, _ = process.communicate(timeout=170)
        return process.returncode, output

    return run


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("batch_size", "ended"), [(2, 2), (6, 1)], ids=["three steps an epoch", "one"])
def test_ctrl_c_on_one_rank_ends_all_at_the_next_step(torchrun, tiny_config, tmp_path, batch_size, ended):
    options = ("fit", "--config", tiny_config, "--data.batch_size", batch_size, "--trainer.limit_val_batches", 0)
    code, log = torchrun(*options, "--trainer.max_epochs", 3, press=ended - 1)
    assert code == 1, log
    assert f"Interrupted at step {ended}. To go on: give ckpt_path" in log
    assert "ended at step" not in log
