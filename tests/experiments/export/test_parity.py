"""Every format beside the detector in PyTorch, on genuine images and a blank one.

FRCNN_PARITY_RUNS names folders of finished runs with hard NMS, with `:` between them, which are exported, too.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from detector.errors import InputError
from detector.files import PROGRAMS
from detector.training.lightning_module import FasterRCNNModule
from detector.use.exported import RUNTIMES, ExportedDetector
from detector.use.loading import checkpoint_of
from detector.use.reading import read_image
from experiments.benchmark.models import CLASSES, build_network, set_background_score, standard_network
from experiments.export.command import compare
from experiments.export.programs import check_writable, write_program

RUNS = [Path(name) for name in os.environ.get("FRCNN_PARITY_RUNS", "").split(os.pathsep) if name]
SIZES = ((256, 341), (300, 256), (256, 400))

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


@pytest.fixture(scope="module")
def images(genuine_voc) -> list[Tensor]:
    """Twenty genuine images, twelve of them in three sizes, the others in their own; and a blank one."""
    found = list[Tensor]()
    for number, path in enumerate(sorted(genuine_voc("voc2012-subset.tar").rglob("*.jpg"))[:20]):
        image = torch.from_numpy(read_image(path, upright=True)).permute(2, 0, 1)
        found.append(resized(image, SIZES[number % 3]) if number < 12 else image)
    return [*found, torch.zeros(3, 256, 300, dtype=torch.uint8)]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()


@pytest.fixture(scope="module")
def described(images):
    """A detector of random weights whose features and scores vary in these images as those of trained ones do, and what
    is to be known of it.

    Deeper networks with random weights amplify rounding errors: to 2e-4 in logits and 0.02 pixels, of either side from
    what float64 gives.
    """
    known = standard_network("vgg16", SIZES[0])
    network = replace(known, name="mobilenet_v2_c4", backbone=replace(known.backbone, name="mobilenet_v2_c4"))
    alike = [resized(image, SIZES[0]) for image in images[:5]]
    model, _ = build_network(network, (alike, []))
    set_background_score(model, alike)
    about = {
        "class_names": [str(number) for number in range(CLASSES)],
        "image": asdict(network.image) | {"shortest_side": network.image.shortest_side[0]},
        "bit_depth": 16,
        "options": {"roi": asdict(network.roi)},
    }
    return model, about


@pytest.mark.parametrize("format", PROGRAMS)
def test_detections_are_the_same(described, images, format, needs_packages_of, tmp_path):
    """Exported with two images of 160x224; in batches of one, two and five: as many detections, in the same places."""
    needs_packages_of(format)
    model, about = described
    write_program(model, format, tmp_path, about)
    check(model, ExportedDetector(tmp_path / PROGRAMS[format]), images)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_finished_run(run, images, read_without_torch, frcnn, tmp_path):
    """In each format that is installed: detections as above, those of the reader, and AP on the run's own images."""
    formats: list[str] = []
    for name in PROGRAMS:
        with suppress(InputError):
            check_writable(name)
            formats.append(name)
    model, names = FasterRCNNModule.from_checkpoint(checkpoint_of(run)).model, []
    for number, image in enumerate(images):
        names.append(f"{number}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / names[-1])
    for format in formats:
        exported = frcnn("export", run.absolute(), "--format", format, "--output", format, cwd=tmp_path)
        assert exported.code == 0, exported.err
        check(model, ExportedDetector(tmp_path / format / PROGRAMS[format]), images, run.name, format)
        if format in RUNTIMES:
            told = iter(read_without_torch(tmp_path / format, names, tmp_path))
            shown = (run.name, format, "reader")
            check(model, lambda _, told=told: [next(told)], images, *shown, starts=range(22))
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    where = ("--data.root", Path(data["root"]).absolute(), "--data.val_splits", json.dumps(data["val_splits"]))
    told = frcnn("evaluate", run.absolute(), *formats, *where, "--format", "json", cwd=tmp_path)
    assert told.code == 0, told.err  # a relative data.root is one in the working directory
    ours, *others = json.loads(told.out)["evaluations"]
    assert ours["AP50"] > 0
    for metric in ("AP50_voc07", "AP50_voc", "AP50", "AP", "AP75", "detections"):
        print(run.name, metric, ours[metric], *(other[metric] for other in others))
        if metric != "detections":
            assert [other[metric] for other in others] == pytest.approx([ours[metric]] * len(formats), abs=1e-4)


def check(model, other, images: list[Tensor], *shown: str, starts: Sequence[int] = (0, 1, 3, 8, 9, 14, 16, 21)) -> None:
    like = compare(model, other, [images[start:end] for start, end in pairwise(starts)])
    print(*shown, like.text(made_up=False))
    assert like.images == 21 and like.detections > 100
    assert like.others == 0, like.text(made_up=False)
