"""The notebooks run from a fresh kernel, and find what they say. They are stored without outputs."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
# What must be true at the end.
RESULTS = {
    "add_hier": 'scores["ProxyAnchor + HIER"]["H-AP"] > scores["ProxyAnchor"]["H-AP"] + 1',
    "hierarchy": 'purity > 0.8 and ami > 0.8 and __import__("os").path.getsize("hierarchy.html") > 20_000',
    "search": "same == 1 and accuracy > 0.7",
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_tested_and_linked():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == RESULTS.keys()
    for name in RESULTS:
        link = f"https://colab.research.google.com/github/hierloss/hierloss/blob/main/notebooks/{name}.ipynb"
        assert link in read(name).cells[0].source
        for page in ("README.md", "docs/examples.md"):
            assert link in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RESULTS)
def test_notebooks_are_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "install" in code[0].metadata.tags
    assert code[0].source.startswith("%pip install -q ")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "result"), RESULTS.items())
def test_notebooks_run(name, result, tmp_path):
    pytest.importorskip("ipykernel")
    notebook = read(name)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    notebook.cells.append(nbformat.v4.new_code_cell(f"assert {result}"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text  # a warning that a reader would see
