"""`frcnn serve`: the page in a real browser, the API over a real socket, and what pictures and scores are made of."""

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import detector
import experiments
from detector.boxes import decode
from detector.errors import InputError
from detector.image_batch import to_original
from experiments.board.looking import VIEWS, look
from experiments.board.options import ServeOptions
from experiments.board.screenshots import BROWSERS
from experiments.board.serving import Requests, serve

CHECKPOINT = Path(experiments.__file__).parent / "weights/mini_voc.ckpt"


@pytest.fixture(scope="module")
def image(tmp_path_factory, frcnn) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    assert frcnn("mini-voc", folder / "voc", "--images", 12, cwd=folder).code == 0
    paths = sorted((folder / "voc/JPEGImages").iterdir())
    trained = detector.load(CHECKPOINT, "cpu")
    return max(paths, key=lambda path: len(set(trained(path, 0.5).names)))  # one with several classes


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "experiments.cli", "serve", CHECKPOINT, "--port", "0", "--api"]
    limits = ["--max_megabytes", "0.5", "--requests_per_minute", "12", "--device", "cpu"]
    folder = tmp_path_factory.mktemp("serve")
    with subprocess.Popen([*map(str, command), *limits], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.send_signal(2)
        assert process.wait(timeout=30) == 0


def ask(address: str, body: bytes, kind: str = "image/jpeg") -> Any:
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return SimpleNamespace(status=answer.status, content=json.load(answer))
    except urllib.error.HTTPError as error:
        return SimpleNamespace(status=error.code, content=json.load(error), headers=error.headers)


def test_a_browser_uploads_an_image_moves_the_threshold_and_clicks_a_box(server, image):
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip("no Chromium is installed")
    found = detector.load(CHECKPOINT, "cpu")(image)
    best = found[0]
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url) if server not in request.url else None)
        page.goto(server)
        page.set_input_files("input[type=file]", str(image))
        page.get_by_text(f"{len(found.above(0.5))} of {len(found)} detections shown").wait_for(timeout=60_000)

        drawn = page.locator(".drawn img").bounding_box()
        width, height = found.size[::-1]
        x, y = (best.box[0] + best.box[2]) / 2, (best.box[1] + best.box[3]) / 2
        page.mouse.click(drawn["x"] + x * drawn["width"] / width, drawn["y"] + y * drawn["height"] / height)
        page.get_by_text(f"Scores of the detection {best.name} {best.score:.3f}").wait_for(timeout=30_000)

        page.get_by_label(re.compile("number input for Score from")).fill("1")
        page.get_by_label(re.compile("number input for Score from")).press("Enter")
        page.get_by_text(f"0 of {len(found)} detections shown").wait_for(timeout=30_000)
        browser.close()
    assert [url for url in elsewhere if url.startswith("http")] == []


def test_the_api_answers_with_what_the_detector_finds_and_refuses_the_rest(server, image):
    expected = detector.load(CHECKPOINT, "cpu")(image, 0.9)
    data = image.read_bytes()
    answer = ask(f"{server}/detect?score_threshold=0.9", data)
    (found,) = answer.content["detections"].values()
    assert (answer.content["height"], answer.content["width"]) == expected.size
    assert [(one["name"], one["label"]) for one in found] == [(one.name, one.label) for one in expected]
    assert [one["box"] for one in found] == [pytest.approx(one.box, abs=1e-3) for one in expected]
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + data + b"\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    assert ask(f"{server}/detect?score_threshold=0.9", form, kind).content == answer.content

    turned = image.with_name("turned.jpg")  # as cameras store pictures that are held upright: one reader for all
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image).save(turned, exif=exif)
    upright = ask(f"{server}/detect", turned.read_bytes()).content
    assert (upright["width"], upright["height"]) == expected.size
    assert len(next(iter(upright["detections"].values()))) == len(detector.load(CHECKPOINT, "cpu")(turned, 0.5))

    broken = ask(f"{server}/detect", b"no image")
    assert broken.status == 400 and broken.content["detail"].startswith("image: cannot be decoded")
    assert "object at" not in broken.content["detail"]
    assert ask(f"{server}/detect", b"--x--", kind).status == 400
    for size in (600_000, 1_990_000):  # a client that sends such a one to its end sees the answer
        large = ask(f"{server}/detect", bytes(size))
        assert large.status == 413 and large.content["detail"] == "more than 0.5 MB"
    refused = [ask(f"{server}/detect", bytes(1_990_000)) for _ in range(8)][-1]
    assert refused.status == 429 and 0 < int(refused.headers["Retry-After"]) <= 60


def test_requests_are_counted_for_each_address_over_a_minute():
    requests = Requests(2)
    assert [requests.refused_for("a", time) for time in (0.0, 10.0, 20.0)] == [0, 0, 40]
    assert requests.refused_for("b", 20.0) == 0
    assert requests.refused_for("a", 60.0) == 0 and requests.refused_for("a", 61.0) == 9


def test_each_detection_is_its_roi_with_the_boxes_and_scores_of_the_heads(image):
    seen = look(detector.load(CHECKPOINT, "cpu"), image)
    (rois,), heads = seen.record.rois, seen.trained.module.model.roi_heads.config
    assert len(seen.found.above(0.5)) > 0
    for number, one in enumerate(seen.found.above(0.5)):
        x, y = (one.box[0] + one.box[2]) / 2, (one.box[1] + one.box[3]) / 2
        roi = int(seen.record.detections[0].rois[number])
        column = 0 if heads.class_agnostic else one.label - 1
        box = decode(seen.record.roi_deltas[roi, column], rois[roi], heads.delta_std, heads.delta_mean)
        assert to_original(box[None], seen.record.batch, 0)[0].tolist() == pytest.approx(one.box, abs=2)  # clipped
        scores = seen.scores_at(x, y, one.score, [one.name])
        assert sum(scores.scores.values()) == pytest.approx(1, abs=1e-5)
        assert scores.scores[one.name] == pytest.approx(one.score, abs=1e-5)
        assert scores.about.startswith(f"the detection {one.name}")


def test_a_point_without_a_shown_detection_gives_a_proposal_and_outside_nothing(image):
    seen = look(detector.load(CHECKPOINT, "cpu"), image)
    boxes = to_original(seen.record.rois[0], seen.record.batch, 0)
    x, y = ((boxes[0, :2] + boxes[0, 2:]) / 2).tolist()
    assert re.match(rf"proposal \d+ of {len(boxes)}, at", seen.scores_at(x, y, 1.1, []).about)
    assert seen.scores_at(-5, -5, 0, []) is None


def test_every_view_is_drawn_also_without_detections(image):
    seen = look(detector.load(CHECKPOINT, "cpu"), image)
    pictures = [seen.picture(view, score, []) for view in VIEWS.values() for score in (0.5, 1.1)]
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)
    assert all(picture.dtype == torch.uint8 and len(picture) == 3 for picture in pictures)
    name = seen.found.names[0]
    chosen = seen.shown(0.0, [name])
    assert {seen.found.names[index] for index in chosen.tolist()} == {name}


def test_missing_gradio_and_a_taken_port_are_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"frcnn serve needs gradio .*pip install '\.\[serve\]'"):
        serve(ServeOptions(run=str(CHECKPOINT)))
    with pytest.raises(InputError, match="--max_megabytes 0"):
        ServeOptions(run="x", max_megabytes=0)


def test_what_is_exported_is_not_looked_into(monkeypatch, tmp_path):
    pytest.importorskip("gradio")

    class Exported:
        @property
        def module(self) -> None:
            raise InputError("model.onnx: is exported and only detects; give the checkpoint")

    monkeypatch.setattr(detector, "load", lambda path, device: Exported())
    with pytest.raises(InputError, match="is exported and only detects"):
        serve(ServeOptions(run=str(tmp_path)))
