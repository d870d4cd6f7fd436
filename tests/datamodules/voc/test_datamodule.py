import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.voc import DATASET_YEAR_DICT

from datamodules.voc import datamodule as voc_datamodule
from datamodules.voc import download
from datamodules.voc.datamodule import VOC_CLASSES, VOCDataModule
from datamodules.voc.format import VOCObject
from detector.errors import InputError

COUNT = 10  # images in `plain`
CAT = VOCObject("cat", (2.0, 3.0, 12.0, 9.0))


# ---- samples ----


def test_sample_of_an_image(plain, voc_data):
    data = voc_data(plain, augmentation="none")
    data.setup("fit")
    image, target = data.train_dataset[4]
    with Image.open(plain / "JPEGImages" / "i04.jpg") as stored:
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.array(stored))
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert data.class_names == ["cat", "dog"]
    assert target["boxes"].tolist() == [[4, 3, 10, 9], [0, 0, 1, 1]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 2] and target["labels"].dtype == torch.int64
    assert target["difficult"].tolist() == [False, True]
    assert target["image_id"].item() == 4 and target["image_id"].shape == ()
    assert target["file_name"] == "i04.jpg"
    assert data.train_dataset.image_path(4) == plain / "JPEGImages" / "i04.jpg"
    raw = data.train_dataset.target(4)
    assert all(torch.equal(raw[key], target[key]) for key in ("boxes", "labels", "difficult", "image_id"))
    empty = data.train_dataset[3][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["difficult"].shape == (0,)


def test_changing_a_sample_does_not_change_the_dataset(plain, voc_data):
    dataset = voc_data(plain, augmentation="none").train_dataset
    dataset[4][1]["boxes"].mul_(0)
    assert dataset[4][1]["boxes"].tolist()[0] == [4, 3, 10, 9]


@pytest.mark.parametrize(
    ("name", "mode"), [("i01.jpg", "L"), ("i01.png", "RGBA"), ("i01.jpg", "CMYK"), ("i01.PNG", "L")]
)
def test_other_modes_and_suffixes_become_rgb(plain, name, mode, write_image, voc_data):
    (plain / "JPEGImages" / "i01.jpg").unlink()
    path = write_image(plain, name, mode=mode)
    image, target = voc_data(plain, augmentation="none").train_dataset[1]
    assert image.shape == (3, 24, 32) and target["file_name"] == name
    if mode == "L":
        with Image.open(path) as stored:
            np.testing.assert_array_equal(image.numpy(), np.array(stored)[None].repeat(3, 0))


def test_exif_orientation_is_not_applied(plain, voc_data):
    path = plain / "JPEGImages" / "i01.jpg"
    with Image.open(path) as stored:
        exif = stored.getexif()
        exif[274] = 6  # "rotate by 90 degrees to show"
        stored.save(buffer := io.BytesIO(), "JPEG", exif=exif)
    path.write_bytes(buffer.getvalue())
    with Image.open(path) as stored:
        pixels = np.array(stored)
    image, _ = voc_data(plain, augmentation="none").train_dataset[1]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_boxes_are_clipped_to_the_image_itself(plain, annotate, voc_data):
    annotate(plain, "i01", VOCObject("cat", (-5.0, 2.0, 33.0, 25.5)), size=(640, 480))  # the XML's size is wrong
    assert voc_data(plain).train_dataset.target(1)["boxes"].tolist() == [[0, 2, 32, 24]]


@pytest.mark.parametrize("cut", [3, 100, 600])
def test_truncated_image_is_named_when_it_is_loaded(plain, cut, voc_data):
    path = plain / "JPEGImages" / "i01.jpg"
    path.write_bytes(path.read_bytes()[:-cut])
    dataset = voc_data(plain).train_dataset
    with pytest.raises(InputError, match=r"i01\.jpg: cannot be decoded"):
        dataset[1]


# ---- what is wrong with the files ----


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda d, annotate: annotate(d, "i02", CAT, VOCObject("cow", CAT.box)),
            ["i02.xml: object 1", "'cow'", "cat, dog"],
        ),
        (lambda d, _: (d / "JPEGImages" / "i02.jpg").unlink(), ["i02.jpg: no such image"]),
        (lambda d, _: (d / "JPEGImages" / "i02.jpg").write_text("text"), ["i02.jpg: not a readable image"]),
        (
            lambda d, annotate: annotate(d, "i02", VOCObject("cat", (32.0, 0.0, 40.0, 9.0))),
            ["i02.xml: object 0", "outside"],
        ),
        (
            lambda d, annotate: annotate(d, "i02", VOCObject("cat", (0.0, -9.0, 9.0, 0.0))),
            ["i02.xml: object 0", "outside"],
        ),
        (lambda d, _: (d / "Annotations" / "i02.xml").unlink(), ["i02.xml: no such annotation"]),
    ],
)
def test_setup_names_the_first_problem_and_counts_the_rest(plain, break_it, words, annotate, voc_data):
    break_it(plain, annotate)
    (plain / "JPEGImages" / "i05.jpg").unlink()
    with pytest.raises(InputError) as caught:
        voc_data(plain, class_names=["cat", "dog"]).setup("fit")
    assert all(word in str(caught.value) for word in [*words, "(and 1 more file"]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_in_two_splits_of_one_list_is_an_error(plain, voc_data):
    with pytest.raises(InputError, match=r"i07\.jpg.*another of the splits"):
        voc_data(plain, train_splits=["train", "val"]).setup("fit")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "/nowhere/at/all"}, ["/nowhere/at/all", "frcnn mini-voc OUT_DIR", "--data.download true"]),
        ({"train_splits": ["trian"]}, ["trian.txt", "holds train, val"]),
        ({"train_splits": []}, ["--data.train_splits"]),
        ({"augmentation": "cutmix"}, ["'cutmix'", "ssd_crop"]),
        ({"batch_size": 0}, ["--data.batch_size is 0"]),
        ({"eval_batch_size": -1}, ["--data.eval_batch_size is -1"]),
        ({"class_names": ["cat", "dog", "cat"]}, ["--data.class_names", "twice"]),
    ],
)
def test_bad_arguments_fail_on_construction(plain, changes, words, voc_data):
    with pytest.raises(InputError) as caught:
        voc_data(**{"root": plain, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_test_splits_are_never_guessed(plain, voc_data):
    data = voc_data(plain)
    with pytest.raises(InputError, match=r"--data\.test_splits"):
        data.setup("test")
    with pytest.raises(InputError, match=r"--data\.test_splits"):
        data.test_dataloader()
    given = voc_data(plain, test_splits=["val"], eval_batch_size=2)
    given.setup("test")
    names = [[target["file_name"] for target in targets] for _, targets in given.test_dataloader()]
    assert names == [["i07.jpg", "i08.jpg"], ["i09.jpg"]]


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (
            {"train_splits": ["train"], "val_splits": ["val"]},
            "train_splits and --data.val_splits share 3 .*i07, i08, i09",
        ),
        (
            {"train_splits": ["val"], "val_splits": ["rest"], "test_splits": ["rest"]},
            "val_splits and .*test.* share 5 ",
        ),
        (
            {"train_splits": ["rest"], "val_splits": ["val"], "test_splits": ["one"]},
            "train_splits and .*test.* share 1 ",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_parts_that_share_images_are_refused(plain, splits, words, stage, write_split, voc_data):
    write_split(plain, "rest", [f"i{number:02}" for number in range(5)])
    write_split(plain, "one", ["i04"])
    with pytest.raises(InputError, match=words) as caught:
        voc_data(plain, allow_overlap=False, **splits).setup(stage)
    assert "--data.allow_overlap true" in str(caught.value) and "\n" not in str(caught.value)
    voc_data(plain, allow_overlap=False, **splits).setup("validate")
    data = voc_data(plain, allow_overlap=True, **splits)
    if stage == "fit" or data.splits.names["test"]:
        data.setup(stage)


def test_parts_without_common_images_are_accepted_and_a_later_split_file_may_be_missing(plain, write_split, voc_data):
    write_split(plain, "rest", ["i00", "i01"])
    data = voc_data(
        plain, train_splits=["rest"], test_splits=["later"], class_names=["cat", "dog"], allow_overlap=False
    )
    data.setup("fit")
    assert (len(data.train_dataset), len(data.val_dataset)) == (2, 3)


def test_equal_names_in_two_years_are_different_images(tmp_path, write_image, annotate, write_split, voc_data):
    for year in ("2007", "2012"):
        write_image(tmp_path / f"VOC{year}", "000001.jpg")
        annotate(tmp_path / f"VOC{year}", "000001", VOCObject("sofa", CAT.box))
        write_split(tmp_path / f"VOC{year}", "trainval", ["000001"])
    years = {"train_splits": ["2007_trainval"], "val_splits": ["2012_trainval"]}
    voc_data(tmp_path, allow_overlap=False, **years).setup("fit")


# ---- layouts, classes, download ----


@pytest.mark.parametrize("above", ["", "VOCdevkit"])
def test_years_are_found_and_joined(tmp_path, above, write_image, annotate, write_split, voc_data):
    for year, stem in (("2007", "000001"), ("2012", "2008_000001")):
        folder = tmp_path / above / f"VOC{year}"
        write_image(folder, f"{stem}.jpg")
        annotate(folder, stem, VOCObject("sofa", CAT.box))
        write_split(folder, "trainval", [stem])
    data = voc_data(tmp_path, train_splits=["2007_trainval", "2012_trainval"], val_splits=["2007_trainval"])
    data.setup("fit")
    assert data.class_names == list(VOC_CLASSES) and len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert data.train_dataset.file_names == ["000001.jpg", "2008_000001.jpg"]
    assert data.train_dataset.target(1)["labels"].tolist() == [VOC_CLASSES.index("sofa") + 1]
    with pytest.raises(InputError, match=r"'train': write <year>_<split>.*2007, 2012"):
        voc_data(tmp_path)


def test_class_order_can_be_given(plain, voc_data):
    data = voc_data(plain, class_names=["dog", "bird", "cat"])
    assert data.train_dataset.target(4)["labels"].tolist() == [3, 1]


@pytest.fixture
def no_network(monkeypatch, write_image, annotate, write_split) -> list[download.Archive]:
    """The archives that would have been fetched; unpacking one gives a dataset of one image."""
    fetched = []

    def fetch(archive, root):
        fetched.append(archive)
        (root / archive.file_name).touch()

    def unpack(path, root):
        folder = Path(root) / "VOCdevkit" / "VOC2007"
        stem = "000002" if "test" in Path(path).name else "000001"
        write_image(folder, f"{stem}.jpg")
        annotate(folder, stem, CAT)
        for name in ["test"] if "test" in Path(path).name else ["train", "val", "trainval"]:
            write_split(folder, name, [stem])

    monkeypatch.setattr(download, "_fetch", fetch)
    monkeypatch.setattr(download, "check_integrity", lambda path, md5: True)
    monkeypatch.setattr(download, "extract_archive", unpack)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    return fetched


def test_download_fetches_what_is_missing_and_finds_it(tmp_path, no_network, capsys, voc_data):
    root = tmp_path / "new" / "data"
    changes = {"train_splits": ["2007_train"], "val_splits": ["2007_val"], "test_splits": ["2007_test"]}
    data = voc_data(root, download=True, **changes)
    assert data.class_names == list(VOC_CLASSES)  # known before there are files
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.test_dataset.file_names == ["000002.jpg"]
    expected = [DATASET_YEAR_DICT["2007"], DATASET_YEAR_DICT["2007-test"]]
    assert [archive.md5 for archive in no_network] == [item["md5"] for item in expected]
    assert no_network == [download.ARCHIVES["2007", part] for part in ("trainval", "test")]
    printed = capsys.readouterr()
    assert "0.91 GB" in printed.err and not printed.out
    voc_data(root, download=True, **changes).prepare_data()
    assert len(no_network) == 2


def test_half_unpacked_archive_is_unpacked_again(tmp_path, no_network, monkeypatch, write_split, voc_data):
    changes = {"train_splits": ["2007_train"], "val_splits": ["2007_val"]}
    unpack = download.extract_archive

    def cut_off(path, root):
        write_split(Path(root) / "VOCdevkit" / "VOC2007", "train", ["000001"])
        raise OSError("no space left")

    monkeypatch.setattr(download, "extract_archive", cut_off)
    with pytest.raises(InputError, match="no space left"):
        voc_data(tmp_path, download=True, **changes).prepare_data()
    monkeypatch.setattr(download, "extract_archive", unpack)
    data = voc_data(tmp_path, download=True, **changes)
    data.prepare_data()
    data.setup("validate")
    assert data.val_dataset.file_names == ["000001.jpg"]
    assert len(no_network) == 1  # unpacked again, not fetched again


def test_failed_download_says_what_to_do(tmp_path, no_network, monkeypatch, voc_data):
    def fetch(archive, root):
        raise OSError("no route\nto host")

    monkeypatch.setattr(download, "_fetch", fetch)
    data = voc_data(tmp_path, download=True, train_splits=["2012_train"], val_splits=["2012_val"])
    with pytest.raises(InputError) as caught:
        data.prepare_data()
    archive = download.ARCHIVES["2012", "trainval"]
    for word in (archive.url, archive.file_name, str(tmp_path), "no route to host"):
        assert word in str(caught.value)
    with pytest.raises(InputError, match=r"2012_test.*2007_trainval, 2007_test, 2012_trainval"):
        voc_data(tmp_path, download=True, train_splits=["2012_train"], val_splits=["2012_test"]).prepare_data()


# ---- order and randomness ----


def _epochs(data: VOCDataModule, epochs: int):
    """What the training loader gives, epoch by epoch: (image_id, checksum of the pixels, boxes)."""
    loader = data.train_dataloader()
    seen = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        seen.append(
            [
                (target["image_id"].item(), image.numpy().tobytes(), target["boxes"].tolist())
                for images, targets in loader
                for image, target in zip(images, targets, strict=True)
            ]
        )
    return seen


def test_samples_do_not_depend_on_the_number_of_workers(plain, voc_data):
    alone = _epochs(voc_data(plain, augmentation="ssd_crop", seed=3), 2)
    assert alone == _epochs(voc_data(plain, augmentation="ssd_crop", seed=3, num_workers=2), 2)
    assert sorted(item[0] for item in alone[0]) == list(range(COUNT))
    first, second = ({item[0]: item[1] for item in epoch} for epoch in alone)
    assert sum(first[number] != second[number] for number in range(COUNT)) >= COUNT - 1
    other = {item[0]: item[1] for item in _epochs(voc_data(plain, augmentation="ssd_crop", seed=4), 1)[0]}
    assert sum(first[number] != other[number] for number in range(COUNT)) >= COUNT - 1


def test_an_index_alone_means_epoch_zero(plain, voc_data):
    dataset = voc_data(plain, augmentation="ssd_crop").train_dataset
    assert torch.equal(dataset[5][0], dataset[0, 5][0])
    assert any(not torch.equal(dataset[index][0], dataset[1, index][0]) for index in range(3))


def test_seed_follows_seed_everything(plain, monkeypatch, voc_data):
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert voc_data(plain).seed == 41
    assert voc_data(plain, seed=5).seed == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert voc_data(plain).seed == 0


def test_last_partial_batch_is_left_out_of_training_but_never_all(plain, voc_data):
    assert [len(images) for images, _ in voc_data(plain, batch_size=4).train_dataloader()] == [4, 4]
    assert [len(images) for images, _ in voc_data(plain, batch_size=16).train_dataloader()] == [COUNT]
    assert [len(images) for images, _ in voc_data(plain, eval_batch_size=2).val_dataloader()] == [2, 1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_split_the_images(plain, monkeypatch, world_size, voc_data):
    evaluated, trained = [], []
    for rank in range(world_size):
        data = voc_data(plain, batch_size=1)
        monkeypatch.setattr(voc_datamodule.VOCDataModule, "_world", (world_size, rank))
        evaluated += [target["image_id"].item() for _, targets in data.val_dataloader() for target in targets]
        trained += [target["image_id"].item() for _, targets in data.train_dataloader() for target in targets]
    assert sorted(evaluated) == [0, 0, 1, 2]  # three images fill up two or four equally long shards
    assert len(trained) == len(set(trained)) == COUNT // world_size * world_size
