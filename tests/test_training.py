"""HIER is safe beside a base loss whose gradient is small, where the weight of the paper is not."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses, miners
from sklearn.datasets import load_digits

from hierloss import HIERLoss, ReciprocalNeighborMiner

DATA = Path(__file__).parents[2] / "shared" / "data"
EMBEDDING_SIZE = 64


def digits():
    """8 x 8 images, ten classes."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


def omniglot():
    """28 x 28 images, 136 handwritten characters."""
    images, characters = [], []
    with zipfile.ZipFile(DATA / "omniglot_small1.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png") and "__MACOSX" not in n):
            image = Image.open(io.BytesIO(archive.read(name))).convert("L").resize((28, 28), Image.Resampling.BOX)
            images.append(1 - np.asarray(image, np.float32) / 255)
            characters.append(Path(name).parent)
    labels = np.unique(np.array(characters, str), return_inverse=True)[1]
    return torch.from_numpy(np.stack(images)).unsqueeze(1), torch.from_numpy(labels)


def make_network(size):
    """Convolutions, LayerNorm and a linear head, trained from scratch."""
    layers, channels = [], 1
    for out in (16, 32, 64)[: 2 if size < 16 else 3]:
        layers += [torch.nn.Conv2d(channels, out, 3, padding=1), torch.nn.MaxPool2d(2)]
        layers += [torch.nn.GroupNorm(4, out), torch.nn.ReLU()]
        channels, size = out, size // 2
    width = channels * size**2
    head = torch.nn.Linear(width, EMBEDDING_SIZE)
    torch.nn.init.orthogonal_(head.weight)
    norm = torch.nn.LayerNorm(width, elementwise_affine=False)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), norm, head)


def recall_at_1(images, labels, gradient_ratio, seed, steps, lr):
    """In percent, among the odd classes, of a network trained with MultiSimilarity on the even ones."""
    torch.manual_seed(seed)
    network = make_network(images.shape[-1])
    base, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    hier = HIERLoss(64, EMBEDDING_SIZE, miner=ReciprocalNeighborMiner(20, 10), gradient_ratio=gradient_ratio)
    optimizer = torch.optim.Adam([{"params": network.parameters(), "lr": lr}, {"params": hier.parameters()}], 1e-2)
    rows_of = [torch.where(labels == label)[0] for label in labels.unique()[::2]]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        classes = torch.randperm(len(rows_of), generator=generator)[:18].tolist()
        own = max(5, 90 // len(classes))
        rows = torch.cat([rows_of[c][torch.randperm(len(rows_of[c]), generator=generator)[:own]] for c in classes])
        embeddings, targets = network(images[rows]), labels[rows]
        loss = base(embeddings, targets, miner(embeddings, targets))
        if gradient_ratio != 0:
            loss = loss + hier(embeddings, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = torch.isin(labels, labels.unique()[1::2])
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(network(images[held_out]))
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1)
    return 100 * float((labels[held_out][nearest] == labels[held_out]).float().mean())


def compare(data, ratios, seeds, **kwargs):
    """Mean R@1 for each ratio of gradients: 0 is the base loss alone, ``None`` is lambda = 1."""
    return [np.mean([recall_at_1(*data, ratio, seed, **kwargs) for seed in range(seeds)]) for ratio in ratios]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"needs the real data in {DATA.name}")
def test_omniglot():
    """MultiSimilarity has a small gradient here, and lambda = 1 stops it from learning."""
    alone, held, lambda_1 = compare(omniglot(), (0, 0.3, None), seeds=2, steps=100, lr=3e-3)
    assert held > alone - 2
    assert lambda_1 < alone - 30


def test_digits():
    """HIER is safe in small too, always at hand; lambda = 1 is no problem here. Seeds differ by 0.7 points."""
    alone, held = compare(digits(), (0, 0.3), seeds=6, steps=60, lr=1e-2)
    assert held > alone - 1
