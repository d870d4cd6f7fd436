"""`frcnn mini-voc`: write a small synthetic dataset."""

from datamodules.mini_voc.writer import write_mini_voc
from experiments.dataset.options import MiniVocOptions


def mini_voc(options: MiniVocOptions) -> None:
    """Write the dataset, and print where it is."""
    folder = write_mini_voc(options.out_dir, options.images, options.seed)
    print(f"{options.images} images in {folder} (splits train, val, trainval, test)")
