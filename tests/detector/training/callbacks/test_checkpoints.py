"""A checkpoint that cannot be written leaves the former one whole."""

import resource

import pytest
import torch

from detector.errors import InputError
from detector.training.callbacks.checkpoints import AtomicCheckpoints


@pytest.fixture
def limit():
    """`limit(n)`: no file may grow beyond n bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_former_checkpoint_and_says_so(tmp_path, limit):
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpoints()
    writer.save_checkpoint({"step": torch.tensor(1)}, path)
    limit(100_000)
    with pytest.raises(InputError, match=r"last.ckpt: cannot write \(File too large\)"):
        writer.save_checkpoint({"step": torch.tensor(2), "weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_newer_checkpoint_takes_the_place_of_the_former(tmp_path):
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        AtomicCheckpoints().save_checkpoint({"step": torch.tensor(step)}, str(path))
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(2)}


def test_interrupt_while_writing(tmp_path, monkeypatch):
    def save(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": torch.tensor(1)}, path)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpoints().save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
