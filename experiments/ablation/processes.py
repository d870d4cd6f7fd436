"""The processes that run the commands of cells, forked by one that has imported everything once: multiprocessing's.

Each is in its own process group, so that Ctrl-C reaches it through the runner only; writes into the cell's log; is
killed when its runner is gone; and holds the cell's lock as long as it lives.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from datamodules.parallel import end_with_parent

SOURCE = Path(__file__).resolve().parents[2]
PROGRAM = str(SOURCE / "experiments" / "cli.py")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_INHERITED = {
    "FRCNN_RUN_DIR",
    "FRCNN_AXES",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "SLURM_NTASKS",  # for Lightning, a sign that SLURM starts one process per device
}


@dataclass(frozen=True)
class Job:
    """One command: the arguments of a Python script, whose output is added to a log, and its own variables."""

    arguments: tuple[str, ...]
    log: str
    cwd: str
    environment: Mapping[str, str]
    program: str = PROGRAM

    def variables(self) -> dict[str, str]:
        """Return the whole environment, without what belongs to another run."""
        kept = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        return kept | source_variables() | dict(self.environment)


def source_variables() -> dict[str, str]:
    """Return the variables with which another Python finds this package wherever it starts.

    Without the safe path, Python would put the working directory, which may hold modules of any name, before ours.
    """
    path = dict.fromkeys([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def prepare(environment: Mapping[str, str], program: str = PROGRAM) -> None:
    """Begin to import what trainings need, in the process that forks; do nothing where it runs already.

    OMP_NUM_THREADS is read when libraries are loaded, so this process takes over that of the commands. Another program
    than `frcnn` needs no imports.
    """
    multiprocessing.set_forkserver_preload(["experiments.ablation.preload"] if program == PROGRAM else [])
    os.environ.update(source_variables())
    if "OMP_NUM_THREADS" in environment:
        os.environ["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
    with _signals_blocked():
        forkserver.ensure_running()


def start(job: Job, lock: int) -> BaseProcess:
    """Start a command that holds the file descriptor `lock` until it ends."""
    context, variables = multiprocessing.get_context("forkserver"), job.variables()
    with Connection(os.dup(lock)) as held, _signals_blocked():  # multiprocessing passes a connection on as it is open
        for tries_left in (2, 1, 0):
            process = context.Process(target=_run, args=(job, variables, held))
            try:
                process.start()
                break
            except (ConnectionError, EOFError):  # the process that forks is being killed; the next one may live longer
                if not tries_left:
                    raise
                time.sleep(0.2)
    return process


def exit_code(process: BaseProcess) -> int | None:
    """Return the exit code of a command, negative for a signal; None while it runs."""
    code = process.exitcode
    if code is not None:
        send(process, signal.SIGKILL)  # workers, and processes of other devices, that it left behind
    # Multiprocessing's code where the process that forks was killed: most likely for want of memory.
    return -signal.SIGKILL if code == 255 else code


def send(process: BaseProcess, number: int) -> None:
    """Send a signal to a command; SIGKILL goes to everything that it has started, too."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep the runner's signals from the process that forks, which inherits what is blocked."""
    resource_tracker.ensure_running()  # or it would be started within, and unblock them
    before = signal.pthread_sigmask(signal.SIG_SETMASK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(job: Job, variables: Mapping[str, str], lock: Connection) -> None:
    """Be the command, in the new process, whose exit status multiprocessing then reports."""
    os.setpgid(0, 0)
    end_with_parent()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the runner was started with
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(job.cwd)
    # The process that forks may be older than this grid, and have imported torch for another number.
    threads = variables.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules and threads.isdigit():
        sys.modules["torch"].set_num_threads(int(threads))
    sys.argv[1:] = job.arguments
    try:
        runpy.run_path(job.program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
