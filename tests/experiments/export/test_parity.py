"""Every format beside the detector in PyTorch, on genuine images and a blank one."""

import os
import tarfile
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from detector.files import PROGRAMS
from detector.use.exported import ExportedDetector
from detector.use.reading import read_image
from experiments.benchmark.models import CLASSES, Network, build_network, set_background_score, standard_network
from experiments.export.command import compare
from experiments.export.programs import write_program

ROOT = Path(__file__).resolve().parents[3]
ARCHIVE = Path(os.environ.get("FRCNN_SHARED_DATA") or ROOT.parent / "shared" / "data") / "voc2012-subset.tar"
NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch_export": (),
}
SIZES = ((256, 341), (300, 256), (256, 400))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_data,
    pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"there is no {ARCHIVE} (FRCNN_SHARED_DATA names another folder)"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Tensor]:
    """Twenty genuine images, twelve of them in three sizes, the others in their own; and a blank one."""
    folder, found = tmp_path_factory.mktemp("genuine"), list[Tensor]()
    with tarfile.open(ARCHIVE) as archive:
        members = sorted((one for one in archive if one.name.endswith(".jpg")), key=lambda one: one.name)[:20]
        archive.extractall(folder, members, filter="data")
    for number, member in enumerate(members):
        image = torch.from_numpy(read_image(folder / member.name, upright=True)).permute(2, 0, 1)
        found.append(resized(image, SIZES[number % 3]) if number < 12 else image)
    return [*found, torch.zeros(3, 256, 300, dtype=torch.uint8)]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()


def network_of(name: str) -> Network:
    if name != "mobilenet_v2_c4":
        return standard_network(name, SIZES[0])
    known = standard_network("vgg16", SIZES[0])
    return replace(known, name=name, backbone=replace(known.backbone, name=name))


@pytest.fixture(scope="module", params=["mobilenet_v2_c4"])
def network(request, images):
    """A network and its detector, whose features and scores vary in these images as those of trained ones do.

    Deeper networks with random weights amplify rounding errors: to 2e-4 in logits and 0.02 pixels, of either side from
    what float64 gives.
    """
    network = network_of(request.param)
    alike = [resized(image, SIZES[0]) for image in images[:5]]
    model, _ = build_network(network, (alike, []))
    set_background_score(model, alike)
    return network, model


@pytest.mark.parametrize("format", PROGRAMS)
def test_detections_are_the_same(network, images, format, tmp_path):
    """Exported with two images of 160x224; in batches of one, two and five: as many detections, in the same places."""
    for package in NEEDS[format]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    network, model = network
    about = {
        "class_names": [str(number) for number in range(CLASSES)],
        "image": asdict(network.image) | {"shortest_side": network.image.shortest_side[0]},
        "bit_depth": 16,
        "options": {"roi": asdict(network.roi)},
    }
    write_program(model, format, tmp_path, about)
    other = ExportedDetector(tmp_path / PROGRAMS[format])
    starts = (0, 1, 3, 8, 9, 14, 16, 21)
    like = compare(model, other, [images[start:end] for start, end in pairwise(starts)])
    assert like.images == 21 and like.detections > 100
    assert like.others == 0, like.text(made_up=False)
