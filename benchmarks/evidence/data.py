"""Tables of frozen features with a taxonomy, split by class: no class is both trained on and retrieved among."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# File, array of the features, and arrays of the labels from fine to coarse.
TABLES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cub": ("cub200_2010_features.npz", "features", ("label", "family")),
    "fashion": ("fashion_features.npz", "features", ("label", "sub", "master")),
    "grocery": ("grocery_features.npz", "features", ("label", "coarse", "department")),
}


class Part(NamedTuple):
    """Features ``(N, F)`` and their taxonomy ``(N, L)``, from fine to coarse."""

    features: Tensor
    taxonomy: Tensor


class Split(NamedTuple):
    """Samples of classes to train on, to choose settings on, and to test on."""

    train: Part
    validation: Part
    test: Part


def load(name: str, folder: Path) -> Part:
    """A whole table."""
    file, features, levels = TABLES[name]
    with np.load(folder / file, allow_pickle=True) as arrays:
        numbered = [np.unique(arrays[level], return_inverse=True)[1] for level in levels]
        return Part(torch.from_numpy(arrays[features]).float(), torch.from_numpy(np.stack(numbered, 1)))


def split(table: Part, seed: int) -> Split:
    """Half of the classes for testing, a sixth for validation, a third for training; other ones for each seed."""
    fine = table.taxonomy[:, 0]
    classes = torch.randperm(int(fine.max()) + 1, generator=torch.Generator().manual_seed(seed))
    half, sixth = len(classes) // 2, len(classes) // 6
    chosen = classes[half + sixth :], classes[half : half + sixth], classes[:half]
    rows = [torch.isin(fine, part) for part in chosen]
    return Split(*(Part(table.features[r], table.taxonomy[r]) for r in rows))
