"""Seeds every test, runs the code blocks of the Markdown files, gives doctests of ``src/`` what they all need."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser


def seed(_: dict[str, Any]) -> None:
    torch.manual_seed(0)


# They need what only the extras docs and benchmarks have.
collect_ignore_glob = ["docs/*.py", "tests/torchvision_operators.py"]
if find_spec("datasets") is None:  # of the extra sentence-transformers
    collect_ignore_glob.append("src/hierloss/sentence_transformers.py")

# The blocks of one file share a namespace, and run in order.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md", "docs/**/*.md"], setup=seed
).pytest()


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time(request: pytest.FixtureRequest) -> None:
    seed({})
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("doctest_namespace")["torch"] = torch
