"""Datasets of a few small images, data modules over them, and single samples."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.augmentation.samples import Sample
from datamodules.voc.datamodule import VOCDataModule
from datamodules.voc.format import Annotation, VOCObject, write_annotation


@pytest.fixture(scope="session")
def write_image() -> Callable[..., Path]:
    """`write_image(folder, name, size=(32, 24), mode="RGB")`: noise that depends on the name, in folder/JPEGImages."""

    def write(folder: Path, name: str, size: tuple[int, int] = (32, 24), mode: str = "RGB") -> Path:
        path = folder / "JPEGImages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, name))
        bands = len(Image.new(mode, (1, 1)).getbands())
        pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], bands), np.uint8).squeeze()
        Image.fromarray(pixels, mode).save(path, **({"quality": 95} if name.endswith("jpg") else {}))
        return path

    return write


@pytest.fixture(scope="session")
def annotate() -> Callable[..., Path]:
    """`annotate(folder, stem, *objects, size=(32, 24))`: the annotation of an image, in folder/Annotations."""

    def write(folder: Path, stem: str, *objects: VOCObject, size: tuple[int, int] = (32, 24)) -> Path:
        path = folder / "Annotations" / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_annotation(Annotation(f"{stem}.jpg", *size, objects), path)
        return path

    return write


@pytest.fixture(scope="session")
def write_split() -> Callable[[Path, str, Iterable[str]], None]:
    """`write_split(folder, name, stems)`: a list of images, in folder/ImageSets/Main."""

    def write(folder: Path, name: str, stems: Iterable[str]) -> None:
        path = folder / "ImageSets" / "Main" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in stems))

    return write


@pytest.fixture
def plain(
    tmp_path: Path,
    write_image: Callable[..., Path],
    annotate: Callable[..., Path],
    write_split: Callable[[Path, str, Iterable[str]], None],
) -> Path:
    """A dataset of ten images. train: i00..i09, each with its own cat (i03 without objects, i04 with a difficult dog
    too); val: i07..i09."""
    folder = tmp_path / "plain"
    stems = [f"i{number:02}" for number in range(10)]
    dog = VOCObject("dog", (0.0, 0.0, 1.0, 1.0), difficult=True)
    for number, stem in enumerate(stems):
        objects = [VOCObject("cat", (float(number), 3.0, number + 6.0, 9.0))]
        write_image(folder, f"{stem}.jpg")
        annotate(folder, stem, *([] if number == 3 else objects + [dog] * (number == 4)))
    write_split(folder, "train", stems)
    write_split(folder, "val", stems[7:])
    return folder


@pytest.fixture(scope="session")
def voc_data() -> Callable[..., VOCDataModule]:
    """`voc_data(root, **changes)`: a data module over the splits train and val, which may overlap, without workers."""

    def make(root: Path, **changes: Any) -> VOCDataModule:
        arguments = {"root": str(root), "train_splits": ["train"], "val_splits": ["val"], "num_workers": 0}
        return VOCDataModule(**arguments | {"allow_overlap": True} | changes)

    return make


@pytest.fixture(scope="session")
def sample_of() -> Callable[..., Sample]:
    """`sample_of(boxes, image=None)`: objects of the classes 1, 2, 3 ..., the even ones difficult, in an image of
    60 x 97 whose left third is brighter than the rest."""

    def make(boxes: Sequence[Sequence[float]], image: np.ndarray | None = None) -> Sample:
        if image is None:
            image = np.full((60, 97, 3), 60, np.uint8)
            image[:, : 97 // 3] = 180
        labels = np.arange(1, len(boxes) + 1)
        return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), labels, labels % 2 == 0)

    return make
