"""`frcnn predict`: image files -> annotated images, predictions.json, and labels for other tools."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import detector
from datamodules.image_files import FoundImages, find_images
from datamodules.parallel import stopped_by_sigterm
from detector.errors import InputError, printable
from detector.files import program_of, write_whole
from detector.metrics.class_subset import chosen_classes
from detector.training.progress_line import watched
from detector.use.drawing import is_saved_picture, save_picture
from detector.use.loading import ahead, checkpoint_of, chunks
from detector.use.pixels import pixels_of
from experiments.run.checks import check_devkit_names
from experiments.run.host_memory import keep_freed_memory
from experiments.run.options import PredictOptions
from experiments.run.precision import accelerator_kind, check_precision, resolve_precision
from experiments.run.prediction_files import JOURNAL, PREDICTIONS, Journal, check_output, picture_names

AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "16": torch.float16}


def predict(options: PredictOptions) -> int:
    """Detect objects in images; see `frcnn predict --help`.

    Returns:
        The exit status: 1 if something had to be left out, images that cannot be read or files that cannot be written.
        Each is named on stderr.

    Raises:
        InputError: A missing or unreadable checkpoint, no image, or an output folder in which something of the user's
            would be overwritten.
    """
    check_precision(options.precision, "--precision")
    target = Path(options.output)
    found = find_images(
        options.images, lambda path: _is_below(path, target) and is_saved_picture(path), options.max_images
    )
    pictures = picture_names(found.names)
    trained = _detector(options)
    names = list(trained.class_names.values())
    if options.classes is not None:
        chosen_classes(options.classes, names)
    if "devkit" in options.save:
        check_devkit_names(names)
    check_output(target, Path(options.images), found, pictures, options.save)
    keep_freed_memory(trained.device)
    journal = Journal(target / JOURNAL, _origin(options, found))
    if journal.next:
        print(f"going on after {journal.next} of {len(found.names)} images", file=sys.stderr)
    ended = False
    try:
        with stopped_by_sigterm() as check:
            _detect_all(options, trained, found, pictures, journal, check)
        ended = True
    finally:
        if ended or journal.done:
            if "yolo" in options.save:
                write_whole(target / "classes.txt", "".join(f"{name}\n" for name in names).encode())
            journal.write(target, options.save, names)
        journal.close(remove=ended)
        left_out = found.left_out | {found.names[number]: text for number, text in journal.left_out.items()}
        _say_what_is_left_out(left_out, found.folder)
        if not ended:
            kept = f"; {PREDICTIONS} holds these" if journal.done and "json" in options.save else ""
            print(f"stopped after {journal.done} of {len(found.names)} images{kept}", file=sys.stderr)
    print(
        f"{journal.done} images, {journal.drawn} detections drawn (score >= {options.score_threshold:g}), in "
        f"{printable(target)}" + (f"; {len(left_out)} left out" if left_out else "")
    )
    if journal.highest and not journal.drawn:
        print(
            f"the highest score is {journal.highest:.3g}: --score_threshold {journal.highest / 2:.1g} draws something"
        )
    return int(bool(left_out))


def _detect_all(
    options: PredictOptions,
    trained: detector.TrainedDetector,
    found: FoundImages,
    pictures: Sequence[str],
    journal: Journal,
    check: Callable[[], None],
) -> None:
    """Detect in all images that are not in the journal yet, and write what is found in each."""

    def read(image: Path | NDArray[np.uint8]) -> Tensor | InputError:
        try:
            return pixels_of(image, trained.reading)
        except InputError as error:
            return error

    first, total = journal.next, len(found.names) - journal.next
    images = ahead(read, found.from_number(first), options.num_workers)
    numbers = iter(range(first, len(found.names)))
    for batch in chunks(watched(images, total, "prediction", "images"), options.batch_size):
        readable = [image for image in batch if isinstance(image, Tensor)]
        results = iter(trained.detect(readable) if readable else [])
        for image in batch:
            number = next(numbers)
            if isinstance(image, InputError):
                journal.add(number, None, missing=str(image))
                continue
            one = replace(trained.detections(next(results), image, image), file_name=found.names[number])
            one = one if options.classes is None else one.of(*options.classes)
            drawn = one.above(options.score_threshold)
            missing = _save(options, drawn, pictures[number])
            journal.add(number, one.to_coco(number), len(drawn), missing)
        check()


def _save(options: PredictOptions, found: detector.Detections, picture: str) -> str:
    """Write the files of one image, and return what went wrong."""
    target = Path(options.output)
    try:
        if "images" in options.save:
            save_picture(found.drawn(0.0), target / picture)
        if "voc" in options.save:
            write_whole((target / "Annotations" / picture).with_suffix(".xml"), found.to_voc().encode())
        if "yolo" in options.save:
            write_whole((target / "labels" / picture).with_suffix(".txt"), found.to_yolo().encode())
    except OSError as error:
        return f"its picture cannot be written ({error.strerror or error})"
    except ValueError as error:  # a file appeared meanwhile, or a name that no XML can hold
        return str(error)
    return ""


def _origin(options: PredictOptions, found: FoundImages) -> Mapping[str, Any]:
    """Return what must be the same where a prediction goes on: the images, and all options that results depend on."""
    given = asdict(options)
    for name in ("output", "batch_size", "num_workers", "accelerator"):
        del given[name]
    digest = hashlib.sha256("\0".join(found.names).encode(errors="surrogateescape")).hexdigest()
    checkpoint = (program_of(options.ckpt_path) or checkpoint_of(options.ckpt_path)).stat()
    changed = [checkpoint.st_size, checkpoint.st_mtime_ns]
    return json.loads(json.dumps({"frcnn predict": given, "checkpoint": changed, "images": digest}))  # type: ignore[no-any-return]


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _detector(options: PredictOptions) -> detector.TrainedDetector:
    accelerator, precision = options.accelerator, options.precision
    if program_of(options.ckpt_path) is not None:
        accelerator = "cpu" if accelerator == "auto" else accelerator
        precision = "32-true" if precision == "auto" else precision
    device = accelerator_kind(accelerator)
    precision = str(resolve_precision(precision, accelerator, 1, option="--precision"))
    if precision not in AUTOCAST and precision not in ("32", "32-true"):
        raise InputError(f"--precision {precision}: there are 32-true, bf16-mixed, 16-mixed and auto")
    autocast = AUTOCAST.get(precision)
    if autocast == torch.float16 and device == "cpu":
        autocast = torch.bfloat16  # as Lightning
    return detector.load(
        options.ckpt_path,
        device,
        flip=options.flip,
        shortest_sides=options.shortest_sides,
        bit_depth=options.data.bit_depth,
        max_pixels=options.data.max_pixels,
        autocast=autocast,
        tile=options.tile or 0,
        tile_overlap=options.tile_overlap,
    )


def _say_what_is_left_out(left_out: Mapping[str, str], folder: Path) -> None:
    for name, reason in left_out.items():
        place = str(folder / name)
        print(f"left out: {printable(reason if place in reason else f'{place}: {reason}')}", file=sys.stderr)
