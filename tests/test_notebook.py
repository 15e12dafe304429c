"""The notebook runs from top to bottom in a real kernel."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("ROUNDS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "which_clients_count.ipynb", 4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    printed = "".join(o["text"] for o in outputs if o.output_type == "stream")
    shown = [
        output["data"]["text/plain"] for output in outputs if "text/plain" in output.get("data", {})
    ]
    assert any("doubting_mean(temperature=0.5)" in text for text in shown)
    # A bar for each run, to its end; and no complaint about a missing widget.
    assert "our own, seed 1: 100%" in printed
    assert "IProgress" not in printed
