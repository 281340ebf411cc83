"""Run notebooks in an empty folder and store their outputs: ``python notebooks/run.py notebooks/01_*.ipynb``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat


def main() -> None:
    """Run each notebook that is named."""
    for name in sys.argv[1:]:
        path = Path(name)
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            nbclient.NotebookClient(
                notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}
            ).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when it ran
            if cell.cell_type == "code":  # progress bars say nothing afterwards
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
