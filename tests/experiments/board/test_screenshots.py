"""Pictures of TensorBoard for the README: which pages of which runs a browser is sent to, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from detector.errors import InputError
from experiments.board import screenshots

BROWSER = f"""#!{sys.executable}
import json, pathlib, sys, urllib.request
from PIL import Image
options = dict(one.removeprefix("--").split("=", 1) for one in sys.argv if one.startswith("--") and "=" in one)
server, page = sys.argv[-1].split("#")
runs = json.load(urllib.request.urlopen(server + "data/runs"))
with (pathlib.Path(__file__).parent / "seen.jsonl").open("a") as file:
    file.write(json.dumps([page.split("&")[0], sorted(runs)]) + "\\n")
Image.new("RGB", tuple(map(int, options["window-size"].split(",")))).save(options["screenshot"])
"""


@pytest.fixture
def grid(tmp_path, writer) -> Path:
    """Three finished cells of one run each, the second one the best."""
    folder = tmp_path / "runs" / "grid"
    cells = [writer.cell(scales, 0) for scales in ("8", "4-8", "16")]
    writer.plan(folder, cells)
    for cell, value in zip(cells, (0.3, 0.5, 0.4), strict=True):
        run = writer.run(folder, cell, "done", value)
        (run / "metrics.json").write_text(json.dumps({"val/AP50_voc07": value, "seed": 0}))
        with SummaryWriter(str(run)) as events:
            events.add_scalar("val/AP50_voc07", value, 1)
    return folder


@pytest.fixture
def take(monkeypatch, tmp_path):
    """`take(grid)`: the exit status, where PATH has nothing but what is in `bin`."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def run(grid: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["screenshots", str(grid), "--output", str(tmp_path / "not/there")])
        return screenshots.main()

    return run


def test_pages_of_two_runs_and_of_the_whole_grid(take, grid, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/chromium").write_text(BROWSER)
    (tmp_path / "bin/chromium").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    assert take(grid) == 0
    seen = [json.loads(line) for line in (tmp_path / "bin/seen.jsonl").read_text().splitlines()]
    two = ["scales=4-8", "scales=8"]
    every = [f"scales={one},seed=0-00000000" for one in ("16", "4-8", "8")]
    pages = ["scalars", "custom_scalars", "images", "images"]
    assert seen == [*([page, two] for page in pages), ["hparams", every]]
    made = {path.name: Image.open(path) for path in (tmp_path / "not/there").glob("tensorboard_*.png")}
    assert len(made) == 5 and {picture.mode for picture in made.values()} == {"P"}
    assert made["tensorboard_scalars.png"].size == (1060, 720)


def test_what_is_refused(take, grid, capsys):
    assert take(grid) == 2
    assert "none of chromium, chromium-browser, google-chrome is installed" in capsys.readouterr().err


def test_a_grid_whose_first_run_is_the_best_has_no_two_runs_to_compare(grid, tmp_path):
    (grid / "scales=8,seed=0-00000000/metrics.json").write_text(json.dumps({"val/AP50_voc07": 0.9}))
    with pytest.raises(InputError, match="whose first one is not the best"):
        screenshots.take_pictures(grid, tmp_path / "two", "", tmp_path)
