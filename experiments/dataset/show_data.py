"""`frcnn show-data`: a contact sheet of what training is given, without a model."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datamodules.detection_datamodule import DetectionDataModule
from datamodules.detection_dataset import DetectionDataset, Target
from detector.errors import InputError, printable
from detector.use.drawing import class_color, draw_boxes
from experiments.dataset.formats import data_module_of, lists_beside
from experiments.dataset.options import ShowDataOptions
from experiments.output import writing

CELL: Final = 320  # pixels of the longer side of a picture
GAP: Final = 8
TITLE: Final = 22
PAPER: Final = (245, 245, 245)


def show_data(options: ShowDataOptions, config: Namespace) -> None:
    """Write the contact sheet, and print where it is.

    Args:
        options: Of the sheet.
        config: The options of `frcnn fit`, so that its config files and those of runs serve.

    Raises:
        InputError: A bad value, anything wrong with the dataset, or the folder cannot be written to.
    """
    data: DetectionDataModule = data_module_of(config.data_format)(**config.data.as_dict())
    for folder in lists_beside(config):
        data.splits.take_lists(folder)
    data.prepare_data()
    dataset = data.train_dataset
    data.splits.keep()
    if not len(dataset):
        raise InputError("the training splits hold no image")
    indices = np.unique(np.linspace(0, len(dataset) - 1, options.images).round().astype(int)).tolist()
    sheet, stored, drawn = contact_sheet(dataset, indices, options.epochs)
    path = Path(options.output) / f"{_name(data)}.png"
    with writing(f"--output {options.output}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    print(
        f"{path}: {len(indices)} images in {options.epochs} epochs, {drawn / options.epochs:g} objects in an epoch, "
        f"{stored} in the images themselves"
    )


def _name(data: DetectionDataModule) -> str:
    return data.augmentation if isinstance(data.augmentation, str) else "custom"


def contact_sheet(dataset: DetectionDataset, indices: list[int], epochs: int) -> tuple[Image.Image, int, int]:
    """Draw one row for each image: as it is stored, then as it is drawn in each epoch.

    Objects are outlined in the colour of their class, difficult ones dashed. Images are shown at one size each row,
    multiplied by the scale that was drawn, where one was.

    Returns:
        The sheet, the number of objects in the stored images, and the number in all epochs' images.
    """
    rows, stored, drawn = [], 0, 0
    for index in indices:
        sample = dataset.sample(index)
        target = dataset.target(index)
        pixels = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)
        cells = [_cell(pixels, target, dataset.class_names, printable(target["file_name"]))]
        stored += len(target["boxes"])
        for epoch in range(epochs):
            image, target = dataset[epoch, index]
            drawn += len(target["boxes"])
            title = f"epoch {epoch}" + (f", scale {target['scale']:.2f}" if "scale" in target else "")
            cells.append(_cell(image, target, dataset.class_names, title))
        rows.append(cells)
    heights = [max(cell.height for cell in cells) for cells in rows]
    size = ((1 + epochs) * (CELL + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1))
    sheet = Image.new("RGB", size, PAPER)
    top = GAP
    for cells, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(cells):
            sheet.paste(cell, (GAP + column * (CELL + GAP), top))
        top += height + GAP
    return sheet, stored, drawn


def _cell(image: Tensor, target: Target, class_names: list[str], title: str) -> Image.Image:
    """Return a titled picture with boxes, `CELL` pixels wide or high."""
    height, width = image.shape[-2:]
    factor = CELL / max(height, width) * min(1.0, target.get("scale", 1.0))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
    shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    scale = torch.tensor([size[0] / width, size[1] / height] * 2)
    names = [class_names[label - 1] for label in target["labels"].tolist()]
    colors = [class_color(name) for name in names]
    shown = draw_boxes(shown, target["boxes"] * scale, names, colors, dashed=target["difficult"].tolist())
    cell = Image.new("RGB", (CELL, size[1] + TITLE), PAPER)
    cell.paste(Image.fromarray(shown.permute(1, 2, 0).numpy()), (0, TITLE))
    ImageDraw.Draw(cell).text((2, 4), title, fill=(0, 0, 0), font=ImageFont.load_default(size=14))
    return cell
