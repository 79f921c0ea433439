"""docs/quickstart.ipynb runs from top to bottom."""

import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_it_has_code_that_can_be_read_and_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        compile(cell.source, "cell", "exec")
        assert (cell.outputs, cell.execution_count) == ([], None)
    assert len(cells) > 4


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_it_runs_from_top_to_bottom_in_any_folder(tmp_path, monkeypatch):
    """In a kernel of its own, as a user's, where there is nothing but the package."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("QUICKSTART_PATH", str(ROOT)))
    for name in ("OMP_NUM_THREADS", "B2DIFFURL_STARTED_IN"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    experiments = {path.parent.name for path in (tmp_path / "model" / "lora").glob("*/report.html")}
    assert experiments == {"quickstart", "shapes_flow_height"}
    assert (tmp_path / "log" / "quickstart.log").is_file()
