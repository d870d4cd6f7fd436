"""Two processes that nobody of them started: what they agree on before and while they train."""

import socket
import subprocess

import pytest

from detector.errors import InputError
from experiments.run.ranks import of_first_process

CPU = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")

PROGRAM = """
import os, signal, sys, time
import pytorch_lightning as pl
from experiments.cli import main
from experiments.run import lightning_cli

rank = int(os.environ["RANK"])
before = lightning_cli.DetectorCLI._choose_run_folder

def choose(self, *arguments):
    if rank == int(os.environ["SLOW"]):
        time.sleep(2)  # the first process would otherwise be the only one that has looked
    before(self, *arguments)
    print(f"rank {rank} writes to {self.run_folder}", flush=True)

lightning_cli.DetectorCLI._choose_run_folder = choose

class PressKey(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if rank == 1 and trainer.global_step == int(os.environ["PRESS"]):
            signal.raise_signal(signal.SIGINT)

    def on_train_end(self, trainer, pl_module):
        print(f"rank {rank} ended at step {trainer.global_step}", flush=True)

callbacks = lightning_cli.DetectorCLI._callbacks
lightning_cli.DetectorCLI._callbacks = lambda self, config: [PressKey(), *callbacks(self, config)]
class Freed:
    def __del__(self):
        print(f"rank {rank}'s interpreter ended", flush=True)

freed = Freed()
freed.itself = freed
sys.exit(main())
"""


@pytest.fixture
def torchrun(process_group, tmp_path):
    """`torchrun(*arguments, press=step, slow=rank)`: the command in two processes on the CPU; its exit status and
    output."""

    def run(*arguments: object, press: int = -1, slow: int = -1) -> tuple[int, str]:
        (tmp_path / "program.py").write_text(PROGRAM)
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "program.py"]
        process = process_group(
            [*words, *arguments, *CPU], cwd=tmp_path, stderr=subprocess.STDOUT, PRESS=str(press), SLOW=str(slow)
        )
        output, _ = process.communicate(timeout=170)
        return process.returncode, output

    return run


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("batch_size", "ended"), [(2, 2), (6, 1)], ids=["three steps an epoch", "one"])
def test_ctrl_c_on_one_rank_ends_all_at_the_next_step(torchrun, tiny_config, tmp_path, batch_size, ended):
    options = ("fit", "--config", tiny_config, "--data.batch_size", batch_size, "--trainer.limit_val_batches", 0)
    code, log = torchrun(*options, "--trainer.max_epochs", 3, press=ended - 1)
    assert code == 1, log
    assert f"Interrupted at step {ended}. To go on: give ckpt_path" in log
    assert "ended at step" not in log
    assert "interpreter ended" not in log


@pytest.mark.timeout(180)
def test_the_first_process_chooses_the_run_folder(torchrun, tiny_config, tmp_path):
    """The other one, which comes later, takes it all the same; a name that is taken both refuse."""
    runs = tmp_path / "runs" / "tiny"
    (runs / "seed0" / "checkpoints").mkdir(parents=True)
    fit = ("fit", "--config", tiny_config, "--trainer.limit_val_batches", 0, "--trainer.limit_train_batches", 1)
    code, log = torchrun(*fit, slow=1)
    assert code == 0, log
    for rank in (0, 1):
        assert f"rank {rank} writes to runs/tiny/seed0-2\n" in log
    assert "interpreter ended" not in log  # in which gloo's threads abort the process now and then
    assert (runs / "seed0-2" / "checkpoints" / "last.ckpt").is_file()
    assert {path.name for path in runs.iterdir()} == {"seed0", "seed0-2"}
    code, log = torchrun(*fit, "--run_name", "seed0-2", slow=0)
    assert code != 0
    assert log.count("frcnn: runs/tiny/seed0-2: there is a run already; choose another --run_name") == 1, log
    assert "failed (exitcode: 2)" in log


MEETING = """
import os, sys, time
import torch.distributed as dist
from detector.errors import InputError
from experiments.run.ranks import of_first_process

rank, words = int(sys.argv[1]), sys.argv[2]
def choose():
    time.sleep(1)
    if words == "refuse":
        raise InputError("taken")
    return f"{words} {rank}"
try:
    print(of_first_process(choose, 2))
except InputError as error:
    print("refused:", error)
dist.init_process_group("gloo", rank=rank, world_size=2)
number = dist.torch.tensor([rank + 1])
dist.all_reduce(number)
print(number.item())
"""


def of_slurm(rank: int) -> dict[str, str]:
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    return {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "training"} | own


def on_a_machine(rank: int) -> dict[str, str]:
    return {"NODE_RANK": str(rank)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("started_by", "words", "heard"),
    [(of_slurm, "a folder", "a folder 0\n3\n"), (on_a_machine, "refuse", "refused: taken\n3\n")],
)
def test_processes_hear_of_the_first_and_then_meet_at_the_same_address(
    process_group, unused_port, started_by, words, heard
):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    ranks = [process_group(["-c", MEETING, rank, words], **where, **started_by(rank)) for rank in (1, 0)]
    assert [process.communicate(timeout=100)[0] for process in ranks] == [heard, heard]


def test_an_address_in_use_is_told_in_one_line(monkeypatch, unused_port):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port), "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as other:
        other.bind(("127.0.0.1", unused_port))
        other.listen()
        with pytest.raises(
            InputError, match=rf"^127.0.0.1:{unused_port}: the processes of this run do not meet"
        ) as error:
            of_first_process(lambda: "own", 2)
    assert "EADDRINUSE" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_one_process_asks_nobody(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert of_first_process(lambda: "own", 1) == "own"
    with pytest.raises(InputError, match=r"trainer\.num_nodes 2: give MASTER_ADDR, MASTER_PORT and NODE_RANK"):
        of_first_process(lambda: "own", 2)
