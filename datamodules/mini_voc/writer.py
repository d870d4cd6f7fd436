"""MiniVOC: a small synthetic detection dataset in PASCAL VOC format, drawn instead of downloaded.

It is the default data of the project: real JPEG files, real VOC XML, real split files, made in seconds and identical
for everyone who asks for the same number of images and the same seed (with the same versions of NumPy and Pillow).
What the images show is drawn in `scene.py`; this module writes the files.

Image `index` depends on `(seed, index)` only: a larger dataset of the same seed begins with the images of the smaller
one, in the same splits.
"""

import json
import os
import shutil
import uuid
from pathlib import Path

from PIL import Image

from datamodules.mini_voc.scene import CLASS_NAMES, LONG_SIDE, OBJECT_SIZE, SHORT_SIDE, VERSION, SceneObject, draw_scene
from datamodules.voc.format import Annotation, VOCObject, write_annotation
from detector.errors import InputError

MANIFEST = "mini_voc.json"
MIN_IMAGES = 5
JPEG_QUALITY = 90
# Assigning by position keeps every prefix close to 60/20/20 and an image in its split whatever the number of images.
_SPLIT_PATTERN = ("train", "val", "train", "test", "train")


def write_mini_voc(out_dir: str | Path, images: int = 300, seed: int = 0) -> Path:
    """Write the dataset folder `out_dir/{JPEGImages,Annotations,ImageSets/Main}` and return its path.

    The splits `train`, `val`, `test` hold about 60, 20 and 20 percent of the images; `trainval` is the first two
    together. A folder that already holds the same MiniVOC is left as it is.

    Raises:
        InputError: For fewer than 5 images, a negative seed, a place that cannot be written to, and a folder that holds
            anything else, another MiniVOC included, which is never overwritten.
    """
    if images < MIN_IMAGES:
        raise InputError(f"images must be at least {MIN_IMAGES} so that every split gets one, got {images}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    target = Path(out_dir)
    manifest = _manifest(images, seed)
    if _is_written(target, manifest):
        return target
    final = target.resolve()  # a link to an empty folder is filled, not replaced
    draft = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        draft.mkdir(parents=True)
        _write_files(draft, images, seed)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _move(draft, final, manifest)
    except OSError as error:
        raise InputError(f"cannot write MiniVOC to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def split_names(images: int) -> dict[str, list[str]]:
    """Return the image names (without suffix) of each of the splits `train`, `val`, `trainval`, `test`."""
    splits: dict[str, list[str]] = {"train": [], "val": [], "trainval": [], "test": []}
    for index in range(images):
        split = _SPLIT_PATTERN[index % len(_SPLIT_PATTERN)]
        splits[split].append(image_name(index))
        if split != "test":
            splits["trainval"].append(image_name(index))
    return splits


def image_name(index: int) -> str:
    """Return the name of the image with a 0-based index: `mini_000001` for 0."""
    return f"mini_{index + 1:06d}"


def _manifest(images: int, seed: int) -> dict[str, object]:
    return {
        "format": "MiniVOC",
        "version": VERSION,
        "images": images,
        "seed": seed,
        "class_names": list(CLASS_NAMES),
        "long_side": list(LONG_SIDE),
        "short_side": list(SHORT_SIDE),
        "object_size": list(OBJECT_SIZE),
    }


def _is_written(target: Path, manifest: dict[str, object]) -> bool:
    """Return True if the same MiniVOC is there, False if the place is free.

    Raises:
        InputError: The place is taken by anything else.
    """
    if not target.exists():
        return False
    if not target.is_dir():
        raise InputError(f"{target} is a file; choose a folder for MiniVOC")
    if not any(target.iterdir()):
        return False
    try:
        found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != "MiniVOC":
        raise InputError(f"{target} is not empty and is no MiniVOC; choose another folder")
    if found != manifest:
        keys = ("version", "images", "seed")
        has, wanted = (", ".join(f"{key} {values.get(key)}" for key in keys) for values in (found, manifest))
        raise InputError(f"{target} holds another MiniVOC ({has}; wanted {wanted}); choose another folder or delete it")
    jpegs, xmls = (len(list(target.glob(pattern))) for pattern in ("JPEGImages/*.jpg", "Annotations/*.xml"))
    if not jpegs == xmls == manifest["images"]:
        raise InputError(
            f"{target} has {jpegs} images and {xmls} annotations instead of {manifest['images']} each; "
            "delete it to have it written anew"
        )
    return True


def _move(draft: Path, final: Path, manifest: dict[str, object]) -> None:
    """Give the finished folder its name; another process that wrote the same dataset in the meantime is no error."""
    try:
        if final.is_dir() and not any(final.iterdir()):
            final.rmdir()
        os.rename(draft, final)
    except OSError:
        if not _is_written(final, manifest):
            raise


def _write_files(root: Path, images: int, seed: int) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for index in range(images):
        scene, name = draw_scene(seed, index), image_name(index)
        height, width, _ = scene.image.shape
        objects = tuple(_voc_object(placed) for placed in scene.objects)
        # Full chroma resolution: some objects differ from what is behind them in hue more than in brightness.
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
        annotation = Annotation(f"{name}.jpg", width, height, objects, folder="MiniVOC")
        write_annotation(annotation, root / "Annotations" / f"{name}.xml")
    for split, names in split_names(images).items():
        text = "".join(f"{name}\n" for name in names)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text, encoding="utf-8")


def _voc_object(placed: SceneObject) -> VOCObject:
    x1, y1, x2, y2 = (float(value) for value in placed.box)
    return VOCObject(placed.name, (x1, y1, x2, y2), difficult=placed.is_difficult(), truncated=placed.truncated)
