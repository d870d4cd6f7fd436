"""Annotation files that nobody meant to write: every one is refused in one line or read, quickly and in little memory.

All are read in one process of its own, which the system ends if it asks for more than 200 MB beyond what it starts with
or computes for more than 100 seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 10_000
READER = Path(__file__).with_name("hostile_xml_reader.py")


@pytest.mark.timeout(280)
def test_mutated_files_are_refused_in_one_line_or_read(tmp_path):
    run = subprocess.run(
        [sys.executable, str(READER), str(tmp_path), str(COUNT)], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    print(report)
    assert sum(sum(counts) for counts in report["outcome"].values()) == COUNT
    read, refused = report["outcome"].pop("entities")
    assert refused > 900 and read < 200  # what is read mentions no entity
    for kind, (read, refused) in report["outcome"].items():
        assert refused > 20, kind  # the mutations do mutate,
        assert read > 20 or kind == "cut", kind  # and do not only destroy
