"""Every notebook runs from top to bottom; what its numbers must be is asserted in its own cells."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_runs_and_holds(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert stored, "stored without outputs: readers on the web would see no pictures"
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}})
    client.execute()
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in notebook.cells))
    )
