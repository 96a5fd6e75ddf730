"""The four data sets, split by class: what is trained on is never what is retrieved among.

Every other class is a test class; tuning never sees them. For tuning, the training classes are split once more,
half of them at random for each seed, into classes to train on and classes to validate on.
"""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor
from trees import sample_tree

__all__ = ["DATASETS", "Split", "load", "load_digits", "load_omniglot", "load_synthetic", "load_trec", "split"]

DATASETS = ("digits", "synthetic", "trec", "omniglot")


class Split(NamedTuple):
    """Inputs, and labels of shape ``(N, L)`` from fine to coarse, to train on and to retrieve among."""

    train: Tensor
    train_taxonomy: Tensor
    test: Tensor
    test_taxonomy: Tensor


def load(name: str, folder: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and taxonomy of a data set; ``seed`` is that of the synthetic tree."""
    if name == "digits":
        return load_digits()
    if name == "synthetic":
        return load_synthetic(seed)
    if folder is None:
        raise ValueError(f"{name} needs --data, a folder; --help says what is in it and where to get it")
    return {"trec": load_trec, "omniglot": load_omniglot}[name](folder)


def load_digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels; nothing is known above the ten classes."""
    images, digits = sklearn_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(digits)[:, None]


def load_synthetic(seed: int) -> tuple[Tensor, Tensor]:
    """A random tree of 4 x 4 x 4 classes, 20 samples each, another one for each seed.

    The tree is in 32 dimensions, among 96 of noise that has nothing to do with it, all turned together at random:
    which dimensions matter can be learned on some classes and holds for the others.
    """
    generator = torch.Generator().manual_seed(seed)
    tree, taxonomy = sample_tree(generator, branching=(4, 4, 4), scales=(0.5, 0.5, 0.5), noise=0.5)
    features = torch.cat([tree, 0.8 * torch.randn(len(tree), 96, generator=generator)], 1)
    turn = torch.linalg.qr(torch.randn(128, 128, generator=generator)).Q
    return features @ turn, taxonomy


def load_trec(folder: Path) -> tuple[Tensor, Tensor]:
    """Features and labels (fine, coarse) of the TREC questions."""
    with np.load(folder / "trec_questions.npz", allow_pickle=True) as file:
        features, names = torch.from_numpy(file["embeddings"].astype(np.float32)), file["label"]
    return features, _numbered(names, [name.split(":")[0] for name in names])


def load_omniglot(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of 28 x 28 and labels (character, alphabet)."""
    images, alphabets, characters = [], [], []
    with zipfile.ZipFile(folder / "omniglot_small1.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png") and "__MACOSX" not in n):
            *_, alphabet, character, _ = name.split("/")
            image = Image.open(io.BytesIO(archive.read(name))).convert("L").resize((28, 28), Image.Resampling.BOX)
            images.append(1 - np.asarray(image, np.float32) / 255)
            alphabets.append(alphabet)
            characters.append(f"{alphabet}/{character}")
    return torch.from_numpy(np.stack(images)).unsqueeze(1), _numbered(characters, alphabets)


def _numbered(*levels: "list[str] | np.ndarray") -> Tensor:
    """Names as numbers, in the order of the alphabet, so that classes of one superclass are neighbours."""
    return torch.from_numpy(np.stack([np.unique(names, return_inverse=True)[1] for names in levels], 1))


def split(inputs: Tensor, taxonomy: Tensor, validation_seed: int | None = None) -> Split:
    """Split by class: test classes apart, or, with a seed, validation classes out of the training classes."""
    fine = taxonomy[:, 0]
    classes = fine.unique()
    training, held_out = classes[::2], classes[1::2]
    if validation_seed is not None:
        generator = torch.Generator().manual_seed(validation_seed)
        shuffled = training[torch.randperm(len(training), generator=generator)]
        training, held_out = shuffled[: -(len(shuffled) // 2)], shuffled[-(len(shuffled) // 2) :]
    train, test = torch.isin(fine, training), torch.isin(fine, held_out)
    return Split(inputs[train], taxonomy[train], inputs[test], taxonomy[test])
