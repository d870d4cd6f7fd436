"""Downloads from a real server on this machine."""

import hashlib
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.datasets.voc import DATASET_YEAR_DICT

from datamodules.voc import download
from datamodules.voc.download import ARCHIVES, Archive, download_voc
from detector.errors import InputError


def tar_of(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, name in enumerate(names):
            data = np.random.default_rng(number).bytes(50_000)
            info = tarfile.TarInfo(f"VOCdevkit/VOC2007/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


DATA = tar_of(["JPEGImages/000001.jpg", "ImageSets/Main/train.txt", "JPEGImages/000002.jpg"])


@dataclass
class Server:
    """Serves DATA.

    Attributes:
        breaks_after: bytes after which each answer ends; one value an answer, None: whole.
        ranges: whether it knows how to send a part.
        asked: the Range header of each request.
    """

    breaks_after: list[int | None] = field(default_factory=list)
    ranges: bool = True
    status: int = 200
    data: bytes = DATA
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            status = state.status if state.status != 200 else 206 if start else 200
            if start >= len(state.data):
                status = 416
            self.send_response(status)
            body = state.data[start:] if status in (200, 206) else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            limit = state.breaks_after.pop(0) if state.breaks_after else None
            self.wfile.write(body[:limit])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}/voc.tar"
        yield state
        running.shutdown()


@pytest.fixture
def archive(server: Server, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setattr(download, "CHUNK", 1000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Archive("voc.tar", server.url, len(DATA), hashlib.md5(DATA).hexdigest())


def unpacked(root: Path) -> bool:
    path = root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000002.jpg"
    return path.is_file() and path.read_bytes() == np.random.default_rng(2).bytes(50_000)


def test_the_archives_are_those_that_torchvision_knows():
    """Older versions of torchvision name the server by another name."""
    for (year, part), archive in ARCHIVES.items():
        known = DATASET_YEAR_DICT[f"{year}-test" if part == "test" else year]
        url = known["url"].replace("http://host.", "https://thor.")
        assert (archive.url, archive.file_name, archive.md5) == (url, known["filename"], known["md5"])


def test_whole_download(server, archive, tmp_path, capsys):
    download_voc(tmp_path / "new", [archive, archive])
    assert unpacked(tmp_path / "new")
    assert server.asked == [None]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["VOCdevkit", "voc.tar"]
    printed = capsys.readouterr()
    assert "voc.tar; 0.00 GB to download" in printed.err and not printed.out


def test_broken_connections_are_gone_on_from(server, archive, tmp_path):
    server.breaks_after = [70_000, 30_500, None]
    download_voc(tmp_path, [archive])
    assert unpacked(tmp_path)
    assert server.asked == [None, "bytes=70000-", "bytes=100500-"]


def test_a_later_call_goes_on_from_what_an_earlier_one_has_left(server, archive, tmp_path, capsys):
    server.breaks_after = [70_000, 0]
    with pytest.raises(InputError) as caught:
        download_voc(tmp_path, [archive])
    for word in (server.url, "ended after 70000 of", "run again to go on", "voc.tar", str(tmp_path)):
        assert word in str(caught.value), str(caught.value)
    assert (tmp_path / "voc.tar.part").stat().st_size == 70_000
    assert not (tmp_path / "voc.tar").exists()
    capsys.readouterr()
    download_voc(tmp_path, [archive])
    assert "0.00 GB of it are there already" in capsys.readouterr().err
    assert server.asked[-1] == "bytes=70000-"
    assert unpacked(tmp_path)
    assert not (tmp_path / "voc.tar.part").exists()


def test_a_server_that_cannot_send_parts_sends_all_again(server, archive, tmp_path):
    server.breaks_after, server.ranges = [70_000, None], False
    download_voc(tmp_path, [archive])
    assert unpacked(tmp_path)
    assert (tmp_path / "voc.tar").read_bytes() == DATA


def test_a_part_that_is_whole_is_taken(server, archive, tmp_path):
    (tmp_path / "voc.tar.part").write_bytes(DATA)
    download_voc(tmp_path, [archive])
    assert unpacked(tmp_path)


def test_wrong_checksum(server, archive, tmp_path):
    server.data = DATA[:-9] + b"corrupted"
    with pytest.raises(InputError, match=f"{server.url}: what came has not the checksum {archive.md5}.*run again"):
        download_voc(tmp_path, [archive])
    assert list(tmp_path.iterdir()) == []  # so that the next call starts anew
    server.data = DATA
    download_voc(tmp_path, [archive])
    assert unpacked(tmp_path)


def test_a_file_of_the_user_is_checked_and_never_deleted(server, archive, tmp_path):
    (tmp_path / "voc.tar").write_bytes(DATA[:-1])
    with pytest.raises(InputError, match=r"voc\.tar: has not the checksum .*delete the file and run again"):
        download_voc(tmp_path, [archive])
    assert (tmp_path / "voc.tar").is_file()
    (tmp_path / "voc.tar").write_bytes(DATA)
    download_voc(tmp_path, [archive])
    assert unpacked(tmp_path) and server.asked == []


@pytest.mark.parametrize("status", [404, 503])
def test_refusals(server, archive, tmp_path, status):
    server.status = status
    with pytest.raises(InputError, match=rf"could not fetch {server.url} \(HTTP Error {status}.*by hand"):
        download_voc(tmp_path, [archive])
    assert len(server.asked) == 1


def test_unreachable_server(archive, tmp_path):
    nobody = Archive("voc.tar", "http://127.0.0.1:9/voc.tar", archive.size, archive.md5)
    with pytest.raises(InputError, match=r"could not fetch http://127\.0\.0\.1:9/voc\.tar"):
        download_voc(tmp_path, [nobody])


def test_too_little_space_is_said_before_anything_is_fetched(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.9 * len(DATA)))
    with pytest.raises(InputError, match=r"need 0\.00 GB, and 0\.00 GB are free"):
        download_voc(tmp_path, [archive])
    assert server.asked == []
