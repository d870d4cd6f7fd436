"""What the pages of a real TensorBoard are made of, as `frcnn tensorboard` serves it, read through its HTTP interface.

One folder holds runs of every kind: two runs of their own, cells of two different grids, a running run, a killed one, a
failed one, one that failed and went on, and one as an older version wrote it.
"""

import json
import shutil
import signal
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LambdaCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from detector.errors import TrainingError
from detector.training.callbacks.scalar_pages import PAGES
from detector.training.loggers import RunTensorBoard
from experiments.run.lightning_cli import DetectorCLI

GRIDS = {
    "grid_a/one": {"scales": "1", "ratios": "1", "seed": 0},
    "grid_a/two": {"scales": "1-2", "ratios": "0.5", "seed": 1},
    "grid_b/one": {"weights": "none", "seed": 0},
    "grid_b/two": {"weights": "imagenet", "seed": 0},
}
LONE = {"tiny/seed0", "lone/other", "lone/failed", "lone/went_on"}
ROWS = {*GRIDS, *LONE, "grid_b/running", "grid_b/killed", "older/run"}
CLOCK = "clock/ahead"
SUCCESS, FAILURE, UNKNOWN = "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_UNKNOWN"


@pytest.fixture(scope="module")
def runs(trained, tiny_config, frcnn, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("mixed")
    folder = cwd / "runs"
    shutil.copytree(trained, folder / "tiny" / "seed0")
    assert frcnn("test", "--ckpt_path", folder / "tiny/seed0/checkpoints/last.ckpt", cwd=cwd).code == 0

    def fit(name: str, *options: object, axes: Any = None, at_step: int = -1, do: Any = None) -> None:
        """Train; `do` is called with the run's folder in the middle of the training."""

        def begin(trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == at_step:
                do(folder / name)

        experiment, run = name.split("/")
        own, original = LambdaCallback(on_train_batch_start=begin), DetectorCLI._callbacks
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DetectorCLI, "_callbacks", lambda self, config: [*original(self, config), own])
            patch.setenv("FRCNN_AXES", json.dumps(axes or {}))
            place = ("--experiment", experiment, "--run_name", run)
            result = frcnn("fit", "--config", tiny_config, *place, *options, cwd=cwd)
        assert result.code == (1 if do is fail else 0), result.err

    def fail(run: Path) -> None:
        raise TrainingError("as a loss that is not finite")

    def copy(run: Path) -> None:
        """Keep what is on disk of a run that goes on or was killed."""
        for name in ("running", "killed"):
            shutil.copytree(run, folder / "grid_b" / name)

    for name, axes in GRIDS.items():
        fit(name, axes=axes)
    fit("copied/run", axes={"weights": "coco", "seed": 3}, at_step=3, do=copy)
    shutil.rmtree(folder / "copied")
    fit("lone/other", "--model.optimizer.lr", 0.001, "--model.optimizer.bias_lr_factor", 2)
    for name in ("lone/failed", "lone/went_on"):
        fit(name, "--trainer.max_epochs", 2, at_step=9, do=fail)
    assert frcnn("fit", "--ckpt_path", folder / "lone/went_on/checkpoints/last.ckpt", cwd=cwd).code == 0
    with SummaryWriter(str(folder / "older" / "run")) as writer:  # as PyTorch writes it, with an experiment tag
        writer.add_hparams({"lr": 0.1, "flag": True}, {"val/AP": 0.25}, run_name=".")
    for session, now in enumerate((1.8e9, 1.7e9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.time", lambda now=now: now)
            logger = RunTensorBoard(str(folder), *CLOCK.split("/"))
            for step in range(2 * session, 2 * session + 4):
                logger.log_metrics({"val/AP": session}, step)
            logger.experiment.close()
    return folder


@pytest.fixture(scope="module")
def get(runs, frcnn_process) -> Iterator[Callable[..., Any]]:
    """`get(path, body=None)`: what the server answers; JSON is parsed."""
    process = frcnn_process("tensorboard", runs, "--port", 0, cwd=runs.parent)
    try:
        line = process.stdout.readline()
        assert line.endswith(f"/  (runs in {runs}: {len(ROWS) + 1}; Ctrl-C ends)\n"), process.communicate()
        address = line.split("  ")[0]

        def ask(path: str, body: Any = None, **arguments: Any) -> Any:
            query = f"?{urllib.parse.urlencode(arguments)}" if arguments else ""
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"{address}data/{path}{query}", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                content = answer.read()
            return json.loads(content) if "json" in answer.headers["Content-Type"] else content

        yield ask
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def loaded(get, wait_for) -> None:
    """The server has read all runs to their ends."""
    last = (
        ("tiny/seed0", "AP_and_recall/test_AP"),
        ("lone/went_on", "weights/epoch"),
        ("older/run", "val/AP"),
        (CLOCK, "val/AP"),
    )

    def all_there() -> bool:
        tags = get("plugin/scalars/tags")
        return set(get("runs")) == {*ROWS, CLOCK} and all(tag in tags.get(run, {}) for run, tag in last)

    wait_for(all_there)


@pytest.fixture(scope="module")
def experiment(get, loaded) -> Any:
    return get("plugin/hparams/experiment", {"experimentName": ""})


@pytest.fixture(scope="module")
def rows(get, experiment) -> dict[str, Any]:
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    asked = {"allowedStatuses": [SUCCESS, FAILURE, UNKNOWN, "STATUS_RUNNING"], "colParams": columns}
    answer = get("plugin/hparams/session_groups", asked | {"startIndex": 0, "sliceSize": 100})
    return {group["name"]: group for group in answer["sessionGroups"]}


def metrics_of_row(row: dict[str, Any]) -> dict[str, float]:
    return {one["name"]["tag"]: one["value"] for one in row.get("metricValues", [])}


def test_every_axis_is_a_column_and_what_differs_comes_first(experiment) -> None:
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert names[:3] == ["Axis/ratios", "Axis/scales", "Axis/weights"]
    assert names[3:6] == ["model/optimizer/bias_lr_factor", "model/optimizer/lr", "seed"]
    assert "model/anchors/scales" in names
    kinds = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    assert kinds["model/optimizer/lr"] == kinds["seed"] == "DATA_TYPE_FLOAT64"
    assert kinds["Axis/scales"] == kinds["model/anchors/scales"] == "DATA_TYPE_STRING"


def test_main_metrics_are_the_first_columns(experiment) -> None:
    tags = [info["name"]["tag"] for info in experiment["metricInfos"]]
    of_stage = ("AP", "AP50_voc07", "proposal_recall@30")
    assert tags[:6] == [f"AP_and_recall/{stage}_{name}" for stage in ("test", "val") for name in of_stage]
    assert not [info for info in experiment["metricInfos"] if info["name"].get("group")]


def test_every_run_is_a_row_with_its_state(rows) -> None:
    status = {name: [session["status"] for session in row["sessions"]] for name, row in rows.items()}
    other = {"lone/failed": [FAILURE], "grid_b/running": [UNKNOWN], "grid_b/killed": [UNKNOWN]}
    assert status == {name: [SUCCESS] for name in ROWS} | other


def test_a_row_of_a_grid_has_its_axes_and_any_other_all_options(rows, experiment) -> None:
    for name, axes in GRIDS.items():
        expected = {key if key == "seed" else f"Axis/{key}": value for key, value in axes.items()}
        assert rows[name]["hparams"] == expected
    assert rows["grid_b/killed"]["hparams"] == {"Axis/weights": "coco", "seed": 3}
    lone = rows["lone/other"]["hparams"]
    assert (lone["model/optimizer/lr"], lone["model/anchors/scales"], lone["seed"]) == (0.001, "[1.0, 2.0]", 0)
    assert (lone["model/optimizer/bias_decay"], lone["model/weights"]) == ("false", "none")
    assert not [name for name in lone if name.startswith("Axis/")]


def test_numbers_are_those_of_metrics_json(runs, rows, metrics_of, get, loaded) -> None:
    for name in ("tiny/seed0", "grid_a/one", "lone/went_on"):
        written, found = metrics_of(runs / name), metrics_of_row(rows[name])
        assert written["val/AP50_voc07"] > 0
        own = {tag: value for tag, value in written.items() if tag.startswith(("val/", "test/")) and value is not None}
        assert {tag: found[tag] for tag in own} == pytest.approx(own, abs=1e-6)
        for stage in ("val", "test") if name == "tiny/seed0" else ("val",):
            for metric in ("AP", "AP50_voc07", "proposal_recall@30"):
                assert found[f"AP_and_recall/{stage}_{metric}"] == pytest.approx(own[f"{stage}/{metric}"], abs=1e-6)
    assert "AP_and_recall/val_AP" not in metrics_of_row(rows["grid_b/killed"])
    curve = get("plugin/scalars/scalars", tag="AP_and_recall/val_AP", run="tiny/seed0")
    assert [step for _, step, _ in curve] == [7 * 6 - 1, 14 * 6 - 1]
    assert curve[-1][2] == pytest.approx(metrics_of(runs / "tiny/seed0")["val/AP"], abs=1e-6)


def test_first_cards_are_of_metrics_and_losses_and_learning_rates_stand_once(get, loaded) -> None:
    tags = {run: set(tags) for run, tags in get("plugin/scalars/tags").items()}
    for run in ("grid_a/one", "tiny/seed0"):  # the second is tested
        groups = sorted({tag.split("/")[0] for tag in {*tags[run], *get("plugin/images/tags")[run]}})
        assert groups[:2] == ["AP_and_recall", "losses"]  # those two are open at first
        for tag, same in (("losses/train", "train/loss"), ("losses/val_roi_reg", "val/loss_roi_reg")):
            points = [get("plugin/scalars/scalars", tag=name, run=run) for name in (tag, same)]
            assert points[0] and [point[1:] for point in points[0]] == [point[1:] for point in points[1]]
    assert {tag for tag in tags["grid_a/one"] if tag.startswith("weights/")} == {
        *(f"weights/gradient_norm/{part}" for part in ("backbone", "rpn", "box_head", "predictor", "all")),
        "weights/epoch",
        "weights/learning_rate/all",
    }
    rates = {
        part: [value for _, _, value in get("plugin/scalars/scalars", tag=f"weights/learning_rate/{part}", run=run)]
        for run, part in (("grid_a/one", "all"), ("lone/other", "weights"), ("lone/other", "biases"))
    }
    assert all(len(values) == 6 and values[1] > values[5] for values in rates.values())
    assert rates["biases"] == pytest.approx([2 * rate for rate in rates["weights"]])
    assert rates["all"] == pytest.approx([3 * rate for rate in rates["weights"]])


def test_a_session_that_goes_on_with_a_corrected_clock_counts(get, loaded) -> None:
    points = get("plugin/scalars/scalars", tag="val/AP", run=CLOCK)
    assert [(step, value) for _, step, value in points] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (5, 1)]


def test_pages_of_scalars_are_one_layout_for_all_runs(get, loaded, runs, metrics_of) -> None:
    layout = get("plugin/custom_scalars/layout")
    assert {page["title"]: [chart["title"] for chart in page["chart"]] for page in layout["category"]} == {
        page: list(charts) for page, charts in PAGES.items()
    }
    losses = layout["category"][0]["chart"][0]["multiline"]["tag"]
    curves = [get("plugin/custom_scalars/scalars", tag=tag, run="tiny/seed0")["tag_to_events"] for tag in losses]
    assert [list(curve) for curve in curves] == [["train/loss"], ["val/loss"]]
    validated = metrics_of(runs / "tiny/seed0")["val/loss"]
    assert curves[1]["val/loss"][-1][2] == pytest.approx(validated, abs=1e-6) and validated > 0


def test_all_pictures_of_a_slider(runs, get, loaded, mini_voc) -> None:
    (name, *_) = (mini_voc / "ImageSets" / "Main" / "odd.txt").read_text().split()
    tag = f"val_images/{name}.jpg"
    assert tag in get("plugin/images/tags")["tiny/seed0"]
    samples = get("plugin/images/images", tag=tag, run="tiny/seed0", sample=0)
    assert [sample["step"] for sample in samples] == [42, 84]
    query = dict(urllib.parse.parse_qsl(samples[-1]["query"]))
    picture = get("plugin/images/individualImage", **query)
    file = min((runs / "tiny/seed0").glob("events.out.tfevents.*"))
    assert picture == EventAccumulator(str(file)).Reload().Images(tag)[-1].encoded_image_string


def test_a_folder_that_is_not_there_is_told(frcnn, tmp_path) -> None:
    result = frcnn("tensorboard", cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err == "frcnn: runs: there is no such folder; frcnn fit writes runs/<experiment>/<run name>/\n"
