import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w./])/\w+/|\b[A-Z]:\\")


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("JAXSPARSE_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": path.parent}}
    ).execute()  # raises if a cell raises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_are_those_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 300_000
    assert notebook.metadata.keys() <= {
        "kernelspec",
        "language_info",
    } and notebook.metadata.language_info.keys() == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)
    for output in (output for cell in cells for output in cell.outputs):
        assert (
            output.output_type in ("stream", "display_data", "execute_result")
            and output.get("name") != "stderr"
        )
        text = output.get("text") or output.data["text/plain"]
        assert not ABSOLUTE_PATH.search(text), text
