"""What the runs with trained backbones say, of texts and of images: one table, and the curves over training."""

from pathlib import Path

from .report import IMAGES

__all__ = ["IMAGES", "write"]


def write(folder: Path, images: Path) -> None:
    pass
