"""What a training logs: scalars, pictures, curves and hyperparameters."""

import json
import math

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.reader import VOCFormat
from detector.metrics.curves import curves_of
from detector.metrics.detection_ap import EvaluatedSplit
from experiments.results.files import read_results

LOSSES = {f"train/{name}" for name in ("loss", "loss_rpn_cls", "loss_rpn_reg", "loss_roi_cls", "loss_roi_reg")}


def test_tensorboard_scalars(events, trained, metrics_of):
    tags = set(events.Tags()["scalars"])
    assert tags >= LOSSES | {"train/images_per_second", "val/AP50_voc07", "val/AP", "val/proposal_recall@30"}
    assert len(events.Scalars("train/loss")) == 14 * 6  # log_every_n_steps is 1
    steps = [event.step for event in events.Scalars("val/AP50_voc07")]
    assert steps == [7 * 6 - 1, 14 * 6 - 1]
    last = events.Scalars("val/AP50_voc07")[-1].value
    assert last == pytest.approx(metrics_of(trained)["val/AP50_voc07"], abs=1e-6)
    assert all(event.value > 0 for event in events.Scalars("train/images_per_second"))


def test_loss_is_the_sum_of_the_four(events):
    columns = [[event.value for event in events.Scalars(name)] for name in sorted(LOSSES - {"train/loss"})]
    sums = [sum(values) for values in zip(*columns, strict=True)]
    assert sums == pytest.approx([event.value for event in events.Scalars("train/loss")], rel=1e-5)
    assert sum(sums[-12:]) < 0.8 * sum(sums[:12])  # the detector learns


def test_tensorboard_learning_rate_follows_the_schedule(events):
    """Warm-up over two steps from 0.001 of the rate, then half a cosine over all 84 steps."""
    rates = [event.value for event in events.Scalars("weights/learning_rate/all")]
    expected = [0.003 * 0.5 * (1 + math.cos(math.pi * step / 84)) for step in range(84)]
    expected[0] *= 0.001
    expected[1] *= 0.001 + 0.999 / 2
    assert rates == pytest.approx(expected, rel=1e-4)


def test_tensorboard_pictures(events, mini_voc):
    names = (mini_voc / "ImageSets" / "Main" / "odd.txt").read_text().split()
    pictures = {tag for tag in events.Tags()["images"] if not tag.startswith("val_curves/")}
    assert pictures == {
        "train_anchors/table",
        *(f"val_{kind}/{name}.jpg" for name in names for kind in ("images", "mistakes")),
        *(f"val_inside/{name}.jpg/{what}" for name in names[:2] for what in ("anchors", "proposals", "rois")),
        *(f"val_worst/{rank}" for rank in (1, 2, 3, 4)),
    }
    assert len(events.Images(f"val_images/{names[0]}.jpg")) == 2  # one per validation


def test_curves_of_the_last_validation_are_in_the_folder_and_in_tensorboard(trained, mini_voc, events, metrics_of):
    """The numbers are those of the written detections; the pictures are of the last validation alone."""
    made = json.loads((trained / "curves.json").read_text())["val"]
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    split = EvaluatedSplit(truth.image_ids, read_results(trained / "predictions.json", truth), truth.objects)
    again = curves_of(split, truth.class_names)
    assert made["confusion"] == again["confusion"] and made["errors"]["count"] == again["errors"]["count"]
    assert {name: one["ap"] for name, one in made["precision_recall"].items() if one["objects"]} == pytest.approx(
        {name: metrics_of(trained)[f"val/AP50_voc_class/{name}"] for name in truth.class_names}, abs=1e-6
    )
    for kind, gain in made["errors"]["gain"].items():
        logged = events.Scalars(f"val_errors/{kind}")
        assert len(logged) == 2 and logged[-1].value == pytest.approx(gain, abs=1e-6)
    for name in ("curves", "confusion"):
        first, picture = events.Images(f"val_curves/{name}")
        assert first.step == logged[0].step
        assert picture.encoded_image_string[:4] == b"\x89PNG" and picture.step == made["step"] == logged[-1].step
        assert Image.open(trained / "curves" / f"val_{name}.png").width == picture.width > 500


def test_a_callback_of_ones_own_replaces_the_usual_one(frcnn, tiny_config, tmp_path):
    """One telemetry that logs every second step instead of none within six; Lightning's learning rates; nothing of
    three that are turned off; in a logger of one's own, in which the epoch has its usual place."""
    callbacks = "detector.training.callbacks"
    off = {"distributions.Distributions": ("every_n_steps", 0), "throughput.Throughput": ("every_n_steps", 0)}
    off["hyperparameters.Hyperparameters"] = ("enabled", "false")
    options = (
        *("--trainer.callbacks+", f"{callbacks}.anchor_telemetry.AnchorTelemetry"),
        *("--trainer.callbacks.log_every_n_steps", 2),
        *("--trainer.callbacks+", "LearningRateMonitor", "--trainer.logger", "TensorBoardLogger"),
        *("--trainer.logger.save_dir", "events"),
    )
    for name, (option, value) in off.items():
        options += ("--trainer.callbacks+", f"{callbacks}.{name}", f"--trainer.callbacks.{option}", value)
    result = frcnn("fit", "--config", tiny_config, *options, "--trainer.limit_val_batches", 0, cwd=tmp_path)
    assert result.code == 0, result.err
    (file,) = tmp_path.glob("events/**/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"lr-AdamW/new_weights", "weights/epoch", "losses/train"} <= tags
    assert not [
        tag for tag in tags if tag in ("epoch", "train/images_per_second") or tag.startswith("weights/learning")
    ]
    with pytest.raises(KeyError):
        events.PluginTagToContent("hparams")
    for scale in (1, 2):
        logged = events.Scalars(f"train_anchors/positives/stride8_scale{scale}_ratio1")
        assert [event.step for event in logged] == [1, 3, 5]
    assert len(events.Images("train_anchors/table")) == 1
    assert events.Tags()["histograms"] == []


def test_tensorboard_hyperparameters(events, trained, metrics_of):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    options = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    assert options["model/anchors/scales"] == "[1.0, 2.0]"
    assert options["model/optimizer/ema_decay"] == 0.9
    assert options["model/backbone/name"] == "small_c4"
    assert content.keys() == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
