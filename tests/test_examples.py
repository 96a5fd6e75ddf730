"""Every example runs by itself, in a short setting, and does what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, folder):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help(name, tmp_path):
    assert "usage:" in run(name, "--help", folder=tmp_path)


@pytest.mark.slow
def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--seeds", 2, "--epochs", 2, folder=tmp_path)
    assert "ProxyAnchor + HIER" in printed
    assert "difference (95% interval)" in printed
    assert (tmp_path / "quickstart.png").stat().st_size > 20_000


@pytest.mark.slow
def test_hierarchy_report(tmp_path):
    printed = run("hierarchy_report.py", "--epochs", 2, "--samples", 60, folder=tmp_path)
    assert "HIER, learned proxies" in printed
    assert "Ward linkage of the embeddings" in printed
    folder = tmp_path / "hierarchy"
    assert {path.name for path in folder.iterdir()} == {"disk.png", "dendrogram.png", "hierarchy.html"}
    assert "<script" in (folder / "hierarchy.html").read_text()
