"""`frcnn validate --oracle`: the table, the file, and the numbers against others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import decode_image

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.reader import VOCFormat
from detector.metrics import DetectionAP
from detector.metrics.oracles import right_boxes, right_labels
from detector.metrics.voc_ap import Detections, evaluate_voc
from detector.training.lightning_module import FasterRCNNModule


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may add to."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny" / "seed0"))


def test_all_oracles_in_one_validation(frcnn, run, mini_voc, metrics_of, tmp_path) -> None:
    result = frcnn("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--oracle", "all", cwd=tmp_path)
    assert result.code == 0, result.err
    document = json.loads((run / "oracles.json").read_text())
    results, whole = document["results"], metrics_of(run)
    assert list(results) == ["detector", "proposals", "labels", "boxes"]
    assert document["checkpoint"].endswith("last.ckpt")
    for name, value in results["detector"].items():
        assert value == pytest.approx(whole[f"val/{name}"], nan_ok=True)

    # The printed table has these numbers.
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line.split()[:1] != []}
    for name, row in results.items():
        shown = [f"{100 * row[key]:.2f}" for key in ("AP50_voc07", "AP50_voc", "AP")]
        assert [value for value in rows[name] if "(" not in value] == shown
    gain = 100 * (results["labels"]["AP50_voc07"] - results["detector"]["AP50_voc07"])
    assert rows["labels"][1] == f"({gain:+.2f})"

    # Labels and boxes from the detections in the file, which are rounded.
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    number = {name: index for index, name in enumerate(truth.image_names)}
    found = json.loads((run / "predictions.json").read_text())
    rows_of = [(number[Path(one["file_name"]).stem], one["category_id"], one["score"], one["bbox"]) for one in found]
    image, label, score, box = (np.array(column) for column in zip(*rows_of, strict=True))
    box[:, 2:] += box[:, :2]
    detections, labels = Detections(truth.image_ids[image], label, score, box), range(1, 7)
    for name, oracle in (("labels", right_labels), ("boxes", right_boxes)):
        expected = evaluate_voc(oracle(detections, truth.objects, labels), truth.objects, labels)
        assert results[name]["AP50_voc07"] == pytest.approx(expected.ap_voc07, abs=1e-3)
        assert results[name]["AP50_voc07"] >= results["detector"]["AP50_voc07"]


def test_proposals_are_the_boxes_of_all_objects(frcnn, run, mini_voc, tmp_path) -> None:
    options = ("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--data.batch_size", 1)
    assert frcnn(*options, "--oracle", "[proposals]", cwd=tmp_path).code == 0
    assert frcnn(*options, "--oracle", "proposals", "--classes", "[star]", cwd=tmp_path).code == 0
    results = json.loads((run / "oracles.json").read_text())["results"]
    assert list(results) == ["detector", "proposals"]

    module = FasterRCNNModule.from_checkpoint(run / "checkpoints" / "last.ckpt")
    metric, truth = DetectionAP(module.class_names), read_ground_truth(VOCFormat(mini_voc), ["odd"])
    for image_id, name in zip(truth.image_ids, truth.image_names, strict=True):
        own = truth.objects.take(truth.objects.image_id == image_id)
        boxes = torch.from_numpy(own.box).float()
        target = {"boxes": boxes, "labels": torch.from_numpy(own.label), "difficult": torch.from_numpy(own.difficult)}
        with torch.no_grad():
            features, batch = module.model.features([decode_image(next((mini_voc / "JPEGImages").glob(f"{name}.*")))])
            (height, width), (old_height, old_width) = batch.sizes[0], batch.original_sizes[0]
            scaled = boxes * torch.tensor([width / old_width, height / old_height] * 2)
            found = module.model.detect(features, [scaled], batch)
            metric.update(found, [target | {"image_id": torch.tensor(image_id)}])
    expected = metric.compute()
    for name in ("AP50_voc07", "AP50_voc", "AP"):
        assert results["proposals"][name] == pytest.approx(float(expected[name]), abs=1e-4)
    star = json.loads((run / "classes" / "star" / "oracles.json").read_text())["results"]["proposals"]
    assert star["AP50_voc"] == pytest.approx(results["proposals"]["AP50_voc_class/star"], abs=1e-4)


@pytest.mark.parametrize(
    ("value", "words"),
    [("ratios", "'ratios' is not a list of proposals, labels, boxes, all"), ("[]", "proposals, labels, boxes, all")],
)
def test_unknown_oracles_are_refused(frcnn, trained, value, words, tmp_path) -> None:
    result = frcnn("validate", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--oracle", value, cwd=tmp_path)
    assert result.code == 2
    assert words in result.err.splitlines()[-1]


def test_a_whole_validation_is_needed(frcnn, trained, tmp_path) -> None:
    options = (
        "--ckpt_path",
        trained / "checkpoints" / "last.ckpt",
        "--oracle",
        "all",
        "--trainer.fast_dev_run",
        "true",
    )
    result = frcnn("validate", *options, "--oracle", "all", cwd=tmp_path)
    assert result.code == 2
    assert "--oracle: a whole validation is needed" in result.err
    assert not (trained / "oracles.json").exists()
