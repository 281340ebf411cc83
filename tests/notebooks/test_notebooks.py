"""The notebooks run as they are; every file in ``notebooks/`` is picked up by itself."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 150_000
MOST_SECONDS = 600
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def shown(notebook: Any) -> list[set[str]]:
    """Return what kinds of things each code cell shows, but for warnings and progress bars."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [{output.output_type for output in cell.outputs if output.get("name") != "stderr"} for cell in cells]


def test_the_notebooks_are_found() -> None:
    names = [path.name for path in NOTEBOOKS]
    assert {
        "01_train_with_a_budget.ipynb",
        "02_audit_a_run.ipynb",
        "03_privacy_utility_curves.ipynb",
        "04_attack_through_secure_aggregation.ipynb",
        "05_bring_your_own_model_and_data.ipynb",
    } <= set(names)
    assert len({name[:2] for name in names}) == len(names)  # each has a number of its own


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run_from_top_to_bottom(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "/home/" not in json.dumps(outputs) and "/tmp/" not in json.dumps(outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_logic_of_its_own(path: Path) -> None:
    for cell in code_cells(path):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, LOGIC)], cell.source


@pytest.mark.slow
@pytest.mark.timeout(2 * MOST_SECONDS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    copy = Path(shutil.copy(path, tmp_path))
    notebook = nbformat.read(copy, as_version=4)
    stored = shown(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=MOST_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises on the first cell that does
    assert shown(notebook) == stored  # figures differ from run to run, what kind of thing each cell shows does not
