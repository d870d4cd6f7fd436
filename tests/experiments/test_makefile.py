"""`make install`: what it runs, with pip or uv, and with another index for torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def commands(tmp_path):
    """`commands(goal, ...)`: the lines that make would run in a clone without `.venv`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def run(*words: str) -> list[str]:
        # Not as a part of the `make test` that runs this, which hands its options down and names folders.
        own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        call = ["make", "-n", "--no-print-directory", *words]
        result = subprocess.run(call, cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    return run


def line_with(lines: list[str], words: str) -> str:
    (line,) = [line for line in lines if words in line]
    return line


@pytest.mark.parametrize("goal", ["demo", "test", "install"])
def test_pip_installs_where_there_is_no_uv(commands, goal) -> None:
    lines = commands(goal, "UV=")
    assert "python3 -m venv .venv" in lines
    install = line_with(lines, "pip install")
    assert install.startswith(".venv/bin/python -m pip install ") and "--constraint constraints.txt" in install
    assert "index" not in install
    said = line_with(lines, "Installing")
    assert "7.4 GB" in said and "minutes" in said and "with pip" in said
    assert lines.index(said) < lines.index("python3 -m venv .venv") < lines.index(install)
    assert lines.index(install) < lines.index("touch .venv/installed")  # only then: what is interrupted is repeated


def test_uv_installs_where_it_is(commands) -> None:
    lines = commands("install", "UV=/some/bin/uv", "PYTHON=python3.12")
    assert "/some/bin/uv venv --quiet --allow-existing --python python3.12 .venv" in lines  # a half-made one, too
    install = line_with(lines, "pip install")
    assert install.startswith("/some/bin/uv pip install ") and "--python .venv/bin/python" in install
    assert "--constraint constraints.txt" in install and "--editable '.[dev]'" in install
    assert "with uv" in line_with(lines, "Installing")


@pytest.mark.parametrize("uv", ["UV=", "UV=uv"])
@pytest.mark.parametrize("goal", ["demo", "test"])
def test_another_index_for_torch(commands, goal, uv) -> None:
    lines = commands(goal, "TORCH_INDEX=https://example.org/a?b&c", uv)
    install = line_with(lines, "pip install")
    assert "--extra-index-url 'https://example.org/a?b&c'" in install
    # Without it uv takes all that the other index has from there, whatever its version.
    assert ("--index-strategy unsafe-best-match" in install) == (uv == "UV=uv")
    said = line_with(lines, "Installing")
    assert "torch from https://example.org/a?b&c" in said and "7.4 GB" not in said


def test_the_gpu_check_takes_a_given_python_as_it_is(commands) -> None:
    module = "-m experiments.benchmark.gpu_check"
    assert commands("gpu", "PYTHON=/usr/bin/python3", "OPTIONS=--minutes 7") == [
        f"/usr/bin/python3 {module} --minutes 7"
    ]
    lines = commands("gpu", "UV=")
    assert line_with(lines, "pip install") and lines[-1].strip() == f".venv/bin/python {module}"


def test_nothing_is_installed_twice(commands, tmp_path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    assert commands("demo") == [".venv/bin/python -m experiments.run.demo"]
