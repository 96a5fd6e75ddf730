"""Measurements that the documentation quotes: ``python -m benchmarks --help``, and of each module."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # trees.py, data from a known tree
