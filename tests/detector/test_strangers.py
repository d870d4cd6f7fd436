"""Options that come with a run or a checkpoint are code where they name classes: those of others are said."""

import pytest

from detector.parts import say_strangers, strangers_in

OPTIONS = {
    "data_format": "own.Format",
    "model": {
        "weights": "shapes.pth",
        "roi": {"reg_loss": {"class_path": "wings.Loss", "init_args": {"inner": {"class_path": "deep.Part"}}}},
        "rpn": {"cls_loss": "plain.Loss", "reg_loss": "smooth_l1"},
        "backbone": {"name": "vgg16", "weights": "vgg.v2.pth"},
    },
    "trainer.callbacks": ["EarlyStopping", "calls.Me", {"class_path": "pytorch_lightning.callbacks.Timer"}],
    "trainer": {"logger": {"class_path": "TensorBoardLogger"}, "plugins": "torch.nn.Linear", "max_time": "00:01:00:00"},
    "data": {
        "root": "data.v2",
        "train_splits": ["2007.trainval"],
        "augmentation": [
            {"class_path": "albumentations.OneOf", "init_args": {"transforms": [{"class_path": "subprocess.Popen"}]}},
            {"class_path": "own.Format"},
            {"class_path": "datamodules.augmentation.mixing.Mosaic"},
        ],
    },
}


def test_strangers_are_all_classes_but_those_of_known_packages():
    expected = ["own.Format", "wings.Loss", "deep.Part", "plain.Loss", "calls.Me", "subprocess.Popen"]
    assert strangers_in(OPTIONS) == expected
    assert strangers_in({"model": {"roi": {"reg_loss": "giou"}}, "data_format": "yolo"}) == []


@pytest.mark.parametrize("name", ["torchless.Loss", "torch_vision.Loss", "Detector.Loss", "lightningrod.Loss"])
def test_a_package_is_known_by_its_whole_name(name):
    assert strangers_in({"model": {"rpn": {"cls_loss": name}}}) == [name]


def test_sections_in_files_of_their_own_are_looked_into(tmp_path):
    (tmp_path / "model.yaml").write_text("rpn: {cls_loss: hidden.Loss}")
    (tmp_path / "broken.yaml").write_text("[")
    assert strangers_in({"model": "model.yaml", "data": "broken.yaml"}, tmp_path) == ["hidden.Loss"]


def test_each_is_said_once_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detector.parts._SAID", set())
    say_strangers(tmp_path / "config.yaml", OPTIONS)
    say_strangers(tmp_path / "last.ckpt", {"roi": {"reg_loss": {"class_path": "wings.Loss"}}})
    line = f"{tmp_path / 'config.yaml'}: names classes of others, which are imported now: own.Format, wings.Loss"
    said = capsys.readouterr()
    assert said.err.startswith(line) and said.err.count("\n") == 1 and said.out == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    say_strangers("last.ckpt", {"loss": {"class_path": "other.Loss"}})
    assert capsys.readouterr().err == ""
