"""`frcnn evaluate`: result files of any detector in, numbers out; images are never there in these tests."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from datamodules.voc.format import Annotation, VOCObject, write_annotation
from experiments.results.files import ImageFinder, write_devkit_results

CLASSES = ["cat", "cat_big", "dog"]  # one name ends with another
NAN = float("nan")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images 000007 (a cat, a difficult cat), 000012 (a dog), 000030 (nothing) of 200 x 100 pixels; no cat_big."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    objects = {
        "000007": (VOCObject("cat", (10.0, 10.0, 50.0, 50.0)), VOCObject("cat", (100.0, 10.0, 150.0, 90.0), True)),
        "000012": (VOCObject("dog", (0.0, 0.0, 100.0, 100.0)),),
        "000030": (),
    }
    for stem, there in objects.items():
        write_annotation(Annotation(f"{stem}.jpg", 200, 100, there), folder / "Annotations" / f"{stem}.xml")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("\n".join(objects))
    return folder


def entry(image: str | int, category: str | int, score: float, bbox: list[float]) -> dict[str, Any]:
    return {
        "file_name" if isinstance(image, str) else "image_id": image,
        "category_name" if isinstance(category, str) else "category_id": category,
        "score": score,
        "bbox": bbox,
    }


CAT, DIFFICULT, DOG = [10.0, 10.0, 40.0, 40.0], [100.0, 10.0, 50.0, 80.0], [0.0, 0.0, 100.0, 100.0]
GOOD = [
    entry("000007.jpg", "cat", 0.9, [120.0, 10.0, 20.0, 20.0]),  # in the difficult cat, but IoU 0.1: false
    entry("000007.jpg", "cat", 0.8, DIFFICULT),
    entry("000007.jpg", "cat", 0.7, CAT),
    entry("000012.jpg", "dog", 0.6, DOG),
    entry("000030.jpg", "cat_big", 0.5, DOG),
]
EXPECTED = {"AP50_voc_class/cat": 0.5, "AP50_voc_class/dog": 1.0, "AP50_voc": 0.75, "AP50_voc07": 0.75, "AP50": 1.0}


@pytest.fixture
def evaluate(frcnn, dataset, tmp_path):
    """Run the command on entries (or a path) and give back its JSON document, or its one line where it is refused."""

    def run(found: Any, *options: object, refused: bool = False) -> Any:
        path = tmp_path / "found.json"
        if isinstance(found, Path):
            path = found
        else:
            path.write_text(found if isinstance(found, str) else json.dumps(found))
        common = ("--data.root", dataset, "--data.val_splits", "[test]", "--data.class_names", json.dumps(CLASSES))
        result = frcnn("evaluate", path, *common, *([] if refused else ["--format", "json"]), *options, cwd=tmp_path)
        if not refused:
            assert (result.code, result.err) == (0, "")
            return json.loads(result.out)
        assert (result.code, result.out) == (2, "")
        assert re.fullmatch(r"frcnn: .*\n", result.err)
        return result.err

    return run


def check(document: dict[str, Any]) -> None:
    assert {name: document[name] for name in EXPECTED} == pytest.approx(EXPECTED)


def test_coco_results_by_names(evaluate) -> None:
    document = evaluate(GOOD)
    check(document)
    assert (document["images"], document["objects"], document["difficult"], document["detections"]) == (3, 2, 1, 5)
    assert document["AP50_voc_class/cat_big"] is None
    assert document["classes_without_objects"] == ["cat_big"]
    for name in ("AP", "AP75", "AP_small", "AP_medium", "AP_large", "AR@1", "AR@10", "AR@100"):
        assert name in document
    assert not any(name.startswith("proposal") for name in document)


@pytest.mark.parametrize("image", [lambda n: n, lambda n: f"{n:06}", lambda n: f"some/folder/{n:06}.png", float])
def test_coco_results_by_other_ids(evaluate, image) -> None:
    """Images by number or bare name in image_id, classes by number."""
    found = [
        {
            "image_id": image(int(one["file_name"][:6])),
            "category_id": CLASSES.index(one["category_name"]) + 1,
            "bbox": one["bbox"],
            "score": one["score"],
            "segmentation": [],
        }
        for one in GOOD
    ]
    check(evaluate(found))


def test_images_of_several_folders() -> None:
    finder = ImageFinder(["day/a", "night/a", "day/b"])
    assert [finder.find(name) for name in ("day/a.jpg", "night\\a.png", "day/a", "b.jpg", "x/b")] == [0, 1, 0, 2, 2]
    assert finder.find("a.jpg") is None  # there are two
    assert [ImageFinder(["day/a.jpg", "night/a.jpg"]).find(f"{name}/a.jpg") for name in ("day", "night")] == [0, 1]


def test_numbers_are_positions_where_names_are_no_numbers(frcnn, mini_voc, tmp_path) -> None:
    names = (mini_voc / "ImageSets" / "Main" / "test.txt").read_text().split()
    texts = [(mini_voc / "Annotations" / f"{name}.xml").read_text() for name in names]
    position = next(i for i, text in enumerate(texts) if i and "<object>" in text and "<difficult>1" not in text)
    text = texts[position]
    assert not names[position].replace("_", "").isdigit()
    name = re.findall(r"<object>\s*<name>(\w+)</name>", text)[0]
    x1, y1, x2, y2 = (int(re.findall(rf"<{key}>(\d+)</{key}>", text)[0]) for key in ("xmin", "ymin", "xmax", "ymax"))
    (tmp_path / "found.json").write_text(
        json.dumps([entry(position, name, 0.5, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1])])
    )
    result = frcnn(
        *("evaluate", "found.json", "--data.root", mini_voc, "--data.val_splits", "test", "--format", "json"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)[f"AP50_voc_class/{name}"] > 0


def test_devkit_files_give_the_same_numbers(evaluate, tmp_path) -> None:
    write_devkit_results(GOOD, CLASSES, tmp_path / "results")
    assert (tmp_path / "results" / "comp4_det_test_dog.txt").read_text() == "000012 0.6 1.000 1.000 100.000 100.000\n"
    files, whole = evaluate(tmp_path / "results"), evaluate(GOOD)
    check(files)
    assert {**files, "file": ""} == {**whole, "file": ""}


def test_empty_results_and_a_negative_score(evaluate) -> None:
    assert evaluate([])["AP50_voc"] == 0.0
    check(evaluate([{**one, "score": one["score"] - 100} for one in GOOD]))  # logits are scores too


def test_table_says_what_is_left_out(frcnn, dataset, tmp_path) -> None:
    (tmp_path / "found.json").write_text(json.dumps(GOOD))
    result = frcnn(
        *("evaluate", "found.json", "--data.root", dataset, "--data.val_splits", "[test]"),
        *("--data.class_names", json.dumps(CLASSES), "--breakdown", "--bootstrap", 20),
        cwd=tmp_path,
    )
    assert (result.code, result.err) == (0, "")
    assert re.search(r"3 images, 2 objects \(and 1 difficult ones, ignored\), 5 detections", result.out)
    assert re.search(r"^AP50_voc07 +0\.7500 +\d\.\d{4} \.\. \d\.\d{4}$", result.out, re.MULTILINE)
    assert "no objects of cat_big: left out of the means" in result.out
    assert "--proposals" in result.out
    assert re.search(r"^cat +.*0\.5000 +\(1\)", result.out, re.MULTILINE)


def test_several_files_are_evaluated_one_by_one(frcnn, dataset, tmp_path) -> None:
    for name, found in (("a.json", GOOD), ("b.json", [])):
        (tmp_path / name).write_text(json.dumps(found))
    result = frcnn(
        *("evaluate", "a.json", "b.json", "--data.root", dataset, "--data.val_splits", "[test]", "--format", "json"),
        *("--data.class_names", json.dumps(CLASSES)),
        cwd=tmp_path,
    )
    documents = json.loads(result.out)["evaluations"]
    assert [(one["file"], one["AP50_voc"]) for one in documents] == [("a.json", 0.75), ("b.json", 0.0)]


def test_bootstrap_and_comparison(evaluate, tmp_path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(GOOD[:3]))
    document = evaluate(GOOD, "--bootstrap", 300, "--compare", other)
    intervals = document["bootstrap"]["intervals"]
    assert document["bootstrap"]["resamples"] == 300
    assert intervals.keys() == {name for name in document if name.startswith("AP")}
    assert intervals["AP50_voc"][0] <= 0.75 <= intervals["AP50_voc"][1]
    assert intervals["AP50_voc_class/cat_big"] == [None, None]
    assert document["compare"]["values"]["AP50_voc_class/dog"] == 0.0
    dog = document["compare"]["differences"]["AP50_voc_class/dog"]
    assert dog == {"difference": 1.0, "low": 1.0, "high": 1.0, "share_better": 1.0}
    assert document["compare"]["differences"]["AP50_voc_class/cat"]["share_better"] == 0.5
    assert evaluate(GOOD, "--bootstrap", 300, "--compare", other) == document
    assert evaluate(GOOD, "--compare", other)["bootstrap"]["resamples"] == 1000


def test_breakdown_and_plot(evaluate, tmp_path) -> None:
    document = evaluate(GOOD, "--plot", tmp_path / "errors.png")
    errors = document["error_breakdown"]
    assert errors["count"] == {
        "classification": 0, "localisation": 1, "both": 0, "duplicate": 0, "background": 1, "missed": 0
    }  # fmt: skip
    assert errors["gain"]["localisation"] == pytest.approx(0.25)  # the detection within the difficult cat
    assert errors["per_class"]["cat"]["localisation"] == {"gain": 0.5, "count": 1}
    assert errors["per_class"]["cat_big"]["background"] == {"gain": None, "count": 1}
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_recall_of_proposals_where_they_are_given(evaluate, tmp_path) -> None:
    proposals = tmp_path / "proposals.json"
    boxes = [("000007.jpg", [0.0, 0.0, 5.0, 5.0])] * 60 + [("000007.jpg", CAT), ("000012.jpg", DOG)]
    rows = [{"file_name": name, "bbox": box, "score": -number} for number, (name, box) in enumerate(boxes)]
    proposals.write_text(json.dumps(rows))
    document = evaluate(GOOD, "--proposals", proposals)
    assert document["proposal_recall@50"] == pytest.approx(0.5)
    assert document["proposal_recall@61"] == document["proposal_AR@61"] == pytest.approx(1.0)
    assert document["proposal_recall_class@61/dog"] == pytest.approx(1.0)
    check(document)


# ---- bad input: one line with the index of the first offender and the count ----


def with_bad(**changes: Any) -> list[dict[str, Any]]:
    bad = {**GOOD[2], **changes}
    return [*GOOD[:2], bad, *GOOD[3:], bad]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file_name": "000099.jpg"}, ["entry 2", "'000099.jpg'", "not in test", "2 of 6 entries"]),
        ({"category_name": "cow"}, ["entry 2", "'cow'", "cat, cat_big, dog", "2 of 6 entries"]),
        ({"category_name": 0}, ["entry 2", "class 0", "1 to 3", "2 of 6 entries"]),
        ({"score": NAN}, ["entry 2", "score nan", "2 of 6 entries"]),
        ({"score": "0.5"}, ["entry 2", "score '0.5'", "2 of 6 entries"]),
        ({"bbox": [10, 10, -1, 5]}, ["entry 2", "[10, 10, -1, 5]", "negative size", "2 of 6 entries"]),
        ({"bbox": [10, 10, 5]}, ["entry 2", "[10, 10, 5]", "four", "2 of 6 entries"]),
        ({"bbox": [10, 10, 5, NAN]}, ["entry 2", "nan", "2 of 6 entries"]),
        ({"bbox": [10, 10, 5, 10**400]}, ["entry 2", "2 of 6 entries"]),
        ({"file_name": None}, ["entry 2", "neither file_name nor image_id", "2 of 6 entries"]),
    ],
)
def test_bad_entries(evaluate, changes: dict[str, Any], words: list[str]) -> None:
    line = evaluate(with_bad(**changes), refused=True)
    assert all(word in line for word in words), line
    assert len(line) < 600


def test_two_names_of_an_image_id(evaluate) -> None:
    found = [{**one, "image_id": {"7": 1, "2": 2, "0": 3}[one["file_name"][5]]} for one in GOOD]
    check(evaluate(found))
    found[3]["image_id"] = 1
    line = evaluate(found, refused=True)
    assert all(word in line for word in ("entry 3", "'000012.jpg'", "'000007.jpg'", "1 of 5 entries")), line
    again = [{**one, "image_id": number} for number, one in enumerate(GOOD)]
    assert "entry 1 has file_name '000007.jpg' and image_id 1" in evaluate(again, refused=True)


def test_damaged_files(evaluate, tmp_path) -> None:
    line = evaluate(json.dumps(GOOD)[:-150], refused=True)
    assert "in entry 3; 3 entries before it are whole" in line
    assert "JSON dict" in evaluate({"annotations": GOOD}, refused=True)
    assert "entry 1 is 'text'" in evaluate([GOOD[0], "text"], refused=True)
    assert "entry 0" in evaluate("", refused=True)
    number = json.dumps([{**GOOD[0], "id": 7}]).replace(": 7", f": {'9' * 5000}")
    assert "nested too deep, or too large a number" in evaluate(number, refused=True)
    assert "nested too deep, or too large a number" in evaluate("[" * 100_000, refused=True)
    assert "no such file" in evaluate(tmp_path / "nowhere.json", refused=True)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "bytes.json" in evaluate(tmp_path / "bytes.json", refused=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("000099 0.5 1 1 2 2\n", ["line 2", "'000099'", "1 of 2"]),
        ("000012 nan 1 1 2 2\n", ["line 2", "not finite"]),
        ("000012 0.5 10 1 8 2\n", ["line 2", "negative size"]),
        ("000012 0.5 1 1 2\n", ["line 2", "x1, y1, x2, y2"]),
        ("\n", ["line 2"]),
    ],
)
def test_bad_lines_of_devkit_files(evaluate, tmp_path, text: str, words: list[str]) -> None:
    write_devkit_results(GOOD, CLASSES, tmp_path / "results")
    with (tmp_path / "results" / "comp4_det_test_dog.txt").open("a") as file:
        file.write(text)
    line = evaluate(tmp_path / "results", refused=True)
    assert all(word in line for word in ["comp4_det_test_dog.txt", *words]), line


def test_devkit_files_of_wrong_classes(evaluate, tmp_path) -> None:
    folder = tmp_path / "results"
    write_devkit_results(GOOD, CLASSES, folder)
    (folder / "comp3_det_val_dog.txt").write_text("")
    assert "of the class dog too" in evaluate(folder, refused=True)
    (folder / "comp3_det_val_dog.txt").rename(folder / "comp4_det_test_cow.txt")
    assert "comp4_det_test_cow.txt" in evaluate(folder, refused=True)
    (folder / "comp4_det_test_cow.txt").unlink()
    (folder / "comp4_det_test_dog.txt").unlink()
    line = evaluate(folder, refused=True)
    assert "comp4_det_test_dog.txt" in line
    assert "1 of 3 classes" in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bootstrap", "1"], "--bootstrap 1"),
        (["--plot", "errors.docx"], "errors.docx"),
        (["--compare", "nowhere.json"], "nowhere.json"),
        (["--data.val_splits", "{a: 1}"], "val_splits"),
        (["--data.val_splits", "[tset]"], "tset"),
        (["--format", "yaml"], "yaml"),
    ],
)
def test_bad_options(evaluate, options: list[str], named: str) -> None:
    assert named in evaluate(GOOD, *options, refused=True)


def test_options_that_must_be_given(frcnn, tmp_path) -> None:
    result = frcnn("evaluate", "x.json", cwd=tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "--data.root" in result.err


def test_predictions_of_a_run_have_the_numbers_of_its_validation(frcnn, trained, mini_voc, tmp_path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    result = frcnn(
        *("evaluate", trained / "predictions.json", "--data.root", mini_voc, "--data.val_splits", "[odd]"),
        *("--format", "json"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    document = json.loads(result.out)
    names = [name for name in metrics if re.match(r"val/A[PR]", name)]
    assert len(names) == 2 + 9 + 6
    for name in names:
        expected = NAN if metrics[name] is None else metrics[name]
        value = document[name.removeprefix("val/")]
        assert (NAN if value is None else value) == pytest.approx(expected, abs=1e-4, nan_ok=True)
    assert math.isfinite(document["AP50_voc07"])
