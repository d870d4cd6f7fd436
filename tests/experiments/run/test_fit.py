"""What a training leaves in its run folder, and that its checkpoints give the numbers that it reported."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.training.lightning_module import FasterRCNNModule
from experiments.results.curves import read_curves

LOSSES = {f"train/{name}" for name in ("loss", "loss_rpn_cls", "loss_rpn_reg", "loss_roi_cls", "loss_roi_reg")}
METRICS = {
    *("val/AP50_voc07", "val/AP50_voc", "val/AP", "val/AP50", "val/AP75"),
    *("val/AP_small", "val/AP_medium", "val/AP_large"),
    *("val/proposal_recall@30", "val/proposal_AR@30"),
    *(f"val/AP50_voc_class/{name}" for name in ("cross", "ellipse", "rectangle", "ring", "star", "triangle")),
}


@pytest.fixture
def copied_run(trained, tmp_path) -> Path:
    """A copy of the run folder that an evaluation may write into."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))


def evaluation(metrics: dict[str, Any], stage: str = "val") -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name.startswith(f"{stage}/")}


def of_a_test(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what a test on the same images has, by name alone: a validation has losses, too."""
    return {name[4:]: value for name, value in evaluation(metrics).items() if not name.startswith("val/loss")}


def predictions(run: Path) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((run / "predictions.json").read_text())
    return content


# ---- the run folder ----


def test_metrics_json(trained, metrics_of):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    metrics = json.loads((trained / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics.keys() >= METRICS | LOSSES | {"epoch", "step", "seed", "git_commit"}
    # of 30 proposals, which is all that there are
    assert [name for name in metrics if "proposal_recall@" in name] == ["val/proposal_recall@30"]
    by_size = metrics["proposal_recall_by_size"]["val"]
    assert (by_size["k"], len(by_size["all"])) == (30, 10)
    assert by_size["all"][0] == pytest.approx(metrics["val/proposal_recall@30"])
    for size in ("small", "medium", "large"):
        assert np.mean(by_size[size]) == pytest.approx(metrics[f"val/proposal_AR@30_{size}"])
    assert (metrics["epoch"], metrics["step"], metrics["seed"]) == (14, 14 * 6, 0)
    assert metrics["git_commit"] is None or len(metrics["git_commit"].removesuffix("-dirty")) == 40
    values = [value for value in of_a_test(metrics).values() if value is not None]
    assert all(0 <= value <= 1 for value in values)
    assert metrics["val/AP50_voc07"] > 0  # or the comparisons below would compare nothing
    assert metrics["val/proposal_recall@30"] > 0.2


def test_metrics_of_absent_classes_are_null(copied_run, frcnn, metrics_of, mini_voc):
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    options = ("--data.val_splits", "[val]", "--results_dir", "results")
    result = frcnn("validate", "--ckpt_path", checkpoint, *options, cwd=copied_run.parents[2])
    assert result.code == 0, result.err
    present = set()
    for name in (mini_voc / "ImageSets" / "Main" / "val.txt").read_text().split():
        present |= set(re.findall("<name>(.*)</name>", (mini_voc / "Annotations" / f"{name}.xml").read_text()))
    assert 0 < len(present) < 6
    metrics = metrics_of(copied_run.parents[2] / "results")
    for name in (name for name in METRICS if "class" in name):
        assert (metrics[name] is None) == (name.rsplit("/", 1)[1] not in present)


def test_predictions_json(trained, mini_voc):

    found = predictions(trained)
    names = (mini_voc / "ImageSets" / "Main" / "odd.txt").read_text().split()
    classes = ["cross", "ellipse", "rectangle", "ring", "star", "triangle"]
    assert {row["file_name"] for row in found} == {f"{name}.jpg" for name in names}
    for row in found:
        width, height = Image.open(mini_voc / "JPEGImages" / row["file_name"]).size
        x, y, w, h = row["bbox"]
        assert x >= 0 and y >= 0 and w > 0 and h > 0
        assert x + w <= width + 2e-3 and y + h <= height + 2e-3
        assert row["file_name"] == f"{names[row['image_id']]}.jpg"
        assert row["category_name"] == classes[row["category_id"] - 1]
        assert 0.01 <= row["score"] <= 1


def test_checkpoints_hold_averaged_and_current_weights(trained):
    names = ["best.ckpt", "last-previous.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == names
    last = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 14 * 6
    averaged, current = last["state_dict"], last["current_model_state"]
    assert averaged.keys() == current.keys()
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)


def test_the_best_checkpoint_is_of_the_highest_ap(frcnn, tiny_config, tmp_path, monkeypatch):
    """Validations of three epochs with AP50_voc07 0.2, 0.6 and 0.4: the second is kept."""
    values = iter([0.2, 0.6, 0.4])
    monkeypatch.setattr(
        FasterRCNNModule, "_log_metrics", lambda self, stage, *_: self.log(f"{stage}/AP50_voc07", next(values))
    )
    options = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1)
    result = frcnn("fit", "--config", tiny_config, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    (best,) = tmp_path.glob("runs/*/seed0/checkpoints/best.ckpt")
    assert torch.load(best, weights_only=True)["epoch"] == 1


# ---- config.yaml ----


def test_config_is_resolved_and_runs_again(trained, frcnn, tmp_path):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["model"]["rpn"]["nms_iou"] == 0.7  # a default that no file names
    assert saved["trainer"]["max_epochs"] == 14
    assert saved["seed_everything"] == 0
    result = frcnn(
        *("fit", "--config", trained / "config.yaml", "--run_name", "again"),
        *("--trainer.max_epochs", 1, "--trainer.limit_val_batches", 0, "--trainer.check_val_every_n_epoch", 1),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    again = yaml.safe_load((tmp_path / "runs" / "tiny" / "again" / "config.yaml").read_text())
    assert again["model"] == saved["model"]
    assert again["data"] == saved["data"]
    assert again["trainer"] == saved["trainer"] | {
        "max_epochs": 1,
        "limit_val_batches": 0,
        "check_val_every_n_epoch": 1,
    }


def test_same_seed_same_run_other_seed_other_run(frcnn, tiny_config, tmp_path):
    """Names are numbered where taken; two runs of one seed end in equal weights."""
    for seed in (3, 3, 4):
        assert frcnn("fit", "--config", tiny_config, "--seed_everything", seed, cwd=tmp_path).code == 0
    names = ("seed3", "seed3-2", "seed4")
    first, second, other = (
        torch.load(tmp_path / "runs" / "tiny" / name / "checkpoints" / "last.ckpt", weights_only=True) for name in names
    )
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
        assert any(not torch.equal(tensor, other[part][name]) for name, tensor in first[part].items())
    seeds = [json.loads((tmp_path / "runs" / "tiny" / name / "metrics.json").read_text())["seed"] for name in names]
    assert seeds == [3, 3, 4]


def test_the_config_of_a_run_repeats_it_under_the_next_free_name(frcnn, tiny_config, tmp_path, caplog):
    """To the bit, with the same config.yaml to the letter; a name on the command line is taken as it is."""
    runs = tmp_path / "runs" / "tiny"
    fit = ("fit", "--config", tiny_config, "--trainer.max_steps", 2, "--trainer.limit_val_batches", 0)
    caplog.set_level("INFO")
    assert frcnn(*fit, "--run_name", "mine", cwd=tmp_path).code == 0
    again = ("fit", "--config", "runs/tiny/mine/config.yaml")
    assert frcnn(*again, cwd=tmp_path).code == 0
    assert frcnn("fit", "--config", "runs/tiny/mine-2/config.yaml", "--trainer.max_steps", 1, cwd=tmp_path).code == 0
    first, second = (
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("mine", "mine-2")
    )
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert (runs / "mine" / "config.yaml").read_bytes() == (runs / "mine-2" / "config.yaml").read_bytes()
    assert [text for text in (record.getMessage() for record in caplog.records) if "repeats" in text] == [
        "runs/tiny/mine-2: repeats runs/tiny/mine, same options and seed",
        "runs/tiny/mine-3: repeats runs/tiny/mine-2 with trainer.max_steps 1, there 2",
    ]
    for given in ((*again, "--run_name", "mine"), (*fit, "--run_name", "mine-2")):
        result = frcnn(*given, cwd=tmp_path)
        assert result.code == 2 and "there is a run already; choose another --run_name" in result.err
    (tmp_path / "named.yaml").write_text((runs / "mine" / "config.yaml").read_text())  # a user's file names one run
    assert frcnn("fit", "--config", "named.yaml", "--experiment", "tiny", cwd=tmp_path).code == 2


# ---- validate and test ----


def test_validate_repeats_the_numbers_of_the_training(copied_run, tiny_config, frcnn, metrics_of):
    """Exactly: the checkpoint's weights are the averaged ones that the last validation saw."""
    before, found = metrics_of(copied_run), predictions(copied_run)
    for name in ("metrics.json", "predictions.json"):
        (copied_run / name).unlink()
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    result = frcnn("validate", "--config", tiny_config, "--ckpt_path", checkpoint, cwd=copied_run.parents[2])
    assert result.code == 0, result.err
    assert evaluation(metrics_of(copied_run)) == evaluation(before)
    assert predictions(copied_run) == found


def test_a_validation_is_logged_at_the_step_of_its_checkpoint(copied_run, events, frcnn):
    before = set(copied_run.glob("events.out.tfevents.*"))
    saved = torch.load(copied_run / "checkpoints" / "last.ckpt", weights_only=True)
    result = frcnn("validate", "--ckpt_path", copied_run / "checkpoints" / "last.ckpt", cwd=copied_run.parents[2])
    assert result.code == 0, result.err
    (file,) = set(copied_run.glob("events.out.tfevents.*")) - before
    found = EventAccumulator(str(file)).Reload()
    assert [event.step for event in found.Scalars("val/AP")] == [events.Scalars("val/AP")[-1].step]
    assert [event.value for event in found.Scalars("weights/epoch")] == [saved["epoch"]]
    assert read_curves(copied_run, ["val/AP"])["val/AP"].epochs == (7.0, 14.0)


@pytest.mark.parametrize("name", ["last", "best"])
def test_results_elsewhere_name_the_epoch_and_step_of_the_checkpoint(
    copied_run, frcnn, metrics_of, tmp_path, name, recwarn
):
    checkpoint = copied_run / "checkpoints" / f"{name}.ckpt"
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    result = frcnn("validate", "--ckpt_path", checkpoint, "--results_dir", tmp_path / "results", cwd=tmp_path)
    assert result.code == 0, result.err
    assert not [w for w in recwarn if "callbacks" in str(w.message) or "dirpath" in str(w.message)]
    found = metrics_of(tmp_path / "results")
    assert (found["epoch"], found["step"], found["seed"]) == (step / 6, step, 0)
    if name == "last":
        assert step == 14 * 6


def test_checkpoint_alone_is_enough(copied_run, frcnn, metrics_of, tmp_path):
    """Without --config the options are those of the run; the training's own numbers stay."""
    before = metrics_of(copied_run)
    (tmp_path / "elsewhere").mkdir()
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    metrics = []
    for options in (
        ["--config", copied_run / "config.yaml", "--ckpt_path", checkpoint],
        ["--ckpt_path", checkpoint],
        [f"--ckpt_path={checkpoint}"],
    ):
        result = frcnn("validate", *options, "--data.eval_batch_size", 3, cwd=tmp_path / "elsewhere")
        assert result.code == 0, result.err
        after = metrics_of(copied_run)
        metrics.append(evaluation(after))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0]["val/AP"] > 0
    assert {key: after[key] for key in ("epoch", "step", "seed", "train/loss")} == {
        key: before[key] for key in ("epoch", "step", "seed", "train/loss")
    }


def test_a_validation_leaves_no_number_of_a_former_one(copied_run, frcnn, metrics_of):
    path = copied_run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val/of_other_images": 0.5, "test/AP": 0.25}))
    result = frcnn("validate", "--ckpt_path", copied_run / "checkpoints" / "last.ckpt", cwd=copied_run.parents[2])
    assert result.code == 0, result.err
    after = metrics_of(copied_run)
    assert "val/of_other_images" not in after
    assert (after["test/AP"], after["val/loss"] > 0) == (0.25, True)


def test_test_adds_the_numbers_of_the_test_split(copied_run, frcnn, metrics_of, mini_voc):
    before = metrics_of(copied_run)
    result = frcnn("test", "--ckpt_path", copied_run / "checkpoints" / "last.ckpt", cwd=copied_run.parents[2])
    assert result.code == 0, result.err
    after = metrics_of(copied_run)
    assert evaluation(after) == evaluation(before)
    assert evaluation(after, "test").keys() == {f"test/{name}" for name in of_a_test(before)}
    names = (mini_voc / "ImageSets" / "Main" / "test.txt").read_text().split()
    assert {row["file_name"] for row in predictions(copied_run)} == {f"{name}.jpg" for name in names}


def test_test_on_the_validation_split_gives_the_numbers_of_the_validation(copied_run, frcnn, metrics_of):
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    result = frcnn("test", "--ckpt_path", checkpoint, "--data.test_splits", "[odd]", cwd=copied_run.parents[2])
    assert result.code == 0, result.err
    metrics = metrics_of(copied_run)
    tested = {name.removeprefix("test/"): value for name, value in evaluation(metrics, "test").items()}
    assert tested == of_a_test(metrics)


def test_command_line_wins_over_the_hyperparameters_of_the_checkpoint(copied_run, tiny_config, frcnn):
    found = predictions(copied_run)
    threshold = sorted(row["score"] for row in found)[len(found) // 2]
    result = frcnn(
        *("validate", "--config", tiny_config, "--ckpt_path", copied_run / "checkpoints" / "last.ckpt"),
        *("--model.roi.score_threshold", threshold, "--results_dir", "results"),
        cwd=copied_run.parents[2],
    )
    assert result.code == 0, result.err
    left = predictions(copied_run.parents[2] / "results")
    assert 0 < len(left) < len(found)
    assert min(row["score"] for row in left) >= threshold - 1e-6


def test_views_and_soft_nms_of_a_trained_checkpoint(copied_run, frcnn, metrics_of):
    """Options of the model that change evaluation alone are taken from the command line."""
    found = [predictions(copied_run)]
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    for option, name in (
        (["--model.image.test_flip", "true"], "image.test_flip=true"),
        (["--model.image.test_shortest_sides", "[48,64]"], None),
        (["--model.roi.nms", "soft_gaussian"], "roi.nms=soft_gaussian"),
    ):
        before = {path.name for path in copied_run.glob("evaluations/*")}
        result = frcnn("validate", "--ckpt_path", checkpoint, *option, cwd=copied_run.parents[2])
        assert result.code == 0, result.err
        (folder,) = (path for path in copied_run.glob("evaluations/*") if path.name not in before)
        assert name in (None, folder.name)
        found.append(predictions(folder))
        assert 0 <= metrics_of(folder)["val/AP50_voc07"] <= 1
    assert all(one != other for place, one in enumerate(found) for other in found[:place])


def test_conventions_of_other_systems_train_and_stay_in_the_checkpoint(tiny_config, frcnn, tmp_path):
    result = frcnn(
        *("fit", "--config", tiny_config, "--model.rpn.best_per_object", "one"),
        *("--model.rpn.reg_normalizer", "locations", "--model.rpn.min_side_scales", "true"),
        *("--model.roi.append_gt", "jittered", "--model.roi.class_weights", "balanced", "--model.roi.ohem", "true"),
        *("--model.roi.pooling", "roi_pool_floor", "--model.roi.nms", "soft_linear", "--model.image.test_flip", "true"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    model = FasterRCNNModule.from_checkpoint(tmp_path / "runs" / "tiny" / "seed0" / "checkpoints" / "last.ckpt").model
    roi, rpn = model.roi_heads.config, model.rpn.config
    assert (roi.append_gt, roi.class_weights, roi.ohem) == ("jittered", "balanced", True)
    assert (roi.pooling, roi.nms, model.image_config.test_flip) == ("roi_pool_floor", "soft_linear", True)
    assert (rpn.best_per_object, rpn.reg_normalizer, rpn.min_side_scales) == ("one", "locations", True)


@pytest.mark.parametrize(("value", "expected"), [("no", False), ("yes", True), ("[0.5,1,1,1,1,1,2]", None)])
def test_spellings_of_options_of_two_kinds(tiny_config, frcnn, tmp_path, value, expected):
    option = "--model.roi.append_gt" if expected is not None else "--model.roi.class_weights"
    result = frcnn("fit", "--config", tiny_config, option, value, "--print_config", cwd=tmp_path)
    roi = yaml.safe_load(result.out)["model"]["roi"]
    assert roi["append_gt"] is (expected is not False)
    assert roi["class_weights"] == ("none" if expected is not None else [0.5, 1, 1, 1, 1, 1, 2])


def test_lightnings_own_way_to_load_a_checkpoint(trained, tmp_path):
    """The same weights; the file that the backbone started from is not asked for."""
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["backbone"]["weights"] = str(tmp_path / "gone.safetensors")
    torch.save(content, tmp_path / "last.ckpt")
    module = FasterRCNNModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert module.state_dict().keys() == content["state_dict"].keys()
    assert all(torch.equal(tensor, content["state_dict"][name]) for name, tensor in module.state_dict().items())
