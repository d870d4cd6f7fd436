"""`frcnn init`: what it finds in a dataset, what it chooses for it and for a machine, and that its file trains."""

import json
import re
import shlex
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from datamodules.ground_truth import SplitTruth
from datamodules.mini_voc.scene import CLASS_NAMES, SceneObject, draw_scene
from datamodules.voc.format import Annotation, VOCObject, write_annotation
from detector.backbones import pretrained
from detector.errors import InputError
from detector.metrics.voc_ap import GroundTruth
from detector.training.lightning_module import FasterRCNNModule
from experiments.benchmark.expectation import Expectation
from experiments.dataset import init as command
from experiments.dataset.options import InitOptions
from experiments.dataset.settings import GIB, Machine, choose_network, choose_settings, this_machine

CPU = Machine("a processor", False, 16 * GIB, 4)
GPU = Machine("a GPU", True, 24 * GIB, 16)
QUICK = ("--weights", "none", "--backbone", "small_c4")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No steps are timed."""
    monkeypatch.setattr(command, "expect_training", lambda *given: Expectation(100, 0.6, "32-true"))


# ---- three layouts, as their tools write them ----


def paint(path: Path, index: int) -> tuple[tuple[int, int], list[SceneObject]]:
    """Write a picture of MiniVOC, and return its width and height and its objects, of three of the classes alone."""
    scene = draw_scene(3, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path, quality=90)
    height, width = scene.image.shape[:2]
    return (width, height), [item for item in scene.objects if item.name in CLASS_NAMES[:3]]


def write_labelimg(root: Path) -> dict[str, list[list[SceneObject]]]:
    """XML files beside the images, no splits."""
    found = []
    for index in range(15):
        (width, height), objects = paint(root / f"photo {index}.jpg", index)
        stated = tuple(VOCObject(one.name, tuple(map(float, one.box))) for one in objects)
        write_annotation(Annotation(f"photo {index}.jpg", width, height, stated), root / f"photo {index}.xml")
        found.append(objects)
    return {"": found}


def write_roboflow(root: Path) -> dict[str, list[list[SceneObject]]]:
    """A folder of images with its JSON for each of train, valid and test, and a category above all others."""
    categories = [{"id": 0, "name": "shapes", "supercategory": "none"}]
    categories += [{"id": 1 + n, "name": name, "supercategory": "shapes"} for n, name in enumerate(CLASS_NAMES[:3])]
    found: dict[str, list[list[SceneObject]]] = {}
    for split, indices in (("train", range(10)), ("valid", range(10, 14)), ("test", range(14, 16))):
        images, annotations, found[split] = [], [], []
        for index in indices:
            name = f"img_{index}_jpg.rf.{index:032x}.jpg"
            (width, height), objects = paint(root / split / name, index)
            images.append({"id": index, "license": 1, "file_name": name, "height": height, "width": width})
            for one in objects:
                x1, y1, x2, y2 = one.box
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "segmentation": []}
                place = {"id": len(annotations), "image_id": index, "category_id": 1 + CLASS_NAMES.index(one.name)}
                annotations.append({**place, **box, "iscrowd": 0})
            found[split].append(objects)
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return found


def write_yolo(root: Path) -> dict[str, list[list[SceneObject]]]:
    """Text files under labels/ as the pictures under images/, and data.yaml."""
    found: dict[str, list[list[SceneObject]]] = {}
    for split, indices in (("train", range(10)), ("val", range(10, 14))):
        (root / "labels" / split).mkdir(parents=True)
        found[split] = []
        for index in indices:
            (width, height), objects = paint(root / "images" / split / f"{index:04}.jpg", index)
            lines = []
            for one in objects:
                x1, y1, x2, y2 = one.box
                shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                lines.append(" ".join([str(CLASS_NAMES.index(one.name)), *(f"{share:.6f}" for share in shares)]))
            (root / "labels" / split / f"{index:04}.txt").write_text("".join(f"{line}\n" for line in lines))
            found[split].append(objects)
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASS_NAMES[:3]))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return found


LAYOUTS: dict[str, Any] = {
    "yolo": (write_yolo, "yolo", {"train": ["train"], "val": ["val"], "test": []}),
    "labelimg": (write_labelimg, "voc", {"train": [], "val": [], "test": []}),
    "roboflow": (write_roboflow, "coco", {"train": ["train"], "val": ["valid"], "test": ["test"]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_commands_lead_from_a_folder_to_pictures(tmp_path, frcnn, untimed, layout) -> None:
    write, data_format, splits = LAYOUTS[layout]
    painted = write(tmp_path / "my shapes")
    images = {split: len(found) for split, found in painted.items()}
    counts = Counter(one.name for found in painted.values() for objects in found for one in objects)

    first = frcnn("init", "my shapes", *QUICK, cwd=tmp_path)
    assert first.code == 0, first.err
    text = (tmp_path / "my shapes.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["data_format"] == data_format
    assert config["data"]["root"] == "my shapes"
    assert config["data"]["class_names"] == list(CLASS_NAMES[:3])
    assert {part: config["data"].get(f"{part}_splits", []) for part in splits} == splits
    assert dict(re.findall(r'- "(\w+)"  # (\d+) objects', text)) == {name: str(count) for name, count in counts.items()}
    assert f"{sum(images.values())}: " in first.out and f"{counts.total()} of 3 classes" in first.out

    printed = [shlex.split(line)[1:] for line in first.out.splitlines() if line.startswith("  frcnn")]
    fit, predict, *more = printed
    best = predict[predict.index("--ckpt_path") + 1]
    assert [one for one in more if one[0] == "test"] == ([["test", "--ckpt_path", best]] if splits["test"] else [])
    assert text.splitlines()[0] == f"# frcnn {shlex.join(fit)}"
    short = ("--trainer.max_epochs", 1, "--trainer.check_val_every_n_epoch", 1, "--data.num_workers", 0)
    second = frcnn(*fit, *short, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", cwd=tmp_path)
    assert second.code == 0, second.err
    third = frcnn(*predict, "--score_threshold", 0.01, cwd=tmp_path)
    assert third.code == 0, third.err

    folder = tmp_path / predict[predict.index("--output") + 1]
    results = json.loads((folder / "predictions.json").read_text())
    assert results and {one["category_name"] for one in results} <= set(CLASS_NAMES[:3])
    shown = tmp_path / predict[predict.index("--images") + 1] / results[0]["file_name"]
    (picture,) = (path for path in folder.rglob("*.*") if path.stem == shown.stem)
    with Image.open(shown) as before, Image.open(picture) as after:
        pixels = np.asarray(before.resize(after.size), float), np.asarray(after.convert("RGB"), float)
    assert (np.abs(pixels[0] - pixels[1]).max(axis=2) > 100).sum() > 100  # boxes and labels


@pytest.mark.parametrize(
    ("files", "splits", "val_fraction"),
    [
        ("train val trainval test", {"train": ["train"], "val": ["val"], "test": ["test"]}, None),
        ("trainval test", {"train": ["trainval"], "val": [], "test": ["test"]}, 0.3),
        ("train test", {"train": ["train"], "val": [], "test": ["test"]}, 0.3),
        ("val test", {"train": ["val"], "val": [], "test": ["test"]}, 0.3),
        ("default", {"train": ["default"], "val": [], "test": []}, 0.3),
        ("night day", {"train": [], "val": [], "test": []}, 0.3),  # all annotated images, each once
        ("", {"train": [], "val": [], "test": []}, 0.3),
    ],
)
def test_splits_are_told_by_their_names(tmp_path, mini_voc, files, splits, val_fraction) -> None:
    root = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    folder = root / "ImageSets" / "Main"
    lists = {name: (folder / f"{name}.txt").read_text() for name in ("train", "val", "test", "trainval")}
    lists |= {"default": lists["train"], "night": lists["val"], "day": lists["train"]}
    shutil.rmtree(folder)
    folder.mkdir()
    for name in files.split():
        (folder / f"{name}.txt").write_text(lists[name])
    found = command.look_at(InitOptions(root=str(root), val_fraction=0.3))
    assert (found.data.splits.names, found.data.splits.val_fraction) == (splits, val_fraction)


# ---- what is chosen ----


def truth_of_squares(size: tuple[int, int], sides: list[float], images: int, classes: int = 1) -> SplitTruth:
    """Return images of one size (height, width), with squares of these sides in each, far from one another."""
    box = np.array([[600.0 * n, 0, 600.0 * n + side, side] for n, side in enumerate(sides)], np.float32)
    total = images * len(sides)
    objects = GroundTruth(
        image_id=np.repeat(np.arange(images), len(sides)),
        label=1 + np.arange(total) % classes,
        box=np.tile(box, (images, 1)),
        difficult=np.zeros(total, bool),
    )
    names = tuple(f"image{n}" for n in range(images))
    return SplitTruth(
        ("train",), names, tuple(f"class{n}" for n in range(classes)), objects, np.full((images, 2), size)
    )


@pytest.mark.parametrize(
    ("network", "size", "side", "sides"),
    [
        ("mobilenet_v2_c4", (480, 640), 60, (320, 448)),  # 60 of 480: 40 of 320, enough; 426.7 is the longer side
        ("mobilenet_v2_c4", (480, 640), 24, (480, 640)),  # has 24 pixels at 480 alone
        ("mobilenet_v2_c4", (480, 640), 10, (640, 864)),  # would need 1152
        ("mobilenet_v2_c4", (100, 100), 50, (160, 160)),  # no more than one and a half times the file, 150
        ("resnet50_fpn", (1080, 1920), 300, (640, 1152)),  # 1137.8
        ("resnet50_fpn", (1080, 1920), 20, (864, 1536)),  # 16 at 864
        ("small_c4", (480, 3000), 240, (224, 448)),  # panoramas: twice the shorter side, no more
    ],
)
def test_sizes_follow_the_smallest_objects(network, size, side, sides) -> None:
    chosen = choose_settings(network, "imagenet", truth_of_squares(size, [side], 4), CPU)
    assert (chosen["shortest"], chosen["longest"]) == sides


@pytest.mark.parametrize(
    ("network", "machine", "images", "batch_size", "epochs", "steps", "warmup", "lr"),
    [
        ("mobilenet_v2_c4", CPU, 600, 4, 12, 1800, 100, 0.0003),  # 6000 views are 10 epochs: four times three
        ("mobilenet_v2_c4", CPU, 20, 4, 60, 300, 60, 0.0003),  # at most 60
        ("mobilenet_v2_c4", CPU, 5000, 4, 8, 10_000, 100, 0.0003),  # at least 8
        ("mobilenet_v2_c4", CPU, 8, 2, 60, 240, 48, 0.0003),  # four steps in an epoch
        ("resnet50_fpn", GPU, 1200, 8, 20, 3000, 500, 0.01),
        ("resnet50_fpn", Machine("", True, 6 * GIB, 2), 1200, 2, 20, 12_000, 500, 0.0025),  # 2.3 images have room
    ],
)
def test_length_and_batch_follow_images_and_machine(
    network, machine, images, batch_size, epochs, steps, warmup, lr
) -> None:
    chosen = choose_settings(network, "imagenet", truth_of_squares((480, 640), [120], images), machine)
    found = tuple(chosen[key] for key in ("batch_size", "epochs", "steps", "warmup"))
    assert found == (batch_size, epochs, steps, warmup)
    assert chosen["lr"] == pytest.approx(lr)


def test_anchors_fit_the_objects_or_stay() -> None:
    """Of squares of 40 and 80 in 480 pixels, which are resized to 320, scales are 27/16 and 53/16."""
    chosen = choose_settings("mobilenet_v2_c4", "none", truth_of_squares((480, 640), [40, 80], 10), CPU)
    scales = chosen["anchors"].scales
    assert len(scales) == 4 and min(abs(scale - 1.67) for scale in scales) < 0.1
    assert min(abs(scale - 3.33) for scale in scales) < 0.15
    assert len(chosen["anchors"].aspect_ratios) == 3


def test_the_heads_follow_classes_and_crowds() -> None:
    few = choose_settings("small_c4", "none", truth_of_squares((480, 640), [60], 90, classes=2), CPU)
    many = choose_settings("small_c4", "none", truth_of_squares((480, 640), [60], 100, classes=2), CPU)
    assert few["class_agnostic"] and not many["class_agnostic"]  # 45 and 50 objects of a class
    assert few["nms_iou"] == 0.3 and few["proposals"] == 150 and few["detections"] == 100
    crowd = truth_of_squares((480, 640), [60.0] * 80, 4)
    boxes = crowd.objects.box
    boxes[1:32] = boxes[0] + 10  # 50 x 50 of 2 * 60 x 60 - 50 x 50: IoU 0.53, and 32 of 320
    assert choose_settings("small_c4", "none", crowd, CPU)["nms_iou"] == 0.3
    boxes[81] = boxes[80] + 10  # 34
    chosen = choose_settings("small_c4", "none", crowd, CPU)
    assert (chosen["nms_iou"], chosen["proposals"], chosen["detections"]) == (0.5, 300, 300)


@pytest.mark.parametrize("gpu", [True, False])
def test_the_machine_is_the_gpu_where_there_is_one(monkeypatch, gpu) -> None:
    found = SimpleNamespace(name="NVIDIA X", total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)
    machine = this_machine()
    assert (machine.name == "NVIDIA X", machine.gpu, machine.memory == 8 * GIB) == (gpu, gpu, gpu)
    assert machine.cores >= 1 and machine.memory > GIB


# ---- weights ----


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch hub's folder of weights, empty, and no network."""

    def fail(*given: object, **named: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "_sha256", lambda path: path.stem.rpartition("-")[2])  # of the genuine files
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_are_those_at_hand(hub: Path) -> None:
    torch.save(torchvision.models.mobilenet_v2().state_dict(), hub / "mobilenet_v2-b0353104.pth")
    assert choose_network(None, "auto", CPU)[:2] == ("mobilenet_v2_c4", "imagenet")
    file = str(hub / "mobilenet_v2-b0353104.pth")
    assert choose_network(None, file, CPU)[:2] == ("mobilenet_v2_c4", file)
    assert choose_network("mobilenet_v2_c4", "none", GPU)[:2] == ("mobilenet_v2_c4", "none")
    with pytest.raises(InputError, match=r"no_such\.pth: no such file"):
        choose_network(None, "no_such.pth", CPU)


@pytest.mark.parametrize(
    ("machine", "wanted", "file"),
    [(CPU, "mobilenet_v2_c4", "mobilenet_v2-b0353104.pth"), (GPU, "resnet50_fpn", "resnet50-0676ba61.pth")],
)
def test_without_weights_a_network_is_trained_from_scratch(hub: Path, machine, wanted, file) -> None:
    network, weights, text = choose_network(None, "auto", machine)
    assert (network, weights) == ("small_c4", "none")
    assert f"for {wanted} would find much more" in text
    assert f"put it in {hub} as {file}, and init again" in text
    assert choose_network(wanted, "auto", machine)[:2] == (wanted, "none")


# ---- the file ----


@pytest.mark.parametrize("network", ["small_c4", "mobilenet_v2_c4", "resnet50_fpn"])
def test_every_option_of_the_file_is_known_and_nothing_random_is_frozen(
    tmp_path, frcnn, untimed, mini_voc, resolve, network
) -> None:
    path = tmp_path / f"{network}.yaml"
    result = frcnn("init", mini_voc, "--output", path, "--backbone", network, "--weights", "none", cwd=tmp_path)
    assert result.code == 0, result.err
    text = path.read_text()
    assert max(map(len, text.splitlines()[2:])) <= 120
    lines = text.splitlines()
    bare = {
        line.split()[0] for above, line in pairwise(lines) if re.match(r" +\w+: \S", line) and "#" not in above + line
    }
    assert bare <= {f"{when}_nms_{stage}:" for when in ("pre", "post") for stage in ("train", "test")}  # rpn: says it
    options = resolve("--config", str(path))
    assert (options.model.backbone.frozen_stages, options.model.backbone.norm) == (0, "batch")
    with torch.device("meta"):
        FasterRCNNModule(**(options.model.as_dict() | {"class_names": list(options.data.class_names)}))


def test_pretrained_layers_are_frozen(tmp_path, frcnn, untimed, mini_voc) -> None:
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "weights.pth")
    given = ("--backbone", "mobilenet_v2_c4", "--weights", "weights.pth")
    assert frcnn("init", mini_voc, *given, cwd=tmp_path).code == 0
    backbone = yaml.safe_load((tmp_path / "mini.yaml").read_text())["model"]["backbone"]
    assert backbone == {"name": "mobilenet_v2_c4", "weights": "weights.pth", "frozen_stages": 2, "norm": "frozen"}


def test_classes_of_any_name_are_written_and_pictures_of_left_and_right_are_not_mirrored(
    tmp_path, frcnn, untimed, mini_voc, resolve
) -> None:
    root = Path(shutil.copytree(mini_voc, tmp_path / "data"))
    names = dict(zip(CLASS_NAMES, ("no", "1e3", "a: b # c", "größe", "turn left", "null"), strict=True))
    for path in (root / "Annotations").iterdir():
        path.write_text(re.sub(r"<name>(\w+)", lambda found: f"<name>{names[found[1]]}", path.read_text()))
    result = frcnn("init", "data", *QUICK, cwd=tmp_path)
    assert result.code == 0, result.err
    options = resolve("--config", str(tmp_path / "data.yaml"))
    assert options.data.class_names == sorted(names.values())
    assert options.data.augmentation == "none"


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path, frcnn, untimed, mini_voc) -> None:
    (tmp_path / "mini.yaml").write_text("mine")
    refused = frcnn("init", mini_voc, *QUICK, cwd=tmp_path)
    assert refused.code == 2 and "mini.yaml: is there already; --overwrite true replaces it" in refused.err
    assert (tmp_path / "mini.yaml").read_text() == "mine"
    assert frcnn("init", mini_voc, *QUICK, "--overwrite", "true", cwd=tmp_path).code == 0
    assert (tmp_path / "mini.yaml").read_text().startswith("# frcnn fit --config mini.yaml\n")


def test_broken_data_is_left_out_and_said(tmp_path, frcnn, untimed, broken_dataset) -> None:
    result = frcnn("init", broken_dataset.root, "--output", "x.yaml", *QUICK, cwd=tmp_path)
    assert result.code == 0, result.err
    text = (tmp_path / "x.yaml").read_text()
    assert yaml.safe_load(text)["data"]["on_error"] == "skip"
    assert "leaves out what cannot be used" in text and "1 truncated_image" in re.sub(r"[\s│]+", " ", result.out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("no_such",), "no_such: no such folder"),
        ((".", "--val_fraction", 1.5), "--val_fraction 1.5: must be between 0 and 1"),
        ((".", "--output", "x.txt"), "--output x.txt: the name must end with .yaml"),
        ((".",), "holds no annotations in a known format"),
    ],
)
def test_bad_input_is_one_line(tmp_path, frcnn, given, message) -> None:
    result = frcnn("init", *given, cwd=tmp_path)
    assert result.code == 2 and message in result.err
    assert len(result.err.splitlines()) == 1
