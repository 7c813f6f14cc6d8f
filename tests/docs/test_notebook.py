"""The notebook runs from its first cell to its last, and what is committed are the outputs of such a run."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = DOCS / "from_loops_to_layers.ipynb"
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def kinds(cell):
    """What a cell puts out: "text" for what it prints, else the best type of what it shows."""
    return ["text" if output.output_type == "stream" else sorted(output.data)[0] for output in cell.outputs]


@pytest.mark.slow
def test_it_runs_in_an_empty_folder_and_shows_what_is_committed(committed, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # on a busy machine, threads that spin take minutes from each other
    spec = importlib.util.spec_from_file_location("execute", DOCS / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    again = execute.execute(NOTEBOOK, tmp_path)  # raises where a cell fails
    assert list(tmp_path.iterdir()) == []
    for new, old in zip(code_cells(again), code_cells(committed), strict=True):
        assert kinds(new) == kinds(old), f"cell {old.id} puts out something else: run docs/execute.py"


def test_every_cell_was_run_in_order_and_none_failed(committed):
    nbformat.validate(committed)
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs_of(committed) if output.output_type == "error"]


def test_it_is_clean(committed):
    assert committed.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in committed.cells)
    assert [output for output in outputs_of(committed) if output.get("name") == "stderr"] == []
    printed = "".join(output.get("text", "") for output in outputs_of(committed))
    assert "Warning" not in printed
    assert str(DOCS.parent) not in printed
    assert os.path.expanduser("~") + os.sep not in printed
    assert NOTEBOOK.stat().st_size < MOST_BYTES
