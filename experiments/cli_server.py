"""The process that forks: it has imported everything once, and runs a command of `frcnn` in each child."""

import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

from datamodules.parallel import die_with
from experiments.run.startup import quick_imports


def _serve(connection: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Fork for every job; returns the job and its lock in the child, None in the parent when the runner is gone."""
    wake_up, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    while True:
        ready = select.select([connection, wake_up], [], [])[0]
        if wake_up in ready:
            wake_up.recv(4096)
            _report_ended(connection)
        if connection not in ready:
            continue
        data, locks, _, _ = socket.recv_fds(connection, 65536, 1)
        if not data:
            return None
        while not data.endswith(b"\n"):
            data += connection.recv(65536)
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setpgid(0, 0)
            die_with(me)
            for open_socket in (connection, wake_up, woken):
                open_socket.close()
            return json.loads(data), locks[0]
        os.close(locks[0])
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _report_ended(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        message = {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
        connection.sendall(json.dumps(message).encode() + b"\n")


def _run(job: dict[str, Any]) -> int | str | None:
    """The command, in the child; its exit code."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv = ["frcnn", *job["arguments"]]
    from experiments.cli import main

    try:
        return main(job["arguments"])
    except SystemExit as error:
        return error.code
    except BaseException:
        traceback.print_exc()
        return 1


def _main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with quick_imports():  # what is left out of collections stays shared between the forked processes, too
        import torch.utils.tensorboard  # noqa: F401

        import experiments.run.lightning_cli  # noqa: F401

    served = _serve(connection)
    if served is None:
        os._exit(0)  # at once: what it has started dies with it, and freeing torch's objects takes a second
    sys.exit(_run(served[0]))


if __name__ == "__main__":
    _main()
