"""`frcnn fit --ckpt_path`: where the training goes on, whether there is anything left of it, and what else changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from pytorch_lightning.utilities import rank_zero_info

from detector.errors import InputError, value_text
from detector.files import load_yaml, read_metrics
from detector.training.checkpoint_content import newest_checkpoint
from detector.training.resuming import Changes, changed_options, changes_text
from experiments.run.folder import choose_run_folder, newest_run, repeated_run, run_folder_of

NOT_COMPARED = {
    *("trainer.logger", "trainer.callbacks", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.default_root_dir", "trainer.profiler", "trainer.plugins"),
}
"""Options that decide nothing of what is trained."""
WHERE = {"config", "runs_dir", "experiment", "run_name", "ckpt_path", "save_every_minutes", "resume_changed"}
GO_ON = NOT_COMPARED | {
    *(f"trainer.{name}" for name in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")),
    *(f"trainer.{name}" for name in ("accelerator", "log_every_n_steps", "num_sanity_val_steps", "benchmark")),
    *(f"data.{name}" for name in ("root", "image_dirs", "num_workers", "download", "annotation_cache")),
    *("data.cache_images", "data.image_cache_dir"),
}
"""Options that may differ without `resume_changed`: how long it goes on, and where and how fast it is computed."""
SAME_NUMBERS = GO_ON | {
    *(f"data.{name}" for name in ("batch_size", "eval_batch_size", "seed")),
    *(f"model.{name}" for name in ("compile", "cpu_kernels", "load_backbone_weights", "weights", "backbone.weights")),
}
"""Options that may differ in a validation without its being another one."""


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


def last_checkpoint(config: Namespace, begins: bool) -> tuple[Path | None, str | None]:
    """Return what `--ckpt_path last` means: the run that the options name, and its newest whole checkpoint.

    Args:
        config: The options.
        begins: Whether there need be none: a training then begins, in the run's folder where it is there.

    Raises:
        InputError: All are damaged, or there is none to evaluate.
    """
    runs_dir, seed = config.runs_dir or "runs", int(config.seed_everything)
    own = repeated_run(config.get("config") or [], config.run_name)
    run = own or newest_run(runs_dir, experiment_of(config), config.run_name, seed)
    newest = newest_checkpoint(run / "checkpoints") if run is not None else None
    if newest is None and not begins:
        raise InputError(f"--ckpt_path last: {run or runs_dir} holds no checkpoint; give the file of one")
    rank_zero_info(f"--ckpt_path last: {newest or 'there is none yet, so the training begins'}")
    return run, None if newest is None else str(newest)


def experiment_of(config: Namespace) -> str:
    """Return the name of a training's experiment: as given, or that of its first config file."""
    files = config.get("config") or []
    if config.experiment or not files:
        return str(config.experiment or "default")
    path = Path(str(files[0]))
    if path.name == "config.yaml":  # a run's own file: its name says nothing, its folder does
        saved = load_yaml(path.read_text(), path) if path.is_file() else {}
        return str(saved.get("experiment") or path.absolute().parents[1].name)
    return path.stem


def saved_options(run: Path, newest: bool = True) -> dict[str, Any]:
    """Return the options with which a run was started, or went on last; empty where they cannot be read."""
    resumed = sorted(run.glob("config_resumed_*.yaml"), key=lambda path: int(path.stem.rpartition("_")[2]))
    try:
        path = ((resumed if newest else []) or [run / "config.yaml"])[-1]
        content = load_yaml(path.read_text(), path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def other_options(run: Path, config: Namespace) -> Changes:
    """Return options of data and trainer, and the seed, that differ from those with which a run was trained last."""
    changes = changed_options(saved_options(run), _sections(config, "seed_everything", "data", "trainer"))
    return {key: value for key, value in changes.items() if key not in NOT_COMPARED}


def other_evaluation(run: Path, config: Namespace) -> dict[str, Any]:
    """Return options of data and model that make a validation another one than that of its run, with their values."""
    changes = changed_options(saved_options(run, newest=False), _sections(config, "data_format", "data", "model"))
    return {key: now for key, (_, now) in changes.items() if key not in SAME_NUMBERS}


def check_changes(checkpoint: object, changes: Changes) -> None:
    """Raise InputError for options that decide what is trained and are not as they were."""
    if stopping := {name: values for name, values in changes.items() if name not in GO_ON}:
        raise InputError(
            f"{checkpoint}: would go on with other options: {changes_text(stopping)}; give the checkpoint's, or "
            f"--resume_changed true to go on with these, or --model.weights {checkpoint} instead of --ckpt_path for a "
            "new training that begins with its weights"
        )


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
        return f"--trainer.max_steps {max_steps} is reached"
    if max_epochs not in (None, -1) and epochs >= max_epochs:
        return f"--trainer.max_epochs {max_epochs} is reached"
    return ""


def lacks_numbers(run_folder: Path, step: int | None) -> bool:
    """Return whether a run's final numbers are not those of its last step: it was killed before it wrote them."""
    metrics = read_metrics(run_folder / "metrics.json")
    return isinstance(metrics, str) or metrics.get("step") != step


def _sections(config: Namespace, *names: str) -> dict[str, Any]:
    """Return some of the options as a run's file would give them back."""
    found = {key: value for key, value in config.as_dict().items() if key in names}
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(found)))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
