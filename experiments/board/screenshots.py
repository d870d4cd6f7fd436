"""Pictures of TensorBoard for the README, from a real server in headless Chromium.

`python -m experiments.board.screenshots [GRID]`: without the folder of a grid it trains a small one first, ten minutes
on two CPU cores. All runs of a grid are in its HPARAMS; the other pictures are of its first and of its best run.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import yaml
from PIL import Image

import experiments
from detector.errors import InputError
from experiments.results.runs import read_folder

PACKAGE: Final = Path(experiments.__file__).parent
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
PAGES: Final = {
    "scalars": ("scalars&tagFilter=AP_and_recall%2Fval|val%2Floss$&_smoothingWeight=0", 1060, 720),
    "custom_scalars": ("custom_scalars", 1060, 720),
    "mistakes": ("images&tagFilter=val_mistakes", 1060, 720),
    "anchors": ("images&tagFilter=train_anchors", 1060, 720),
}
"""Address behind the #, width and height of each picture of two runs."""
HPARAMS: Final = ("hparams", 1500, 380)
COLORS: Final = 96
GRID: Final = {
    "base": str(PACKAGE / "mini_voc.yaml"),
    "axes": {
        "scales": {"option": "model.anchors.scales", "values": [[2], [1, 2, 4, 6]]},
        "ratios": {"option": "model.anchors.aspect_ratios", "values": [[1], [0.4, 1, 2.5]]},
    },
    "seeds": [0],
    "overrides": {"trainer.max_epochs": 8, "trainer.check_val_every_n_epoch": 1, "data.root": "mini_voc"},
}


def main() -> int:
    """Take the pictures; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=PACKAGE / "pictures")
    options = parser.parse_args()
    try:
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            raise InputError(f"none of {', '.join(BROWSERS)} is installed; apt-get install chromium gives the first")
        options.output.mkdir(parents=True, exist_ok=True)  # before the grid is trained
        with tempfile.TemporaryDirectory() as folder:
            take_pictures(options.grid or train_grid(Path(folder)), Path(folder) / "two_runs", browser, options.output)
    except InputError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return 2
    return 0


def train_grid(folder: Path) -> Path:
    """Train a small grid of anchors in a folder, and return the grid's own."""
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    for command in ("mini-voc mini_voc --images 700", "ablate grid.yaml --jobs 1"):
        subprocess.run([sys.executable, "-m", "experiments.cli", *command.split()], cwd=folder, check=True)
    return folder / "runs/grid"


def take_pictures(grid: Path, two: Path, browser: str, output: Path) -> None:
    """Write `tensorboard_<page>.png` of a grid; `two` becomes a folder with its first and its best run.

    Raises:
        InputError: There are no two finished runs.
    """
    cells = [cell for cell in read_folder(grid).cells if cell.done]
    best = max(cells, key=lambda cell: cell.done[0].metric("AP50_voc07", "val") or 0, default=None)
    if best in (None, cells[0]):
        raise InputError(f"{grid}: a grid with two finished cells is needed, whose first one is not the best")
    two.mkdir()
    for cell in (cells[0], best):
        (two / cell.name.replace(",", " ")).symlink_to(cell.done[0].folder.resolve())
    for folder, pages in ((two, PAGES), (grid, {"hparams": HPARAMS})):
        with server(folder) as address:
            for name, (page, width, height) in pages.items():
                path = output / f"tensorboard_{name}.png"
                take_picture(browser, f"{address}#{page}", width, height, path)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serve a folder of runs by `frcnn tensorboard`, and yield the address."""
    command = [sys.executable, "-m", "experiments.cli", "tensorboard", folder.name, "--port", "0"]
    with subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


def take_picture(browser: str, address: str, width: int, height: int, path: Path) -> None:
    """Write what a page shows when it has loaded its data, as a PNG file of few colours."""
    with tempfile.TemporaryDirectory() as profile:
        drawn = Path(profile) / "page.png"
        flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={profile}"
        size = f"--window-size={width},{height} --virtual-time-budget=20000 --screenshot={drawn}"
        subprocess.run([browser, *flags.split(), *size.split(), address], check=True, timeout=120, capture_output=True)
        Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
