"""What some tests need."""

import shutil

import pytest
import torch

TORCH_CAN_COMPILE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
needs_compiler = pytest.mark.skipif(
    not (TORCH_CAN_COMPILE and shutil.which("g++")), reason="torch 2.7 and a C++ compiler are needed to compile"
)
