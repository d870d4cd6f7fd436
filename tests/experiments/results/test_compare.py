"""`frcnn compare`: a trained run beside altered copies of itself."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.reader import VOCFormat
from detector.metrics.curves import curves_of
from detector.metrics.detection_ap import EvaluatedSplit, average_precisions_by_name
from experiments.results.compare import most_different
from experiments.results.compare_curves import compare_curves
from experiments.results.files import read_results


def alter(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def threshold(run: Path) -> float:
    """A score that 20 detections reach."""
    scores = [entry["score"] for entry in json.loads((run / "predictions.json").read_text())]
    return float(sorted(scores, reverse=True)[19])


def pictures(folder: Path) -> list[str]:
    """Names of the pictures of images; curves and confusion matrices are beside them."""
    found = sorted(path.name for path in (folder / "pictures").iterdir())
    assert found[-2:] == ["confusion.png", "curves.png"]
    return found[:-2]


@pytest.fixture
def other(trained, mini_voc, tmp_path) -> Path:
    """A copy with another scale and learning rate, that finds nothing in the image of the most detections."""
    run = Path(shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints")))
    entries = json.loads((run / "predictions.json").read_text())
    names = [entry["file_name"] for entry in entries if entry["score"] >= threshold(trained)]
    busiest = max(sorted(set(names)), key=names.count)
    (run / "predictions.json").write_text(json.dumps([entry for entry in entries if entry["file_name"] != busiest]))
    (run / "busiest.txt").write_text(busiest)
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    split = EvaluatedSplit(truth.image_ids, read_results(run / "predictions.json", truth), truth.objects)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {f"val/{name}": v for name, v in average_precisions_by_name(split, truth.class_names).items() if v == v}
    (run / "metrics.json").write_text(json.dumps(metrics))

    def change(config: dict[str, Any]) -> None:
        config["model"]["anchors"]["scales"] = [1.0, 3.0]
        config["model"]["optimizer"]["lr"] = 0.001
        config["run_name"] = "other"

    alter(run, change)
    return run


@pytest.fixture
def compare(frcnn, trained, tmp_path):
    """Run `frcnn compare <trained> ...` and give back its JSON document, or its one line where it is refused."""

    def run(*options: object, refused: bool = False) -> Any:
        style = [] if refused else ["--format", "json"]
        result = frcnn("compare", trained, *options, *style, cwd=tmp_path)
        if not refused:
            assert result.code == 0, result.err
            return json.loads(result.out)
        assert (result.code, result.out) == (2, ""), result
        assert re.fullmatch(r"frcnn: .*\n", result.err), result.err
        return result.err

    return run


def test_options_that_differ(compare, other):
    assert compare(other, "--bootstrap", 20)["config"] == {
        "model.anchors.scales": {"a": [1.0, 2.0], "b": [1.0, 3.0]},
        "model.optimizer.lr": {"a": 0.003, "b": 0.001},
    }


def test_differences_are_b_minus_a(compare, frcnn, trained, other, mini_voc, tmp_path, metrics_of):
    document = compare(other, "--bootstrap", 100, "--seed", 3)
    assert not document["identical"]
    before, after = metrics_of(trained), metrics_of(other)
    ap = document["metrics"]["AP50_voc07"]
    assert ap["a"] == before["val/AP50_voc07"]
    assert ap["difference"] == pytest.approx(after["val/AP50_voc07"] - before["val/AP50_voc07"], abs=1e-6)
    evaluated = frcnn(
        *("evaluate", other / "predictions.json", "--data.root", mini_voc, "--data.val_splits", "[odd]"),
        *("--compare", trained / "predictions.json", "--bootstrap", 100, "--seed", 3, "--format", "json"),
        cwd=tmp_path,
    )
    expected = json.loads(evaluated.out)["compare"]["differences"]
    for name, one in expected.items():
        prefix = "AP50_voc_class/"
        found = document["per_class" if name.startswith(prefix) else "metrics"][name.removeprefix(prefix)]
        assert (found["low"], found["high"]) == (one["low"], one["high"])
    assert "proposal_recall@30" in document["metrics"]
    assert document["metrics"]["proposal_recall@30"]["low"] is None


def test_images_that_differ_most(compare, other, trained, mini_voc):
    document = compare(other, "--bootstrap", 20, "--score_threshold", threshold(trained))
    (image,) = document["images"]
    busiest = (other / "busiest.txt").read_text().removesuffix(".jpg")
    assert image["name"] == busiest
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    number = truth.image_names.index(busiest)
    objects = int(((truth.objects.image_id == number) & ~truth.objects.difficult).sum())
    assert image["errors_b"] == {"missed": objects, "false": 0}
    found = read_results(trained / "predictions.json", truth)
    shown = int(((found.image_id == number) & (found.score >= threshold(trained))).sum())
    # Every shown detection finds an object, is false, or lies on a difficult object.
    difficult = int(((truth.objects.image_id == number) & truth.objects.difficult).sum())
    counted = objects - image["errors_a"]["missed"] + image["errors_a"]["false"]
    assert counted <= shown
    assert difficult or counted == shown
    change = objects - sum(image["errors_a"].values())
    assert (document["errors"]["fewer"], document["errors"]["more"]) == ((0, 1) if change > 0 else (1, 0))


def test_images_that_got_better_count_as_those_that_got_worse():
    change = np.array([1, 1, 2, 3]) - np.array([3, 5, 2, 1])
    assert most_different(change, 4) == [1, 0, 3]
    assert most_different(change, 1) == [1]


def test_picture_shows_both_runs_side_by_side(compare, trained, other, tmp_path):
    options = ("--bootstrap", 20, "--score_threshold", threshold(trained), "--output", "pictures")
    document = compare(other, *options)
    assert pictures(tmp_path) == [f"01_{document['images'][0]['name']}.jpg"]
    with Image.open(tmp_path / document["images"][0]["picture"]) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    half = (pixels.shape[1] - 8) // 2
    left, right = pixels[:, :half], pixels[:, -half:]
    different = np.abs(left - right).max(axis=2) > 60
    assert 0.001 < different.mean() < 0.5  # detections on one side, the same image on both
    assert (pixels[:, half : half + 8] > 200).all()


def test_a_run_beside_itself(compare, trained, frcnn, tmp_path):
    document = compare(trained, "--bootstrap", 20)
    assert (document["config"], document["images"], document["identical"]) == ({}, [], True)
    assert {one["difference"] for one in document["metrics"].values() if one["a"] is not None} == {0.0}
    assert not any(one["excludes_zero"] for one in document["metrics"].values())
    text = frcnn("compare", trained, trained, "--bootstrap", 20, cwd=tmp_path).out
    assert "identical: losses, metrics and detections, to the last digit\n\noptions that differ\n  none\n" in text
    assert "B makes fewer in 0 of 7 images, more in 0" in text


def test_why_nothing_is_drawn(compare, trained, other, tmp_path):
    def notes(run: Path, *options: object) -> list[str]:
        document = compare(run, "--bootstrap", 20, "--output", "pictures", *options)
        assert [image["picture"] for image in document["images"]] == []
        assert pictures(tmp_path) == []
        return document["notes"]

    same = "no pictures of images: A and B make equally many errors in every image, counting scores of"
    highest = max(entry["score"] for entry in json.loads((trained / "predictions.json").read_text()))
    (note,) = notes(other, "--score_threshold", 1)
    assert note.startswith(f"{same} 1 or more; A's highest is {highest:.2f}, B's 0.")
    assert note.endswith(": give a lower --score_threshold")
    assert notes(trained, "--score_threshold", 0) == [f"{same} 0 or more"]
    assert notes(other, "--score_threshold", threshold(trained), "--images", 0) == ["no pictures of images: --images 0"]
    assert compare(trained, "--bootstrap", 20)["notes"] == []  # nothing was to be drawn


def test_recalls_of_more_proposals_than_there_were_are_one_number(compare, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "older", ignore=shutil.ignore_patterns("checkpoints")))
    metrics = json.loads((run / "metrics.json").read_text())
    value = metrics.pop("val/proposal_recall@30")
    metrics |= {f"val/proposal_recall@{k}": value for k in (50, 100, 300, 1000, 2000)}
    (run / "metrics.json").write_text(json.dumps(metrics))
    found = compare(run, "--bootstrap", 20)["metrics"]
    assert [name for name in found if "recall" in name] == ["proposal_recall@30"]
    assert found["proposal_recall@30"]["difference"] == 0


def test_table(frcnn, trained, other, tmp_path):
    result = frcnn("compare", trained, other, "--bootstrap", 20, cwd=tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"^  model\.optimizer\.lr +A 0\.003  B 0\.001$", result.out, re.MULTILINE)
    assert re.search(
        r"^  AP50_voc07 +0\.\d{4} +0\.\d{4} +[-+]0\.\d{4} +[-+]0\.\d{4} \.\. [-+]0\.\d{4}", result.out, re.M
    )
    assert re.search(r"^  triangle +", result.out, re.MULTILINE)


def test_without_images_there_are_no_pictures(frcnn, trained, other, mini_voc, tmp_path):
    bare = Path(shutil.copytree(mini_voc, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jpg")))
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    alter(run, lambda config: config["data"].update(root=str(bare)))
    options = ("--bootstrap", 20, "--score_threshold", threshold(trained), "--output", "pictures", "--format", "json")
    result = frcnn("compare", run, other, *options, cwd=tmp_path)  # the same annotations elsewhere can be compared
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["images"][0]["picture"] is None
    assert "no such image" in document["notes"][0]
    assert "data.root" in document["config"]


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_pictures_of_images_of_any_format(frcnn, trained, other, mini_voc, tmp_path, suffix):
    root = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    for path in sorted((root / "JPEGImages").iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix))
        path.unlink()
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    alter(run, lambda config: config["data"].update(root=str(root)))
    options = ("--bootstrap", 20, "--score_threshold", threshold(trained), "--output", "pictures", "--format", "json")
    document = json.loads(frcnn("compare", run, other, *options, cwd=tmp_path).out)
    name = document["images"][0]["name"]
    assert pictures(tmp_path) == [f"01_{name}.jpg"]
    assert document["notes"] == []
    image = root / "JPEGImages" / f"{name}{suffix}"
    image.write_bytes(image.read_bytes()[:200])  # its header is whole
    document = json.loads(frcnn("compare", run, other, *options, cwd=tmp_path).out)
    assert document["images"][0]["picture"] is None
    assert len(document["notes"]) == 1 and f"{name}{suffix}" in document["notes"][0]


def test_bad_input(compare, trained, other, tmp_path):
    assert "nowhere: no such folder" in compare(tmp_path / "nowhere", refused=True)
    assert "is no run folder" in compare(tmp_path, refused=True)
    untested = f"no test/AP50_voc07 in metrics.json; frcnn test --ckpt_path {trained}/checkpoints/last.ckpt adds it"
    assert untested in compare(other, "--part", "test", refused=True)
    assert "--bootstrap 1" in compare(other, "--bootstrap", 1, refused=True)
    assert "--images -1" in compare(other, "--images", -1, refused=True)
    assert "is a file" in compare(other, "--output", other / "busiest.txt", refused=True)
    alter(other, lambda config: config["data"].update(val_splits=["val"]))
    assert "predictions.json" in compare(other, refused=True)
    (other / "predictions.json").unlink()
    assert "no such file" in compare(other, refused=True)
    (other / "metrics.json").unlink()
    assert "no final numbers" in compare(other, refused=True)


def test_what_ap_is_lost_to_and_confusions_are_compared_and_drawn(compare, frcnn, trained, other, mini_voc, tmp_path):
    options = ("--bootstrap", 2, "--images", 0, "--score_threshold", threshold(trained), "--output", "drawn")
    curves = compare(other, *options)["curves"]
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    a, b = (
        curves_of(
            EvaluatedSplit(truth.image_ids, read_results(run / "predictions.json", truth), truth.objects),
            truth.class_names,
            score_threshold=threshold(trained),
        )
        for run in (trained, other)
    )
    for kind, gain in a["errors"]["gain"].items():
        assert curves["lost_to"][kind]["a"] == pytest.approx(gain)
        assert curves["lost_to"][kind]["difference"] == pytest.approx(b["errors"]["gain"][kind] - gain)
    assert curves["lost_to"]["missed"]["difference"] > 0  # B finds nothing in one image
    assert curves["calibration_error"]["b"] == pytest.approx(b["scores"]["calibration_error"])
    change = np.array(b["confusion"]) - np.array(a["confusion"])
    np.fill_diagonal(change, 0)
    changes = [one["b"] - one["a"] for one in curves["confusions"]]
    assert changes and np.abs(changes).tolist() == sorted(np.abs(change[change != 0]).tolist(), reverse=True)[:8]
    first = curves["confusions"][0]
    row, column = (
        names.index(first[key])
        for names, key in zip(
            ([*truth.class_names, "background"], [*truth.class_names, "missed"]), ("object", "detected"), strict=True
        )
    )
    assert change[row, column] == changes[0]
    assert curves["pictures"] == ["drawn/curves.png", "drawn/confusion.png"]
    sizes = [Image.open(tmp_path / path).size for path in curves["pictures"]]
    assert all(width > 1.5 * height for width, height in sizes)  # side by side
    text = frcnn("compare", trained, other, *options[:6], cwd=tmp_path).out
    assert re.search(r"^AP50 lost to .*\n  classification +0\.\d{4} +0\.\d{4} +[-+]0\.\d{4}$", text, re.MULTILINE)
    what = f"missed {first['object']}" if first["detected"] == "missed" else f"{first['object']} detected as"
    assert re.search(rf"^  {what}.*: A {first['a']}, B {first['b']}$", text, re.MULTILINE)


def test_objects_that_are_found_are_no_confusions():
    def document(confusion: list[list[int]], error: float | None) -> dict[str, Any]:
        scores = {"calibration_error": error}
        return {
            "class_names": ["x", "y"],
            "confusion": confusion,
            "errors": {"gain": {"missed": 0.25}},
            "scores": scores,
        }

    made = compare_curves(
        document([[5, 1, 2], [0, 3, 4], [9, 0, 0]], 0.5), document([[1, 1, 6], [0, 3, 5], [2, 0, 0]], None)
    )
    assert [tuple(one.values()) for one in made["confusions"]] == [
        ("background", "x", 9, 2),
        ("x", "missed", 2, 6),
        ("y", "missed", 4, 5),
    ]
    assert made["lost_to"] == {"missed": {"a": 0.25, "b": 0.25, "difference": 0, "low": None}}
    assert (made["calibration_error"]["a"], made["calibration_error"]["difference"]) == (0.5, None)
