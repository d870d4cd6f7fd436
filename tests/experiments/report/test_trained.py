"""`frcnn report` over trained runs, of a grid and others: differences with intervals, speed, and the HTML page."""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.ops import box_iou

from datamodules.ground_truth import read_ground_truth
from datamodules.voc.reader import VOCFormat
from detector.metrics.bootstrap import bootstrap
from detector.metrics.curves import confusion_matrix, curves_of
from detector.metrics.detection_ap import EvaluatedSplit, average_precisions_by_name
from detector.use.drawing import class_color
from experiments.results.curves import read_curves
from experiments.results.files import read_results


def score(run: Path, mini_voc: Path) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """All values and their samples, by the metrics themselves."""
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    found = read_results(run / "predictions.json", truth)
    values = average_precisions_by_name(EvaluatedSplit(truth.image_ids, found, truth.objects), truth.class_names)
    return values, bootstrap(found, truth.objects, truth.image_ids, truth.class_names, 200, 5)


def copy_run(trained: Path, run: Path, mini_voc: Path, keep: Callable[[int], bool], **options: Any) -> Path:
    """A run like `trained` whose predictions lack the entries that are not kept, with metrics to match.

    Options: a.b.c=value of its config.yaml, dots written as __.
    """
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    entries = json.loads((run / "predictions.json").read_text())
    (run / "predictions.json").write_text(json.dumps([one for n, one in enumerate(entries) if keep(n)]))
    metrics = json.loads((run / "metrics.json").read_text())
    values, _ = score(run, mini_voc)
    metrics |= {f"val/{name}": None if math.isnan(value) else value for name, value in values.items()}
    (run / "metrics.json").write_text(json.dumps(metrics))
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in options.items():
        *parents, last = key.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.fixture(scope="module")
def grid(tmp_path_factory, trained, mini_voc, writer) -> Path:
    """A baseline, and two cells that find less; of the second seed of `16` nothing is there."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    cells = [writer.cell(scales, seed) for scales in ("8", "4-8", "16") for seed in (0, 1)]
    for one in cells:
        one["axes"] = {"scales": one["axes"]["scales"], "ratios": "1"}
    cells[4]["axes"]["ratios"] = cells[5]["axes"]["ratios"] = "0.5-1"
    writer.plan(folder, cells, baseline="scales=8", name="trained")
    kept = [lambda n: True, lambda n: n % 5 != 0, lambda n: n % 3 != 0, lambda n: n % 4 > 1, lambda n: n % 7 == 0]
    for one, keep in zip(cells, kept, strict=False):
        copy_run(trained, folder / one["folder"], mini_voc, keep, model__anchors__scales=[1.0, 9.0])
        writer.run(folder, one, "done", seconds=12.5)
    return folder


def test_difference_is_that_of_the_mean_over_seeds_on_the_same_images(report, grid, mini_voc):
    document = report(grid, "--bootstrap", 200, "--seed", 5)
    assert (document["part"], document["baseline"]) == ("val", "scales=8")
    base, other, third = document["cells"]
    assert base["differences"] == base["per_class"] == {}
    names = [f"scales={s}-00000000" for s in ("8,seed=0", "8,seed=1", "4-8,seed=0", "4-8,seed=1", "16,seed=0")]
    values, samples = zip(*(score(grid / name, mini_voc) for name in names), strict=True)

    def check(one: dict[str, Any], name: str, ours: list[int], theirs: list[int]) -> None:
        means = [np.mean([values[i][name] for i in rows]) for rows in (ours, theirs)]
        assert one["difference"] == pytest.approx(means[0] - means[1], abs=1e-9)
        change = np.mean([samples[i][name] for i in ours], 0) - np.mean([samples[i][name] for i in theirs], 0)
        assert [one["low"], one["high"]] == pytest.approx(np.nanquantile(change, [0.025, 0.975]).tolist(), abs=1e-9)
        assert one["excludes_zero"] == (one["low"] > 0 or one["high"] < 0)

    one = other["differences"]["AP50_voc07"]
    check(one, "AP50_voc07", [2, 3], [0, 1])
    assert one["seeds"] == [0, 1]
    singles = [values[2]["AP50_voc07"] - values[0]["AP50_voc07"], values[3]["AP50_voc07"] - values[1]["AP50_voc07"]]
    assert [pair["difference"] for pair in one["per_seed"]] == pytest.approx(singles)
    assert one["std"] == pytest.approx(np.std(singles, ddof=1))
    # a seed that only the baseline has does not count
    check(third["differences"]["AP50_voc07"], "AP50_voc07", [4], [0])
    assert third["differences"]["AP50_voc07"]["std"] is None
    for name, found in other["per_class"].items():
        check(found, name, [2, 3], [0, 1])
    assert len(other["per_class"]) == 6


def test_another_baseline_and_none(report, grid):
    document = report(grid, "--baseline", "scales=16", "--bootstrap", 20)
    assert document["cells"][2]["differences"] == {}
    assert document["cells"][0]["differences"]["AP50_voc07"]["difference"] > 0
    assert report(grid, "--bootstrap", 0)["cells"][1]["differences"] == {}
    assert "no cell 'scales=9'" in report(grid, "--baseline", "scales=9", refused=True)


def test_intervals_of_other_metrics(report, grid, mini_voc):
    one = report(grid, "--bootstrap", 20, "--metrics", "[AP]")["cells"][1]["differences"]["AP"]
    (a, _), (b, _) = (score(grid / f"scales={s},seed=0-00000000", mini_voc) for s in ("8", "4-8"))
    assert one["per_seed"][0]["difference"] == pytest.approx(b["AP"] - a["AP"])
    assert one["low"] <= one["difference"] <= one["high"]


def test_anchors_speed_and_memory(report, grid, trained):
    first = report(grid, "--bootstrap", 0)["cells"][0]
    anchors = first["anchors"]
    assert (anchors["shapes"], anchors["straddling"], anchors["dead"]) == (2, "keep", 0)
    curve = read_curves(trained, ["train/images_per_second"])["train/images_per_second"]
    assert first["images_per_second"] == pytest.approx(float(np.median(curve.values)))
    assert first["peak_memory_mib"] > 50


def test_dead_anchors(report, trained, mini_voc, tmp_path):
    options = {"model__anchors__scales": [1.0, 2.0, 20.0], "model__anchors__straddling": "drop"}
    copy_run(trained, tmp_path / "runs" / "x" / "seed0", mini_voc, lambda n: True, **options)
    document = report(tmp_path / "runs")
    assert [document["cells"][0]["anchors"][key] for key in ("dead", "shapes")] == [1, 3]
    assert "scale 20" in document["cells"][0]["anchors"]["warnings"][0]
    assert re.search(r"1 of 3", report(tmp_path / "runs", style="table"))


def test_predictions_of_another_evaluation_give_no_interval(report, grid, tmp_path):
    folder = Path(shutil.copytree(grid, tmp_path / "g"))
    damaged = folder / "scales=4-8,seed=0-00000000" / "metrics.json"
    content = json.loads(damaged.read_text())
    name = next(name for name in ("test/AP50_voc07", "val/AP50_voc07") if name in content)
    damaged.write_text(json.dumps(content | {name: content[name] + 0.004}))  # more than rounding can do
    (folder / "scales=16,seed=0-00000000" / "predictions.json").unlink()
    document = report(folder, "--bootstrap", 20)
    assert document["cells"][1]["differences"]["AP50_voc07"]["seeds"] == [1]
    assert document["cells"][2]["differences"] == {}
    notes = "\n".join(document["notes"])
    assert "not the detections of that evaluation" in notes
    assert "predictions.json: no such file" in notes


def test_running_cells_show_what_they_have(report, grid, trained, tmp_path):
    folder = Path(shutil.copytree(grid, tmp_path / "g"))
    run = folder / "scales=4-8,seed=1-00000000"
    (run / "metrics.json").unlink()
    record = json.loads((run / "cell.json").read_text())
    (run / "cell.json").write_text(json.dumps(record | {"status": "running", "pid": 1, "host": "elsewhere"}))
    one = report(folder, "--bootstrap", 20)["cells"][1]
    assert one["status"] == "running"
    point = one["runs"][1]["so_far"]["val/AP50_voc07"]
    assert point["epoch"] == 14
    assert point["value"] == pytest.approx(read_curves(trained, ["val/AP50_voc07"])["val/AP50_voc07"].values[-1])
    assert "after epoch 14" in report(folder, "--bootstrap", 0, style="table")


def test_a_damaged_event_file(report, grid, tmp_path):
    folder = Path(shutil.copytree(grid, tmp_path / "g"))
    for path in folder.rglob("events.out.*"):
        path.write_bytes(path.read_bytes()[:-1000] + b"\x00" * 500)
    assert report(folder, "--bootstrap", 0)["cells"][0]["metrics"]["AP50_voc07"]["std"] > 0


# ---- the HTML page ----


class Page(HTMLParser):
    """Tags, texts by table, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.styles: list[list[str]] = []
        self.images = 0
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.styles.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.styles[-1].append(dict(attrs).get("style") or "")
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.links += [str(value) for name, value in attrs if (tag, name) == ("a", "href")]
        for name, value in attrs:
            assert not name.startswith("on")
            if tag != "a" and name in ("src", "href", "srcset", "data", "action"):
                self.images += (value or "").startswith("data:image/png;base64,")
                self.fetched += [] if (value or "").startswith("data:") else [str(value)]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_page_is_whole_and_fetches_nothing(report, grid, frcnn, tmp_path):
    result = frcnn("report", grid, "--output", "new/report.html", "--bootstrap", 50, cwd=tmp_path)
    assert (result.code, result.out) == (0, "")
    text = (tmp_path / "new" / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "http" not in text
    assert page.images == 5  # the curves, one picture of anchors that all cells share, and how each cell errs
    assert [row[0] for row in page.rows[:4]] == ["scales", "8", "4-8", "16"]
    heat = [row for row in page.rows if row[0] == "4-8"][1]
    assert heat[2] == "not in the grid"
    assert re.match(r"0\.\d{4} ± 0\.\d{4}[-+]", heat[1])
    classes = [row for row in page.rows if row[0] in ("cross", "ellipse", "rectangle", "ring", "star", "triangle")]
    assert len(classes) == 6 + 3 * 6  # of differences, and of three confusion matrices


def test_cells_of_the_confusion_matrix_lead_to_pictures_of_their_detections(trained, frcnn, mini_voc, tmp_path):
    """Each number that is not 0 is a link; the pictures are four at most, of the best scores."""
    run = copy_run(trained, tmp_path / "runs" / "x" / "seed 0", mini_voc, lambda n: True)
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    detections = read_results(run / "predictions.json", truth)
    split = EvaluatedSplit(truth.image_ids, detections, truth.objects)
    counts = np.array(curves_of(split, truth.class_names, score_threshold=0.02)["confusion"])
    options = ("--output", "page.html", "--bootstrap", 0, "--score_threshold", 0.02)
    assert frcnn("report", tmp_path / "runs", *options, cwd=tmp_path).code == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [row[1:] for row in page.rows if row[0] == "background"] == [[str(n) if n else "" for n in counts[-1]]]
    cells = [f"c1_{row}_{column}" for row, column in zip(*counts.nonzero(), strict=True)]
    assert [link[1:] for link in page.links if link[1:] in cells] == cells and len(cells) > 3
    assert {one for one in page.ids if one.startswith("c1_") and one.count("_") == 2} == set(cells)
    assert {"c1", "c1_0", "c1_6"} <= set(page.ids) & {link[1:] for link in page.links}  # all, and those of a row
    assert text.count("data:image/jpeg") == np.minimum(counts, 4).sum() and counts.max() > 4
    # The first picture of the fullest cell of mistakes is of the image that has its best score.
    column = int(counts[-1].argmax())
    matrix = confusion_matrix(split, 6, 0.02)
    rows = np.flatnonzero((matrix.row == 6) & (matrix.column == column))
    image = truth.image_names[detections.image_id[rows[detections.score[rows].argmax()]]]
    assert re.search(rf'id="c1_6_{column}">.*?<figcaption class="note">([^<]*)<', text, re.DOTALL)[1] == image
    picture = re.search(rf'id="c1_6_{column}">.*?base64,([^"]*)"', text, re.DOTALL)[1]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)
    assert max(drawn.shape) >= 240
    assert (np.abs(drawn - class_color(truth.class_names[column])).max(axis=2) < 60).mean() > 0.005

    shutil.rmtree(mini_voc_copy := tmp_path / "none", ignore_errors=True)
    shutil.copytree(mini_voc, mini_voc_copy, ignore=shutil.ignore_patterns("*.jpg"))
    copy_run(trained, run, mini_voc, lambda n: True, data__root=str(mini_voc_copy))
    without = frcnn("report", tmp_path / "runs", "--format", "html", *options[2:], cwd=tmp_path).out
    assert "What detections get wrong" in without and "data:image/jpeg" not in without and "no pictures: " in without


def test_links_lead_to_what_is_there(grid, frcnn, tmp_path):
    folder = Path(shutil.copytree(grid, tmp_path / "runs #1"))
    run = next(folder.glob("scales=8,seed=0-*"))
    (run / "found").mkdir()
    for name in ("a.jpg", "b.png"):
        (run / "found" / name).touch()
    result = frcnn("report", folder, "--output", "pages/new/report.html", "--bootstrap", 0, cwd=tmp_path)
    assert result.code == 0
    page = Page((tmp_path / "pages" / "new" / "report.html").read_text())
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    outside = [unquote(link) for link in page.links if not link.startswith("#")]
    found = {(tmp_path / "pages" / "new" / link).resolve() for link in outside}
    assert all(path.exists() for path in found)
    assert found >= {run, run / "config.yaml", run / "metrics.json", run / "predictions.json", run / "found"}
    assert found.isdisjoint(folder.glob("scales=16,seed=1-*/*"))
    row = next(row for row in page.rows if row[0] == "scales=8" and "config.yaml" in row[-1])
    assert row[1:3] == ["0", "done"]
    assert "2 pictures in found" in row[-1]


def test_only_what_excludes_zero_has_a_colour(report, grid):
    page = Page(report(grid, "--bootstrap", 200, style="html"))
    starred, others = set(), set()
    for row, styles in zip(page.rows, page.styles, strict=True):
        if row[0] in ("cross", "ellipse", "rectangle", "ring", "star", "triangle") and "." in row[1]:
            for text, style in zip(row[1:], styles[1:], strict=True):
                (starred if "*" in text else others).add(bool(style))
    assert (starred, others) == ({True}, {False})


def test_recall_by_size_and_iou(report, grid, mini_voc, trained):
    cells = report(grid, "--bootstrap", 0)["cells"]
    truth = read_ground_truth(VOCFormat(mini_voc), ["odd"])
    kept = ~truth.objects.difficult
    box = truth.objects.box[kept].astype(float)
    area = (box[:, 2:] - box[:, :2]).prod(axis=1)
    limits = {"all": (0, 1e9), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e9)}
    sizes = {name: (area >= low) & (area <= high) for name, (low, high) in limits.items()}
    best = []  # what one detection overlaps two objects, no other is left: with few detections that is each one's best
    found = read_results(grid / "scales=16,seed=0-00000000" / "predictions.json", truth)
    for image, label, one in zip(
        truth.objects.image_id[kept], truth.objects.label[kept], truth.objects.box[kept], strict=True
    ):
        others = found.box[(found.image_id == image) & (found.label == label)]
        best.append(float(box_iou(torch.tensor(one)[None], torch.tensor(others)).max()) if len(others) else 0.0)
    by_size = cells[2]["recall_by_size"]["detections"]
    for name, rows in sizes.items():
        expected = [np.mean(np.array(best)[rows] >= t / 100) if rows.any() else None for t in range(50, 100, 5)]
        assert by_size[name] == pytest.approx(expected, abs=1e-9)
    recorded = json.loads((trained / "metrics.json").read_text())["proposal_recall_by_size"]["val"]
    for name in sizes:
        assert cells[0]["recall_by_size"]["proposals@30"][name] == pytest.approx(recorded[name])
    page = Page(report(grid, "--bootstrap", 0, style="html"))
    rows = {(row[0], row[1]): (row, style) for row, style in zip(page.rows, page.styles, strict=True) if len(row) > 2}
    row, style = rows["scales=16", "detections"]
    assert row[2:7] == [f"{by_size['all'][index]:.2f}" for index in (0, 2, 4, 6, 8)]
    assert all("background" in one for one in style[2:7])
    assert rows["scales=8", "proposals@30"][0][2] == f"{recorded['all'][0]:.2f}"


def test_names_cannot_become_markup(report, tmp_path, writer):
    cells = [writer.cell("<script>alert(1)</script>", 0), writer.cell("8", 0)]
    for one in cells:
        one["folder"] = f"run{cells.index(one)}"
    writer.plan(tmp_path / "g", cells)
    writer.run(tmp_path / "g", cells[0], "failed", error="<b>broken & out")
    text = report(tmp_path / "g", style="html")
    assert "script" not in Page(text).tags
    assert "&lt;b&gt;broken &amp; out" in text


# ---- ordinary runs ----


def test_ordinary_runs_are_grouped_by_what_they_are(report, trained, mini_voc, tmp_path):
    runs = tmp_path / "runs"
    copy_run(trained, runs / "x" / "seed0", mini_voc, lambda n: True)
    copy_run(trained, runs / "x" / "again", mini_voc, lambda n: n % 2 > 0, seed_everything=1, run_name="again")
    metrics = json.loads((runs / "x" / "again" / "metrics.json").read_text())
    (runs / "x" / "again" / "metrics.json").write_text(json.dumps(metrics | {"seed": 1}))
    copy_run(trained, runs / "x" / "wide", mini_voc, lambda n: True, model__anchors__aspect_ratios=[0.5])
    document = report(runs)
    rows = {one["name"]: one for one in document["cells"]}
    assert set(rows) == {"x: aspect_ratios=[1.0]", "x: aspect_ratios=[0.5]"}
    assert sorted(rows["x: aspect_ratios=[1.0]"]["seeds"]) == [0, 1]
    assert rows["x: aspect_ratios=[0.5]"]["axes"] == {"model.anchors.aspect_ratios": "[0.5]"}
    assert rows["x: aspect_ratios=[1.0]"]["metrics"]["AP50_voc07"]["std"] > 0
    compared = report(runs, "--baseline", "x: aspect_ratios=[0.5]", "--bootstrap", 20)["cells"]
    assert [bool(one["differences"]) for one in compared] == [one["name"].endswith("[1.0]") for one in compared]


def test_an_ordinary_run_without_numbers_is_unfinished(report, trained, mini_voc, tmp_path):
    run = copy_run(trained, tmp_path / "runs" / "x" / "seed0", mini_voc, lambda n: True)
    (run / "metrics.json").unlink()
    (one,) = report(tmp_path / "runs")["cells"]
    assert (one["status"], one["seeds"]) == ("unfinished", [0])
    assert report(run)["cells"][0]["status"] == "unfinished"  # a run's own folder serves, too
