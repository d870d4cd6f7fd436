"""Files are whole whatever happens while they are written."""

import pytest

from detector.errors import InputError
from detector.files import check_checkpoint, replacing, write_json, write_whole


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
