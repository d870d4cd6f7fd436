"""What is known of a grid before anything runs: its cells, their hashes and commands, and what is wrong with them."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from detector.errors import InputError
from experiments.ablation.ablate import slots_of
from experiments.ablation.checks import devices_of
from experiments.ablation.grid import read_grid
from experiments.ablation.options import AblateOptions
from experiments.ablation.plan import plan

ROOT = Path(__file__).resolve().parents[3]


def test_an_evaluation_is_of_one_checkpoint_wherever_it_is_written(trained, tmp_path):
    """Another checkpoint makes another cell; another folder or name for the results does not."""
    base = yaml.safe_load((trained / "config.yaml").read_text())
    other = tmp_path / "other.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", other)

    def hashes(checkpoint: Path, folder: str, **options: str) -> list[str]:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | options))
        axes = {"proposals": {"option": "model.rpn.post_nms_test", "values": [3, 30]}}
        content = {"base": str(tmp_path / "base.yaml"), "evaluate": str(checkpoint), "axes": axes}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
        return [cell.hash for cell in plan(read_grid(str(tmp_path / "grid.yaml")), folder).cells]

    first = hashes(trained / "checkpoints" / "last.ckpt", "runs")
    assert hashes(other, "elsewhere", runs_dir="there", run_name="named", experiment="x") == first
    other.write_bytes(other.read_bytes() + b"more")
    assert not set(hashes(other, "runs")) & set(first)


def test_a_changed_base_is_named_and_gives_new_cells(grid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(grid.read_text())
    base = yaml.safe_load(Path(content["base"]).read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content | {"base": "base.yaml"}))
    before = plan(read_grid("small.yaml"), "runs")
    assert before.changes(before.document()) == []
    base["model"]["rpn"]["nms_iou"] = 0.6
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    after = plan(read_grid("small.yaml"), "runs")
    assert after.changes(before.document()) == ["model.rpn.nms_iou: 0.7 -> 0.6"]
    assert not {cell.folder for cell in before.cells} & {cell.folder for cell in after.cells}
    # Where results are written, and how numbers are spelt, change nothing.
    base["model"]["rpn"]["nms_iou"] = 0.70
    base["model"]["anchors"]["aspect_ratios"] = [1.0]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    again = plan(read_grid("small.yaml"), "elsewhere")
    assert [cell.hash for cell in again.cells] == [cell.hash for cell in before.cells]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"model.anchors.scales": ["x"]}, "cell scales=x,seed=0: Parser key"),
        ({"model.anchors.scale": [[1]]}, "model.anchors.scale"),
        ({"model.anchors.scales": [[1], [-2]]}, "cell scales=-2,seed=0: anchors.scales"),
        ({"model.anchors.scales": [[[1], [2]]]}, "cell scales=1_2,seed=0: "),
        (
            {"model.backbone.frozen_stages": [0, 9]},
            "cell frozen_stages=9,seed=0: backbone.frozen_stages 9: this",
        ),
        ({"model.roi.nms_iou": [3]}, "cell nms_iou=3,seed=0: roi.nms_iou"),
        ({"data.train_splits": [["absent"]]}, "absent.txt"),
        (
            {"model.anchors.scales": {"a": [1, 2], "b": [1.0, 2.0]}},
            "cells scales=a,seed=0 and scales=b,seed=0 have equal",
        ),
    ],
)
def test_bad_cells_are_named_before_anything_runs(frcnn, tiny_config, tmp_path, axes, message):
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump({"base": str(tiny_config), "axes": axes}))
    options = [] if "train_splits" in str(axes) else ["--dry-run"]
    result = frcnn("ablate", path, *options, cwd=tmp_path)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--gpus-per-run", "0"], "--gpus_per_run 0: must be at least 1"),
        (["--gpus", "0,1,2", "--gpus-per-run", "2"], "does not divide into groups of 2"),
        (["--gpus", "0,0", "--gpus-per-run", "2"], "does not divide into groups of 2 different"),
        (["--gpus", "0", "--jobs", "2"], "--jobs: without effect beside --gpus"),
        (["--gpus", "0", "--launcher", "ray"], "--gpus: --launcher ray places cells itself"),
        (["--gpus", "a b"], "is not a list of GPUs"),
        (["--slurm", "[1]"], "--slurm [1]: must be a mapping"),
    ],
)
def test_bad_options(frcnn, grid, tmp_path, options, message):
    result = frcnn("ablate", grid, *options, cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


def test_a_folder_that_cannot_be_written(frcnn, grid, tmp_path):
    (tmp_path / "runs").touch()
    result = frcnn("ablate", grid, cwd=tmp_path)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("frcnn: runs/small: cannot write (Not a directory)")


def test_a_missing_dataset_does_not_hide_the_commands(frcnn, tiny_config, tmp_path):
    content = yaml.safe_load(tiny_config.read_text())
    content["data"]["root"] = "absent"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "g.yaml").write_text("base: base.yaml\n")
    dry = frcnn("ablate", "g.yaml", "--dry-run", cwd=tmp_path)
    assert dry.code == 0
    assert "note: data is not there" in dry.err
    assert "frcnn fit --config=base.yaml" in dry.out
    assert frcnn("ablate", "g.yaml", cwd=tmp_path).code == 2


@pytest.mark.parametrize(
    "name",
    [
        *("anchors_table8", "loss_weight_table9", "anchors_mini_voc", "assignment_mini_voc"),
        *("box_losses_mini_voc", "heads_mini_voc", "recipe_voc12_subset"),
    ],
)
def test_cells_of_our_grids_are_what_they_say(name, monkeypatch):
    """Every option is one, every value fits, and the data are the only thing that may lack."""
    monkeypatch.chdir(ROOT)
    planned = plan(read_grid(f"experiments/ablations/{name}.yaml"), "runs")
    for cell in planned.cells:
        options = cell.config.model
        if name == "anchors_table8":
            sides = "-".join(f"{scale:g}" for scale in options.anchors.scales)
            assert cell.axes["scales"] == sides
            assert (options.anchors.base_size, options.anchors.straddling) == (16, "drop")
        if name == "loss_weight_table9":
            assert (options.rpn.reg_normalizer, f"{options.rpn.reg_weight:g}") == (
                "locations",
                cell.axes["lambda"],
            )
        if name == "assignment_mini_voc":
            matcher = {"dynamic": options.roi.matcher}.get(cell.axes["assignment"], options.rpn.matcher)
            assert cell.axes["assignment"] in str(matcher).casefold()
        if name == "box_losses_mini_voc":
            assert options.roi.reg_loss == cell.axes["box_loss"]
            weights = {"smooth_l1": 1, "iou": 10, "giou": 10, "diou": 12, "ciou": 12}
            assert options.roi.reg_weight == weights[cell.axes["box_loss"]]
        if name == "heads_mini_voc":
            roi = options.roi
            found = (options.backbone.box_head == "double", roi.class_agnostic, len(roi.cascade_ious))
            heads = {(0, 0, 0): "default", (0, 1, 0): "class_agnostic", (0, 1, 3): "cascade", (1, 0, 0): "double"}
            assert heads[found] == cell.axes["head"]
            assert roi.cls_weight == roi.reg_weight == 1 + (cell.axes["head"] == "double")
        if name == "recipe_voc12_subset":
            assert (cell.config.data.val_splits, cell.config.data.val_fraction) == (None, 0.4)  # never chosen by val
            assert ("cascade" in cell.axes["recipe"]) == bool(options.roi.cascade_ious)


def test_without_a_checkpoint_nothing_is_evaluated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"runs/voc07_vgg16/seed0/checkpoints/last.ckpt: no such checkpoint"):
        plan(read_grid(ROOT / "experiments" / "ablations" / "proposals_test_time.yaml"), "runs")


# ---- GPUs ----


@pytest.mark.parametrize(
    ("visible", "gpus", "environment"),
    [
        (None, "0,3", ["0", "3"]),
        ("4,5,6,7", "0,3", ["4", "7"]),
        ("GPU-a, GPU-b,GPU-c,GPU-d", "1,1", ["GPU-b", "GPU-b"]),
        ("4,5,6,7", "0,0,0,0", ["4", "4", "4", "4"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,1", ["GPU-c", "GPU-b"]),
        (None, "GPU-x", ["GPU-x"]),
    ],
)
def test_gpus_are_counted_among_those_that_are_visible(monkeypatch, grid, visible, gpus, environment):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    options = AblateOptions(grid=str(grid), gpus=gpus.split(","))
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(options)] == environment


def test_several_gpus_of_a_cell(monkeypatch, grid):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    options = AblateOptions(grid=str(grid), gpus=["3", "0", "1", "2"], gpus_per_run=2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(options)] == ["7,4", "5,6"]


@pytest.mark.parametrize(
    ("visible", "count", "message"),
    [
        (None, 0, "--gpus 0,2: PyTorch finds no GPU here; use --jobs for CPUs"),
        (None, 2, "--gpus 0,2: there is no GPU 2; they are 0 to 1"),
        ("2,3", 2, "--gpus 0,2: there is no GPU 2 of CUDA_VISIBLE_DEVICES=2,3; they are 0 to 1"),
    ],
)
def test_a_gpu_that_is_not_there(monkeypatch, frcnn, grid, tmp_path, visible, count, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    result = frcnn("ablate", grid, "--gpus", "0,2", cwd=tmp_path)
    assert (result.code, result.err) == (2, f"frcnn: {message}\n")


def test_somebody_elses_gpu_is_refused_by_name_too(monkeypatch, grid):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with pytest.raises(InputError, match=r"there is no GPU GPU-x of CUDA_VISIBLE_DEVICES=GPU-a,GPU-b; they are 0 to 1"):
        slots_of(AblateOptions(grid=str(grid), gpus=["GPU-x"]))


@pytest.mark.parametrize(
    ("devices", "accelerator", "nodes", "gpus", "count"),
    [
        ("auto", "auto", 1, 4, 4),
        (-1, "gpu", 2, 4, 8),
        ("auto", "auto", 1, 0, 1),
        ("auto", "cpu", 1, 4, 1),
        (2, "auto", 1, 2, 2),
        (3, "cpu", 1, 1, 3),
        ("2", "cuda", 1, 4, 2),
        ([1, 3], "gpu", 1, 4, 2),
        ("0,", "gpu", 1, 1, 1),
    ],
)
def test_devices_that_a_training_uses(devices, accelerator, nodes, gpus, count):
    assert devices_of(Namespace(devices=devices, accelerator=accelerator, num_nodes=nodes), gpus) == count


@pytest.mark.parametrize(("devices", "needed"), [(2, 2), ([0, 3], 4), ("1,", 2)])
def test_more_gpus_than_a_cell_sees_are_refused(devices, needed):
    with pytest.raises(InputError) as error:
        devices_of(Namespace(devices=devices, accelerator="auto", num_nodes=1), 1)
    assert str(error.value).endswith(f"a cell sees 1 GPU; give --gpus_per_run {needed}, or trainer.devices auto")


@pytest.mark.parametrize(
    ("options", "visible", "steps"),
    [
        ((), 4, 18),
        (("--jobs", "2"), 4, 18),
        (("--gpus", "0,1,2,3", "--gpus_per_run", "2"), 4, 54),
        (("--gpus", "0,0,0,0"), 1, 108),
    ],
)
def test_the_steps_of_cells_are_those_of_their_gpus(monkeypatch, frcnn, grid, tmp_path, options, visible, steps):
    """Three cells of six epochs, each of 12 images, two of which are a batch: one device has six steps an epoch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    content = yaml.safe_load(grid.read_text())
    automatic = {"trainer.accelerator": "auto", "trainer.devices": "auto"}
    path = tmp_path / "gpus.yaml"
    path.write_text(yaml.safe_dump(content | {"overrides": content["overrides"] | automatic}))
    dry = frcnn("ablate", path, "--dry_run", *options, cwd=tmp_path)
    assert f"{steps} training steps" in dry.err
    assert ("every cell sees all GPUs" in dry.err) == (options == ("--jobs", "2"))
