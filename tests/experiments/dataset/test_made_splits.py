"""Commands on splits that `--data.val_fraction` makes: all divide as a training does, and take the lists of a run."""

import json
import shutil

import pytest
import yaml

from datamodules.splits import write_lists

NONE = ("--data.train_splits", "[]", "--data.val_splits", "[]", "--data.test_splits", "[]")
MADE = (*NONE, "--data.val_fraction", 0.25)


@pytest.fixture
def root(mini_voc, tmp_path):
    """20 images without lists of splits."""
    shutil.copytree(mini_voc, tmp_path / "data", ignore=shutil.ignore_patterns("ImageSets"))
    return tmp_path / "data"


@pytest.fixture
def said(frcnn, tmp_path):
    """`said(command, ...)`: the JSON document of a command, and its line about splits."""

    def run(*arguments: object):
        result = frcnn(*arguments, "--format", "json", cwd=tmp_path)
        assert result.code == 0, result.err
        return json.loads(result.out), result.err

    return run


LINE = "splits made by val_fraction 0.25, split_seed 0: 15 images to train and 5 to validate on\n"


def test_all_commands_divide_alike(root, said, frcnn, tiny_config, tmp_path):
    more = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 1, "--run_name", "r")
    fit = frcnn("fit", "--config", tiny_config, "--data.root", root, *MADE, *more, cwd=tmp_path)
    assert fit.code == 0 and "15 images to train and 5 to validate on; the lists are in" in fit.err
    (run,) = tmp_path.glob("runs/*/r")
    val = (run / "splits" / "val.txt").read_text().split()
    anchors, line = said("anchors", "--config", tiny_config, "--data.root", root, *MADE)
    assert (anchors["images"], anchors["splits"], line) == (15, ["train"], LINE)

    found = tmp_path / "found.json"
    entry = {"category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}
    found.write_text(json.dumps([entry | {"file_name": f"{name}.jpg"} for name in val]))
    scores, line = said("evaluate", found, "--data.root", root, "--data.val_fraction", 0.25)
    assert (scores["images"], scores["detections"], line) == (5, 5, LINE)
    other = frcnn(
        "evaluate", found, "--data.root", root, "--data.val_fraction", 0.25, "--data.split_seed", 1, cwd=tmp_path
    )
    assert other.code == 2 and "which is not in val" in other.err

    doctor, line = said("doctor", root, "--data.val_fraction", 0.25)
    assert (doctor["splits"], doctor["images"], line) == ({"train": 15, "val": 5}, 20, LINE)
    assert doctor["problems"] == []
    sheet = frcnn("show-data", "--config", tiny_config, "--data.root", root, *MADE, "--output", "s", cwd=tmp_path)
    assert (sheet.code, sheet.err) == (0, LINE)

    test = frcnn("test", "--ckpt_path", run / "checkpoints" / "last.ckpt", cwd=tmp_path)
    text = "no test splits are given; set --data.test_splits, or score the validation splits by frcnn validate"
    assert (test.code, test.err) == (2, f"frcnn: {text}\n")


def test_the_lists_of_a_run_count(root, said, frcnn, tiny_config, tmp_path):
    """A run of an earlier version, which divided otherwise."""
    names = sorted(path.stem for path in (root / "Annotations").iterdir())
    write_lists(
        tmp_path / "run" / "splits", {"train": names[:3], "val": names[3:]}, {"val_fraction": 0.25, "split_seed": 0}
    )
    config = yaml.safe_load(tiny_config.read_text())
    config["data"] |= {"root": str(root), "train_splits": [], "val_splits": [], "test_splits": [], "val_fraction": 0.25}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    of_run = ("--config", tmp_path / "run" / "config.yaml")
    anchors, line = said("anchors", *of_run)
    assert (anchors["images"], line) == (3, "")
    assert "run" not in frcnn("show-data", *of_run, "--output", "s", "--epochs", 1, cwd=tmp_path).err
    assert (tmp_path / "s").is_dir()
    anchors, line = said("anchors", *of_run, "--data.split_seed", 1)
    assert anchors["images"] == 15 and "split_seed 1: 15 images" in line


def test_what_contradicts_is_refused(root, frcnn, tmp_path):
    (tmp_path / "found.json").write_text("[]")
    evaluate = ("evaluate", tmp_path / "found.json", "--data.root", root)
    result = frcnn(*evaluate, "--data.val_splits", "[val]", "--data.val_fraction", 0.25, cwd=tmp_path)
    assert result.code == 2 and "--data.val_splits is [val]; give one of the two" in result.err
    result = frcnn(*evaluate, cwd=tmp_path)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "--data.val_splits is empty; name at least one split, or have some made by --data.val_fraction" in result.err
    assert frcnn("doctor", root, "--data.val_fraction", 1.5, cwd=tmp_path).code == 2
