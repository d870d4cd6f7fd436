"""The processes of commands: exit codes, output, environment, and what ends them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from experiments.ablation.processes import Job, exit_code, prepare, send, start

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., BaseProcess]


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    """`run(script, *arguments, **environment)`: start it, with its output in `tmp_path / "log"`."""
    started: list[BaseProcess] = []

    def begin(script: str, *arguments: str, **environment: str) -> BaseProcess:
        program = tmp_path / "program.py"
        program.write_text(script)
        prepare({}, str(program))
        lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
        started.append(start(Job(arguments, str(tmp_path / "log"), str(tmp_path), environment, str(program)), lock))
        os.close(lock)
        return started[-1]

    yield begin
    for process in started:
        send(process, signal.SIGKILL)
        process.join()


def end(process: BaseProcess) -> int | None:
    process.join()
    return exit_code(process)


@pytest.mark.parametrize(
    ("script", "code", "output"),
    [
        ("print('fine')", 0, "fine\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("import sys; print(sys.argv[1:])", 0, "['a', '--b=c d']\n"),
        ("import os; print(os.getcwd() == os.path.dirname(__file__), os.environ['SLOT'])", 0, "True x\n"),
        ("import os; print('FRCNN_RUN_DIR' in os.environ, os.getpgrp() == os.getpid())", 0, "False True\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'closed'); print('end')", 0, "end\nclosed\n"),
        ("import os, subprocess; subprocess.run(['echo', 'child'])", 0, "child\n"),
    ],
)
def test_a_command_is_as_if_started_by_itself(run, tmp_path, monkeypatch, script, code, output):
    monkeypatch.setenv("FRCNN_RUN_DIR", "of another run")
    assert end(run(script, "a", "--b=c d", SLOT="x")) == code
    assert (tmp_path / "log").read_text() == output


def test_threads_are_the_commands_own_whatever_the_process_that_forks_has(tmp_path):
    """In a process of its own: the one that forks has imported torch before, for five threads."""
    (tmp_path / "program.py").write_text("import torch; print(torch.get_num_threads())")
    (tmp_path / "older.py").write_text(
        "import multiprocessing, os, sys\n"
        "from multiprocessing import forkserver\n"
        "from experiments.ablation.processes import Job, prepare, start\n"
        "if __name__ == '__main__':\n"
        "    folder = sys.argv[1]\n"
        "    os.environ['OMP_NUM_THREADS'] = '5'\n"
        "    multiprocessing.set_forkserver_preload(['torch'])\n"
        "    forkserver.ensure_running()\n"
        "    for number in '1', '3':\n"
        "        environment, program = {'OMP_NUM_THREADS': number}, folder + '/program.py'\n"
        "        prepare(environment, program)\n"
        "        lock = os.open(folder + '/lock', os.O_RDWR | os.O_CREAT)\n"
        "        start(Job((), folder + '/log', folder, environment, program), lock).join()\n"
    )
    subprocess.run(
        [sys.executable, tmp_path / "older.py", tmp_path], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (tmp_path / "log").read_text() == "1\n3\n"


def test_lightning_starts_the_other_devices_by_the_same_command(run, tmp_path):
    script = (
        "from lightning_fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd\n"
        "print(_basic_subprocess_cmd())"
    )
    assert end(run(script, "fit", "--x=1")) == 0
    wanted = [sys.executable, str(tmp_path / "program.py"), "fit", "--x=1"]
    assert (tmp_path / "log").read_text() == f"{wanted}\n"


def test_what_a_command_leaves_behind_ends_with_it(run, tmp_path, wait_for):
    script = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    assert end(run(script)) == 0
    child = int((tmp_path / "log").read_text())
    wait_for(lambda: not runs(child))


ASKS_CUDA = """
import torch
asked = []
for module, name in ((torch._C, "_cuda_getDeviceCount"), (torch._C, "_cuda_init"), (torch.cuda, "_lazy_init")):
    setattr(module, name, lambda *_, name=name: asked.append(name))
torch.cuda.is_available = torch.cuda.device_count = lambda: asked.append("devices") or 0
import experiments.ablation.preload
assert asked == [], asked
"""


def test_the_process_that_forks_asks_nothing_of_cuda():
    """CUDA works in no process that is forked from one that has."""
    subprocess.run([sys.executable, "-c", ASKS_CUDA], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_death_of_the_process_that_forks(run, tmp_path, wait_for):
    """Its commands count as killed, and end; the next one has a new one."""
    process = run("import time; print('begun'); time.sleep(600)")
    wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text() == "begun\n")
    os.kill(parent(process.pid or 0), signal.SIGKILL)
    assert end(process) == -signal.SIGKILL
    wait_for(lambda: not runs(process.pid or 0))
    assert end(run("print('again')")) == 0


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def runs(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


FROM_A_FOLDER = """
import os
from experiments.ablation.processes import Job, exit_code, prepare, start
prepare({})
lock = os.open("lock", os.O_RDWR | os.O_CREAT)
process = start(Job(("mini-voc", "out", "--images", "5"), os.path.abspath("log"), os.getcwd(), {}), lock)
process.join()
print(exit_code(process))
"""


def test_a_command_is_not_hidden_by_what_lies_in_the_folder(tmp_path):
    for name in ("detector.py", "datamodules.py", "argparse.py", "selectors.py"):
        (tmp_path / name).write_text("raise SystemExit('hidden')\n")
    runner = [sys.executable, "-P", "-c", FROM_A_FOLDER]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(runner, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout == "0\n", (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "JPEGImages").is_dir()
