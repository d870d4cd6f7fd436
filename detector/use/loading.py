"""`detector.load`: a trained detector from a run, a checkpoint or an exported file, called with images of any kind."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast, overload

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detector.errors import InputError, brief, listed, value_text
from detector.files import WEIGHTS, program_of
from detector.training.lightning_module import FasterRCNNModule
from detector.use.detections import Detections
from detector.use.exported import ExportedDetector
from detector.use.pixels import Picture, pixels_of, several
from detector.use.reading import USUAL, Reading
from detector.use.tiles import check_tiles, detect_in_tiles

CHECKPOINTS: Final = ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "last.ckpt", "best.ckpt", WEIGHTS)
Item = TypeVar("Item")
Result = TypeVar("Result")


class TrainedDetector:
    """A trained detector: called with images, it returns their detections.

    Args:
        network: The network, or an exported one.
        reading: How images are read: as in its training.
        autocast: Type in which layers compute, such as `torch.bfloat16`; None: float32.
        tile: Sides of the tiles in which larger images are detected; 0: no tiles.
        tile_overlap: Share of a tile that it has in common with its neighbour.

    Attributes:
        class_names: Name of each label, of which the first is 1: `class_names[label]`.
    """

    def __init__(
        self,
        network: FasterRCNNModule | ExportedDetector,
        reading: Reading,
        autocast: torch.dtype | None = None,
        tile: int = 0,
        tile_overlap: float = 0.2,
    ) -> None:
        if tile:
            check_tiles(tile, tile_overlap)
        self.network = network.eval()
        self.reading = reading
        self.autocast = autocast
        self.tile, self.tile_overlap = tile, tile_overlap
        self.class_names: Mapping[int, str] = dict(enumerate(network.class_names, start=1))

    @property
    def module(self) -> FasterRCNNModule:
        """Return the network to look into.

        Raises:
            InputError: It is exported.
        """
        if isinstance(self.network, ExportedDetector):
            raise InputError(f"{self.network.path}: is exported and only detects; give the checkpoint")
        return self.network

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return self.network.device

    def to(self, device: str | torch.device) -> Self:
        """Let it compute on a device, such as "cuda", and return it.

        Raises:
            InputError: There is no such device.
        """
        try:
            self.network.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch is built without CUDA
            raise InputError(f"device {device}: {brief(error)}") from error
        return self

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, images: str | os.PathLike[str] | Image.Image, score_threshold: float = ..., batch_size: int = ...
    ) -> Detections: ...
    @overload
    def __call__(  # one or several, by the number of dimensions
        self, images: NDArray[Any] | Tensor, score_threshold: float = ..., batch_size: int = ...
    ) -> Any: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: Sequence[Picture], score_threshold: float = ..., batch_size: int = ...
    ) -> list[Detections]: ...
    @overload
    def __call__(
        self, images: Iterable[Picture], score_threshold: float = ..., batch_size: int = ...
    ) -> Iterator[Detections]: ...
    def __call__(
        self, images: Picture | Iterable[Picture], score_threshold: float = 0.0, batch_size: int = 1
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Detect objects in an image, or in several.

        >>> import detector
        >>> from PIL import Image
        >>> d = detector.load("experiments/weights/mini_voc.ckpt")
        >>> found = d("photo.jpg", score_threshold=0.5)
        >>> found.names == d(Image.open("photo.jpg")).above(0.5).names
        True
        >>> for found in d((path for path in ["photo.jpg", "photo.jpg"]), 0.5, batch_size=2):
        ...     print(len(found))
        4
        4

        Args:
            images: A path, an image of Pillow's, a NumPy array (H, W, 3), (H, W, 4) or (H, W), or a tensor (3, H, W);
                uint8, uint16, or floats in 0..1 or 0..255. Or several: an array or tensor of four dimensions, a list,
                or another iterable, such as a generator.
            score_threshold: Detections below are left out; by default those that the network itself leaves out.
            batch_size: Images at a time.

        Returns:
            Detections of a single image; a list of them for a list, an array or a tensor of several; for other
            iterables an iterator, which reads images as it goes.

        Raises:
            InputError: An image cannot be read, or is none.
        """
        many = several(images)
        if many is None:
            return next(self._each([cast(Picture, images)], score_threshold, 1))
        each = self._each(many, score_threshold, batch_size)
        return list(each) if isinstance(many, Sequence) else each

    def _each(self, images: Iterable[Picture], score_threshold: float, batch_size: int) -> Iterator[Detections]:
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: must be at least 1")

        def read(image: Picture) -> tuple[Picture, Tensor]:
            return image, pixels_of(image, self.reading)

        for batch in chunks(ahead(read, images, 1), batch_size):
            found = self.detect([pixels for _, pixels in batch])
            for (image, pixels), one in zip(batch, found, strict=True):
                yield self.detections(one, pixels, image).above(score_threshold)

    def detections(self, found: Mapping[str, Tensor], pixels: Tensor, image: Picture) -> Detections:
        """Return what `detect` found in the pixels of an image; the pixels of a file are not kept."""
        height, width = pixels.shape[-2:]
        columns = found["boxes"], found["scores"], found["labels"]
        name = Path(image).name if isinstance(image, str | os.PathLike) else ""
        kept = image if name else pixels
        return Detections(*columns, self.class_names, (height, width), kept, name, self.reading)

    def detect(self, pixels: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return `boxes`, `labels` and `scores`, on the CPU, of a batch of images, each (3, H, W) uint8 RGB."""
        if not self.tile or max(max(image.shape[-2:]) for image in pixels) <= self.tile:
            return self._detect(pixels)
        network = self.network
        config = network.roi if isinstance(network, ExportedDetector) else network.model.roi_heads.config
        options = self.tile, self.tile_overlap, len(pixels), config
        return [detect_in_tiles(self._detect, image, *options) for image in pixels]

    def _detect(self, pixels: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        device = self.device
        with torch.inference_mode(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            found = self.network([image.to(device, non_blocking=True) for image in pixels])
        return [{key: value.cpu() for key, value in one.items()} for one in found]


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    flip: bool = False,
    shortest_sides: Sequence[int] | None = None,
    bit_depth: int | None = None,
    max_pixels: int = USUAL.max_pixels,
    autocast: torch.dtype | None = None,
    tile: int = 0,
    tile_overlap: float = 0.2,
) -> TrainedDetector:
    """Load a trained detector.

    >>> import detector
    >>> d = detector.load("experiments/weights/mini_voc.ckpt", device="cpu")
    >>> d.class_names[1]
    'cross'

    Args:
        path: A run's folder, of which the last checkpoint is taken, a checkpoint, or what `frcnn export` wrote, a file
            or its folder.
        device: Where it computes; by default a GPU where there is one. Exported programs compute on the CPU, in
            float32.
        flip: Also detect on the mirrored image, and merge.
        shortest_sides: Detect at several sizes, and merge.
        bit_depth: Bits of the values in 16-bit images; by default those of the training.
        max_pixels: Images with more pixels are refused, before they are decoded.
        autocast: Type in which layers compute, such as `torch.bfloat16`; by default float32.
        tile: Detect in larger images tile by tile, each so many pixels high and wide, and merge.
        tile_overlap: Share of a tile that it has in common with its neighbour; objects should not be larger.

    Raises:
        InputError: There is no such checkpoint or device, or the checkpoint is damaged or not one of `frcnn fit`, or an
            option cannot be of an exported program.
    """
    program = program_of(Path(path))
    if program is not None:
        for key, value in {"flip": flip, "shortest_sides": shortest_sides, "autocast": autocast}.items():
            if value:
                raise InputError(f"{key} {value_text(value)}: {program} is exported and cannot; give the checkpoint")
    module = FasterRCNNModule.from_checkpoint(checkpoint_of(path)) if program is None else ExportedDetector(program)
    if isinstance(module, FasterRCNNModule) and (flip or shortest_sides):
        image = module.model.image_config
        sides = list(shortest_sides or image.test_shortest_sides)
        module.model.image_config = replace(image, test_flip=flip or image.test_flip, test_shortest_sides=sides)
    reading = Reading(module.bit_depth if bit_depth is None else bit_depth, max_pixels)
    found = TrainedDetector(module, reading, autocast, tile, tile_overlap)
    return found.to(device or ("cuda" if program is None and torch.cuda.is_available() else "cpu"))


def checkpoint_of(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a path names: of a run's folder the last one.

    Raises:
        InputError: The folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in CHECKPOINTS if (path / name).is_file()), None)
    if found is None:
        runs = sorted(str(one.parent.parent) for one in path.glob(f"*/{CHECKPOINTS[0]}"))
        raise InputError(f"{path}: holds no {CHECKPOINTS[0]}" + (f"; there are {listed(runs)}" if runs else ""))
    return found


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield what a function returns for each item, computed in threads a little before it is asked for."""
    if not threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[Future[Result]]()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of a size; the last one may be shorter."""
    source = iter(items)
    return iter(lambda: list(islice(source, size)), [])
