"""Where a run lives: `runs/<experiment>/<run name>/`, found again from a checkpoint inside it."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from detector.errors import InputError, value_text

ENVIRONMENT_VARIABLE = "FRCNN_RUN_DIR"
"""Tells the other processes of a multi-device run, which repeat the command, the folder that the first one chose."""
AXES_VARIABLE = "FRCNN_AXES"
"""Tells a run its place in a grid: JSON, axis -> value."""
LAST = "last"
"""As `--ckpt_path`: the newest whole checkpoint of the run that the other options name."""


def run_folder_of(checkpoint: str | Path) -> Path | None:
    """Return the run folder of a checkpoint at `<run folder>/checkpoints/X.ckpt`, or None."""
    path = Path(checkpoint).absolute()
    return (
        path.parents[1] if path.parent.name == "checkpoints" and (path.parents[1] / "config.yaml").is_file() else None
    )


def folder_of_evaluation(run_folder: Path, options: Mapping[str, object], classes: Sequence[str]) -> Path:
    """Return where a run keeps an evaluation, in letters that all systems take: its own folder for its own options.

    Args:
        run_folder: Of the run.
        options: Those that are others than the run's: then it is `evaluations/<options>`.
        classes: Those that are evaluated alone: then it is `classes/<names>` there.
    """
    folder = run_folder
    if options:
        text = ",".join(f"{name.partition('.')[2] or name}={value_text(value)}" for name, value in options.items())
        name = re.sub(r"[^\w.,=-]+", "_", text)
        if name != text or len(name) > 100:  # others may look alike
            name = f"{name[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = folder / "evaluations" / name
    return folder / "classes" / re.sub(r"[^\w-]+", "_", "-".join(classes))[:100] if classes else folder


@contextlib.contextmanager
def gone_if_refused(folder: Path) -> Iterator[None]:
    """Remove the event files that Lightning begins, if an error leaves nothing else; with them a folder that is new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    before = set() if new else set(folder.iterdir())
    try:
        yield
    except BaseException:
        added = set(folder.iterdir()) - before if folder.is_dir() else set()
        if all(re.search(rf"tfevents.*\.{os.getpid()}\.", path.name) for path in added):  # not of others beside it
            for path in added:
                path.unlink()
            with contextlib.suppress(OSError):  # something else has come
                for parent in new:
                    parent.rmdir()
        raise


def repeated_run(files: Sequence[object], run_name: str | None) -> Path | None:
    """Return the run that a new one repeats: that whose own `config.yaml` is the last of its config files.

    Args:
        files: The config files.
        run_name: As they say; where the run's folder has another name, there is no repeat.
    """
    file = Path(str(files[-1])) if files else Path()
    if not is_of_run(file):
        return None
    name = r"seed\d+" if run_name is None else re.escape(run_name)
    return file.parent if re.fullmatch(rf"{name}(-\d+)?", file.absolute().parent.name) else None


def is_of_run(file: Path) -> bool:
    """Return whether a config file has the name of those that runs write."""
    return re.fullmatch(r"config(_resumed_\d+)?\.yaml", file.name) is not None


def choose_run_folder(runs_dir: str, experiment: str, run_name: str | None, seed: int, numbered: bool = False) -> Path:
    """Return the folder of a new run: the given name, which must be free, or `seed<N>`, numbered where that is taken.

    Args:
        runs_dir: Folder of all runs.
        experiment: Folder in it.
        run_name: As given.
        seed: For the name where none is given.
        numbered: Whether a given name is numbered, too.

    Raises:
        InputError: `run_name` is taken, so that no run is overwritten.
    """
    if ENVIRONMENT_VARIABLE in os.environ:
        return Path(os.environ[ENVIRONMENT_VARIABLE])
    parent = Path(runs_dir) / experiment
    name = f"seed{seed}" if run_name is None else run_name
    folder = parent / name
    if run_name is not None and not numbered and _taken(folder):
        raise InputError(
            f"{folder}: there is a run already; choose another --run_name, or go on with it by "
            f"--ckpt_path {folder}/checkpoints/last.ckpt"
        )
    names = (f"{name}-{n}" if n > 1 else name for n in range(1, 1_000_000))
    return next(parent / name for name in names if not _taken(parent / name))


def newest_run(runs_dir: str, experiment: str, run_name: str | None, seed: int) -> Path | None:
    """Return the folder that `choose_run_folder` has chosen last for the same arguments; None where it has not yet."""
    if ENVIRONMENT_VARIABLE in os.environ:
        return Path(os.environ[ENVIRONMENT_VARIABLE])
    parent = Path(runs_dir) / experiment
    first = parent / (f"seed{seed}" if run_name is None else run_name)
    others = [] if run_name else [path for path in parent.glob(f"seed{seed}-*") if path.name.split("-")[1].isdigit()]
    folders = [first, *sorted(others, key=lambda path: int(path.name.split("-")[1]))]
    return next((folder for folder in reversed(folders) if _taken(folder)), None)


def _taken(folder: Path) -> bool:
    # What `frcnn ablate` keeps of a cell is there before its run.
    return folder.is_dir() and any(not path.name.startswith("cell.") for path in folder.iterdir())
