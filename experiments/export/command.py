"""`frcnn export`: a trained detector as files that run elsewhere, compared with it, and what is to be known of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from datamodules.image_files import find_images
from detector.errors import printable, value_text
from detector.faster_rcnn import FasterRCNN
from detector.files import ABOUT, write_json, write_whole
from detector.training.checkpoint_content import read_checkpoint
from detector.training.lightning_module import FasterRCNNModule
from detector.use.exported import RUNTIMES, ExportedDetector
from detector.use.loading import checkpoint_of, chunks
from detector.use.reading import Reading, read_image
from experiments.benchmark.models import make_images
from experiments.export.card import about_detector, card, reader, run_of
from experiments.export.network import check_exportable, say_own_parts
from experiments.export.options import CARD, CONFIG, FILES, READER, ExportOptions
from experiments.export.programs import check_writable, write_program
from experiments.export.quantization import CALIBRATED, Quantization
from experiments.export.zoo import config_of, write_weights
from experiments.output import writing


def export(options: ExportOptions) -> int:
    """Write a detector in a format, and its class names, reader and card beside it; see `frcnn export --help`.

    Returns:
        The exit status: 1 if the file does not detect what the detector does.

    Raises:
        InputError: There is no whole checkpoint, a package is missing, or the detector cannot be exported.
    """
    format, folder = options.format, Path(options.output)
    check_writable(format)
    path = checkpoint_of(options.run)
    run = run_of(path)
    module = FasterRCNNModule.from_checkpoint(path, **({"nms": "hard"} if options.hard_nms else {}))
    content = read_checkpoint(path)
    about, own_nms = about_detector(module, path, content), content["hyper_parameters"]["roi"].get("nms", "hard")
    target, same, checked = folder / FILES[format], True, ""
    quantization = Quantization(options, path) if options.int8 else None
    if format == "safetensors":
        with writing(str(target)):
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(module, target, about)
            write_whole(folder / CONFIG, config_of(about).encode())
    else:
        check_exportable(module.model)
        say_own_parts(module.hparams)
        images = _images(options.images, module)
        with writing(str(target)):
            folder.mkdir(parents=True, exist_ok=True)
            write_program(module.model, format, folder, about)
        likeness = compare(module.model, ExportedDetector(target), [images[:1], *chunks(images[1:], 2)])
        same, checked = likeness.same, likeness.text(made_up=options.images is None)
        if quantization is not None:
            given = [] if options.images is None else _images(options.images, module, CALIBRATED)
            with writing(str(target)):
                checked += "\n" + quantization.quantize(target, given)
    if own_nms != module.model.roi_heads.config.nms:
        checked += f"\nNMS is hard here, {value_text(own_nms)} in the run, whose metrics are those of the latter."
    with writing(str(folder)):
        write_json(folder / ABOUT, about)
        if format in RUNTIMES:
            write_whole(folder / READER, reader(RUNTIMES[format], FILES[format]).encode())
        write_whole(folder / CARD, card(format, about, run, checked, options.license).encode())
    more = f", {CONFIG}" if format == "safetensors" else f", {READER}" if format in RUNTIMES else ""
    print(f"{printable(target)}: {target.stat().st_size / 1e6:.0f} MB; beside it {ABOUT}, {CARD}" + more)
    if checked:
        print(checked.strip())
    return int(not same)


def _images(path: str | None, module: FasterRCNNModule, most: int = 20) -> list[Tensor]:
    """Return the first images of a folder, or ones made of noise, in three sizes."""
    if path is None:
        side = module.model.image_config.shortest_side[-1]
        sizes = [(side, side * 4 // 3), (side * 3 // 2, side), (side, side)]
        device = torch.device("cpu")
        return [image for size in sizes for image in make_images(size, 2, 4, device)[0]]
    reading = Reading(module.bit_depth)
    pictures = islice(find_images(path).from_number(0), most)
    pixels = (read_image(one, True, reading) if isinstance(one, Path) else one for one in pictures)
    return [torch.from_numpy(one).permute(2, 0, 1) for one in pixels]


@dataclass
class Likeness:
    """Hold how alike the detections of two detectors on the same images are.

    Attributes:
        images: How many.
        detections: Of the first detector.
        others: Detections of either without one of the other: of its label and score, within 0.01 pixel.
        score: The largest difference of scores of those that belong together.
        box: The same of corners, in pixels.
    """

    images: int = 0
    detections: int = 0
    others: int = 0
    score: float = 0.0
    box: float = 0.0

    @property
    def same(self) -> bool:
        """Return whether both detect the same: boxes within 0.01 pixel, scores within 1e-4."""
        return self.others == 0

    def text(self, made_up: bool) -> str:
        """Return a line that says it."""
        kind = "made-up images" if made_up else "images"
        said = f"Compared with the detector in PyTorch on {self.images} {kind}, {self.detections} detections: "
        said += f"boxes differ by up to {self.box:.1g} pixels, scores by up to {self.score:.1g}."
        return said + (f" {self.others} detections are not in both." if self.others else "")


def compare(model: FasterRCNN, other: ExportedDetector, batches: Iterable[Sequence[Tensor]]) -> Likeness:
    """Return how alike the detections of a detector and of its exported file are, in batches of images."""
    like = Likeness()
    with torch.inference_mode():
        for batch in batches:
            for ours, theirs in zip(model(batch)[0], other(batch), strict=True):
                like.images, like.detections = like.images + 1, like.detections + len(ours["boxes"])
                _add(like, ours, theirs)
    return like


def _add(like: Likeness, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Match the detections of an image one to one, each to the nearest of its label and score."""
    box = (ours["boxes"][:, None] - theirs["boxes"][None]).abs().amax(2)
    score = (ours["scores"][:, None] - theirs["scores"][None]).abs()
    fits = (ours["labels"][:, None] == theirs["labels"][None]) & (box <= 1e-2) & (score <= 1e-4)
    taken: set[int] = set()
    for row in range(len(box)):
        near = [column for column in torch.where(fits[row])[0].tolist() if column not in taken]
        if near:
            best = min(near, key=lambda column: float(box[row, column]))
            taken.add(best)
            like.box = max(like.box, float(box[row, best]))
            like.score = max(like.score, float(score[row, best]))
    like.others += len(box) - len(taken) + len(theirs["boxes"]) - len(taken)
