"""`frcnn tensorboard`: the server of TensorBoard, as runs of this project need it."""

import contextlib
import io
import threading
from pathlib import Path

from detector.errors import InputError, brief
from detector.training.event_files import quick_checksums
from experiments.board.options import TensorBoardOptions


def tensorboard(options: TensorBoardOptions) -> None:
    """Start the server, print its address, and serve until Ctrl-C."""
    if not Path(options.runs).is_dir():
        raise InputError(f"{options.runs}: there is no such folder; frcnn fit writes runs/<experiment>/<run name>/")
    from tensorboard import program  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import backend_context  # type: ignore[import-untyped]

    # Older runs have experiment tags, of which HPARAMS would take its columns from one and hide all others.
    backend_context.Context._find_experiment_tag = lambda *_: None
    quick_checksums()  # where there is no data server for the platform, which reads without Python
    server = program.TensorBoard()
    flags = {"logdir": options.runs, "samples_per_plugin": "images=200", "host": options.host}
    if options.port is not None:
        flags["port"] = str(options.port)
    server.configure(["frcnn", *(f"--{name}={value}" for name, value in flags.items())])
    said = io.StringIO()  # advice about its own options, and why it exits
    try:
        with contextlib.redirect_stderr(said):
            address = server.launch()
    except (program.TensorBoardServerException, SystemExit) as error:
        reason = said.getvalue().splitlines()[-1] if isinstance(error, SystemExit) else brief(error)
        raise InputError(f"--host {options.host} --port {options.port or 6006}: {reason}") from error
    runs = len({path.parent for path in Path(options.runs).rglob("events.out.tfevents.*")})
    print(f"{address}  (runs in {options.runs}: {runs}; Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
