"""What is to be known of an exported detector, as JSON and as a model card, and the reader beside it."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from detector.errors import InputError, shown_options, value_text
from detector.metrics.bootstrap import interval
from detector.training.callbacks.run_files import git_commit
from detector.training.lightning_module import FasterRCNNModule
from detector.use.exported import RUNTIMES
from experiments.export.options import FILES
from experiments.output import templates
from experiments.results.runs import Run, read_run
from experiments.results.scored_runs import Scorer
from experiments.run.folder import run_folder_of

RESAMPLES = 1000
_DATA = ("train_splits", "val_splits", "test_splits", "val_fraction", "split_seed", "bit_depth")
_RECIPE = ("training_scheme", "difficult", "weights", "backbone", "anchors", "optimizer")
_PAGES = templates(Path(__file__).parent)


def about_detector(module: FasterRCNNModule, checkpoint: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what whoever runs an exported detector needs to know, and all its options."""
    image, folder = module.model.image_config, run_folder_of(checkpoint)
    names = ("longest_side", "pad_multiple", "channel_order", "pixel_max", "mean", "std")
    return {
        "name": checkpoint.stem if folder is None else f"{folder.parent.name} {folder.name}",
        "class_names": module.class_names,
        "image": {"shortest_side": image.shortest_side[-1], **{name: getattr(image, name) for name in names}},
        "bit_depth": module.bit_depth,
        "step": content.get("global_step"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "options": {key: value for key, value in module.hparams.items() if key != "class_names"},
    }


def reader(package: str, file: str) -> str:
    """Return a program that detects with an exported file, for the package that runs it."""
    return _PAGES.get_template("detect.py.j2").render(package=package, file=file)


def run_of(checkpoint: Path) -> Run | None:
    """Return the run of a checkpoint, which may have been interrupted; None if it is in no run folder.

    Raises:
        InputError: Its config is damaged.
    """
    folder = run_folder_of(checkpoint)
    return None if folder is None else read_run(folder, finished=False)


def card(format: str, about: Mapping[str, Any], run: Run | None, checked: str, license: str) -> str:
    """Return the model card; what the run does not tell is said to be unknown.

    Args:
        format: Of the exported file.
        about: As `about_detector` gives it.
        run: Of the detector.
        checked: How the file compares with it.
        license: Of the weights.
    """
    config = {} if run is None else shown_options(run.config)
    data = {key: value_text(config[f"data.{key}"]) for key in _DATA if config.get(f"data.{key}") is not None}
    data_format = config.get("data_format") or "voc"
    if config.get("data.root"):
        data = {"folder": Path(str(config["data.root"])).name, "format": data_format, **data}
    recipe: dict[str, Any] = {
        key: value_text(config[key]) for key in ("seed_everything", "trainer.max_epochs") if key in config
    }
    given = {key: config.get(f"data.{key}") for key in ("batch_size", "augmentation")}
    recipe |= {key: value_text(value) for key, value in given.items() if value is not None}
    recipe |= shown_options({key: about["options"].get(key) for key in _RECIPE})
    metrics, intervals, note = _metrics(run, about)
    origin = {
        "weights of step": about["step"],
        "commit of the training": (run and run.metrics.get("git_commit")) or "not known",
        "commit of the export": about["git_commit"] or "not known",
        "versions": ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        "licence of the code": "MIT",
        "licence of the weights": license or "not stated; ask who trained them",
        "licence of the data": "that of the images it was trained on, which may restrict the use of the weights",
    }
    return _PAGES.get_template("card.md.j2").render(
        format=format,
        file=FILES[format],
        packages=RUNTIMES,
        about=about,
        checked=checked,
        data=data,
        recipe={key: value_text(value) for key, value in recipe.items()},
        metrics=metrics,
        intervals=intervals,
        metrics_note=note,
        origin=origin,
    )


def _metrics(run: Run | None, about: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str], str]:
    """Return the metrics of a run, their intervals over its images where these can be had, and a note on both."""
    if run is None:
        return {}, {}, "the checkpoint is in no run folder."
    part = "test" if any(name.startswith("test/") for name in run.metrics) else "val"
    found = {
        name: float(value)
        for name, value in run.metrics.items()
        if name.startswith((f"{part}/A", f"{part}/proposal_recall")) and isinstance(value, int | float)
    }
    if not found:
        return {}, {}, "the run was not evaluated."
    if run.metrics.get("step") != about["step"]:
        return {}, {}, f"metrics.json is of step {run.metrics.get('step')}, these weights are of step {about['step']}."
    try:
        scored = Scorer(part, RESAMPLES).score(run)
    except InputError as error:
        return found, {}, f"Without intervals: {error}"
    intervals = {f"{part}/{name}": interval(samples) for name, samples in scored.samples.items()}
    texts = {name: f"{one.low:.4f} .. {one.high:.4f}" for name, one in intervals.items() if name in found}
    return found, texts, f"Intervals: {RESAMPLES} resamples of the {len(scored.truth.image_names)} images."
