"""Run a notebook of this folder and keep its outputs: python docs/execute.py [NOTEBOOK] [--to FILE].

The outputs are those of the machine at hand. Without --to the notebook is written over, once it has run to its end; a
cell that fails leaves it as it is.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "from_loops_to_layers.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: Path, folder: Path, timeout_s: int = 600) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in `folder`; raises CellExecutionError where a cell fails."""
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        cell.metadata = {}
    client = NotebookClient(
        content,
        timeout=timeout_s,  # of one cell
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    content.metadata = nbformat.from_dict(METADATA)
    return content


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path, nargs="?", default=NOTEBOOK)
    parser.add_argument("--to", type=Path, help="write here instead")
    arguments = parser.parse_args()
    content = execute(arguments.notebook, arguments.notebook.resolve().parent)
    nbformat.write(content, arguments.to or arguments.notebook)


if __name__ == "__main__":
    main()
