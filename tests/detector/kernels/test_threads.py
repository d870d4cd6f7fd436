"""How OpenMP's threads wait."""

import os
import subprocess
import sys

import pytest

from detector.kernels.threads import wait_politely


@pytest.fixture(autouse=True)
def no_policy(monkeypatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that the fixture puts it back
        monkeypatch.delenv(name)


def test_waiting_threads_sleep_soon() -> None:
    wait_politely()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "300000")])
def test_what_the_user_chose_stays(monkeypatch, name, value) -> None:
    monkeypatch.setenv(name, value)
    wait_politely()
    assert {key: os.environ.get(key) for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} == {
        "OMP_WAIT_POLICY": None,
        "GOMP_SPINCOUNT": None,
        name: value,
    }


def test_the_command_sets_it_before_pytorch_is_loaded() -> None:
    """libgomp reads it once, when it is loaded."""
    program = (
        "import os, sys; from experiments import cli; loaded = 'torch' in sys.modules; cli.main(['--help']); "
        "print(loaded, os.environ['GOMP_SPINCOUNT'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False 1000"
