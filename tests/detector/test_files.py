"""Files are whole whatever happens while they are written."""

import os
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch

from detector.errors import InputError
from detector.files import check_checkpoint, check_space, damage_of, keep_former, replacing, write_json, write_whole


def test_what_is_there_stays_until_the_new_content_is_complete(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with replacing(path) as file:
        file.write(b"other")
        assert path.read_text() == '{\n  "a": 1\n}\n'
    assert path.read_text() == "other"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_former_file_and_no_draft(tmp_path, error):
    path = tmp_path / "a"
    write_whole(path, b"former")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # closed last
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_a_long_name_is_no_trouble(tmp_path):
    (tmp_path / "target").write_text("target")
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", b"own")
    assert ((tmp_path / "target").read_text(), (tmp_path / "link").read_text()) == ("target", "own")
    write_whole(tmp_path / ("x" * 250), b"long")
    assert (tmp_path / ("x" * 250)).read_bytes() == b"long"


def test_a_checkpoint_that_is_not_there_leads_to_those_beside_it(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"")
    check_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"best\.ckpt: no such checkpoint file; there is last\.ckpt$"):
        check_checkpoint(tmp_path / "best.ckpt")
    with pytest.raises(InputError, match=r"no such checkpoint file$"):
        check_checkpoint(tmp_path / "none" / "best.ckpt")


@pytest.mark.parametrize("links", [True, False])
def test_a_former_file_keeps_its_content_under_its_second_name(tmp_path, monkeypatch, links):
    def refuse(*_: object) -> None:
        raise OSError

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, former = tmp_path / "a", tmp_path / "former"
    for content in (b"1", b"2", b"3"):
        if path.exists():
            keep_former(path, former)
        write_whole(path, content)
    assert (former.read_bytes(), path.read_bytes()) == (b"2", b"3")
    assert sorted(tmp_path.iterdir()) == [path, former]


def test_every_flipped_bit_of_a_record_and_every_cut_is_damage(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weights": torch.arange(50.0), "text": "abc"}, path)
    whole = path.read_bytes()
    assert damage_of(path) == ""
    with zipfile.ZipFile(path) as archive:
        records = [(one.header_offset + 30 + len(one.filename.encode()), one) for one in archive.infolist()]
    for start, record in records:
        extra = int.from_bytes(whole[record.header_offset + 28 :][:2], "little")
        for place in range(start + extra, start + extra + record.file_size):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            assert damage_of(path) == f"its record {record.filename} has changed"
    for length in range(2, len(whole)):
        path.write_bytes(whole[:length])
        assert damage_of(path)


def test_records_that_take_more_time_than_the_file_has_bytes_are_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10_000_000))
    assert damage_of(tmp_path / "a") == "its records are not as PyTorch writes them"


def test_room_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    check_space(tmp_path / "not" / "there", 5_000_000, "x")
    with pytest.raises(InputError, match=rf"^x: needs 6 MB, and {tmp_path} has 5 MB free; make room$"):
        check_space(tmp_path / "not" / "there", 6_000_000, "x")
