"""Names of classes that are paths, markup, formulas and commands for terminals, through all that writes them."""

import html.parser
import json
import os
import re
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import Image

import detector

NAMES = [
    *("../../up", "/tmp/frcnn_hostile_name", "..", "CON", "a:b", "x" * 300, "{{ 7 * 7 }}", "%s", "_hidden"),
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "[/red]", "$\\frac{$", "$a$b$"),
]
BREAKS = "two\n lines"
SPLITS = ("--data.root", "data", "--data.val_splits", "[odd]")


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.fixture(scope="module")
def work(tmp_path_factory, mini_voc, tiny_config, frcnn) -> Path:
    """A folder with such a dataset in `data`, and a detector that was trained on it in `runs/tiny/a`."""
    folder: Path = tmp_path_factory.mktemp("outer") / "work"
    shutil.copytree(mini_voc, folder / "data")
    names, count = [*NAMES, BREAKS], 0
    for file in sorted((folder / "data" / "Annotations").iterdir()):
        *parts, last = re.split("<name>.*?</name>", file.read_text())
        for number, part in enumerate(parts):
            parts[number] = f"{part}<name>{escape(names[count % len(names)])}</name>"
            count += 1
        file.write_text("".join([*parts, last]))
    result = frcnn("fit", "--config", tiny_config, "--data.root", "data", "--run_name", "a", cwd=folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture(autouse=True)
def nothing_outside(work, tiny_config):
    yield
    assert os.listdir(work.parent) == ["work"]
    assert not Path("/tmp/frcnn_hostile_name").exists()
    assert not Path("/tmp/frcnn_hostile_name.txt").exists()


def test_metrics_have_the_names_without_what_terminals_obey(work, metrics_of):
    found = {name.split("/", 2)[2] for name in metrics_of(work / "runs/tiny/a") if "AP50_voc_class/" in name}
    assert found == {*NAMES, "two lines"}


def test_the_doctor_lists_and_draws_them(work, frcnn):
    result = frcnn("doctor", "data", "--format", "json", cwd=work)
    assert set(json.loads(result.out)["classes"]) == {*NAMES, "two lines"}
    result = frcnn("doctor", "data", "--plot", "doctor.png", cwd=work)
    assert result.code == 0
    assert all(name in result.out for name in ("[/red]", "$\\frac{$", "two lines"))
    assert Image.open(work / "doctor.png").width > 1000


def test_predictions_stay_in_their_folder(work, frcnn):
    common = ("--ckpt_path", "runs/tiny/a", "--images", "data/JPEGImages", "--score_threshold", "0")
    result = frcnn("predict", *common, "--output", "out", "--save", "images,json,csv,voc,yolo", cwd=work)
    assert result.code == 0, result.err
    assert len((work / "out" / "classes.txt").read_text().splitlines()) == len(NAMES) + 1
    assert {path.name for path in (work / "out").iterdir() if path.suffix != ".jpg"} == {
        *("Annotations", "labels", "classes.txt", "predictions.csv", "predictions.json")
    }
    refused = frcnn("predict", *common, "--output", "devkit", "--save", "devkit", cwd=work)
    assert refused.code == 2
    assert "there can be no file 'comp4_det_test_../../up.txt' for the class '../../up'" in refused.err
    assert not (work / "devkit").exists()


def test_the_page_of_a_report_has_no_live_markup(work, frcnn):
    result = frcnn("report", "runs/tiny", "--format", "html", "--output", "report.html", cwd=work)
    assert result.code == 0, result.err
    text = (work / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    tags = Tags(text)
    assert not tags.found & {"script", "iframe", "object", "link"}
    assert not {name for name in tags.attributes if name.startswith("on")}


def test_comparison_evaluation_and_export(work, frcnn):
    run = work / "runs/tiny/a"
    result = frcnn("compare", run, run, "--output", "compared", "--score_threshold", "0", cwd=work)
    assert result.code == 0, result.err
    result = frcnn("evaluate", run / "predictions.json", *SPLITS, "--breakdown", "--plot", "errors.png", cwd=work)
    assert result.code == 0, result.err
    result = frcnn("export", run, "--format", "safetensors", "--output", "exported", cwd=work)
    assert result.code == 0, result.err
    names = detector.load(work / "exported").class_names.values()
    assert set(names) == {*NAMES, "two lines"}
