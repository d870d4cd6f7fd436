"""`frcnn fit --ckpt_path`: where the training goes on, whether there is anything left of it, and what else changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from detector.errors import value_text
from detector.training.resuming import Changes, changed_options
from experiments.run.folder import choose_run_folder, run_folder_of

NOT_COMPARED = {
    *("trainer.logger", "trainer.callbacks", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.default_root_dir", "trainer.profiler", "trainer.plugins"),
}
"""Options that decide nothing of what is trained."""
WHERE = {"config", "runs_dir", "experiment", "run_name", "ckpt_path"}


def folder_to_go_on_in(checkpoint: str, config: Namespace, numbered: bool = False) -> Path | None:
    """Return the run folder of a resumed training: its checkpoint's, or a new one where another name is asked for.

    A name is asked for by `run_name`, `experiment` or `runs_dir`; what is not given of the three is as in the old run,
    but for the run's name, which is then `seed<N>`. What the old run's own config file says asks for nothing.
    `numbered` is that of `choose_run_folder`.

    Returns:
        The folder; None where the checkpoint is in no run folder.

    Raises:
        InputError: The name is taken.
    """
    run = run_folder_of(checkpoint)
    if run is None:
        return None
    own, (runs_dir, experiment) = saved_options(run, newest=False), (run.parent.parent, run.parent.name)
    if config.runs_dir in (None, own.get("runs_dir")) or Path(config.runs_dir).absolute() == runs_dir:
        other_runs_dir = None
    else:
        other_runs_dir = config.runs_dir
    other_experiment = None if config.experiment in (None, own.get("experiment"), experiment) else config.experiment
    other_name = None if config.run_name in (None, own.get("run_name"), run.name) else config.run_name
    if (other_runs_dir, other_experiment, other_name) == (None, None, None):
        return run
    return choose_run_folder(
        other_runs_dir or str(runs_dir),
        other_experiment or experiment,
        other_name,
        int(config.seed_everything),
        numbered,
    )


def saved_options(run: Path, newest: bool = True) -> dict[str, Any]:
    """Return the options with which a run was started, or went on last; empty where they cannot be read."""
    resumed = sorted(run.glob("config_resumed_*.yaml"), key=lambda path: int(path.stem.rpartition("_")[2]))
    try:
        content = yaml.safe_load(((resumed if newest else []) or [run / "config.yaml"])[-1].read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def other_options(run: Path, config: Namespace) -> Changes:
    """Return options of data and trainer, and the seed, that differ from those with which a run was trained last."""
    now = {key: value for key, value in config.as_dict().items() if key in ("seed_everything", "data", "trainer")}
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(now)))
    return {key: value for key, value in changed_options(saved_options(run), plain).items() if key not in NOT_COMPARED}


def repeat_text(repeated: Path, config: Namespace) -> str:
    """Return what a log says of a run that repeats another one: which, and what differs."""
    changes = changed_options(saved_options(repeated, newest=False), _plain(config.as_dict()))
    shown = {name: values for name, values in changes.items() if name not in NOT_COMPARED | WHERE}
    with_ = "; ".join(f"{name} {value_text(new)}, there {value_text(old)}" for name, (old, new) in shown.items())
    return f"repeats {repeated}" + (f" with {with_}" if with_ else ", same options and seed")


def nothing_left(checkpoint: Mapping[str, Any], max_epochs: int | None, max_steps: int) -> str:
    """Return why a training has nothing left to do from a checkpoint on, in Lightning's sense; empty where it has."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if max_steps != -1 and checkpoint["global_step"] >= max_steps:
        return f"its {checkpoint['global_step']} steps are all of --trainer.max_steps {max_steps}"
    if max_epochs not in (None, -1) and epochs >= max_epochs:
        return f"its {epochs} epochs are all of --trainer.max_epochs {max_epochs}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
