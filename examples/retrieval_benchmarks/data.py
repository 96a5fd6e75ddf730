"""The four datasets, as they are unpacked, any folders of images, and their conventions of evaluation."""

import dataclasses
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.datasets.base_dataset import BaseDataset
from pytorch_metric_learning.datasets.cars196 import Cars196
from pytorch_metric_learning.datasets.cub import CUB
from pytorch_metric_learning.datasets.sop import StanfordOnlineProducts
from torchvision.transforms import v2

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "ImageFolders",
    "InShop",
    "eval_transform",
    "read_taxonomy",
    "train_transform",
]


SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class InShop(BaseDataset):  # type: ignore[misc]
    """In-shop Clothes Retrieval of DeepFashion, with its split into train, query and gallery.

    The root holds ``Eval/list_eval_partition.txt`` and the images in ``Img/img/``.
    """

    def get_available_splits(self) -> list[str]:
        return ["train", "query", "gallery"]

    def generate_split(self) -> None:
        partition = Path(self.root, "Eval", "list_eval_partition.txt")
        count, header, *rows = partition.read_text().splitlines()
        if header.split() != ["image_name", "item_id", "evaluation_status"] or int(count) != len(rows):
            raise ValueError(
                f"{partition} must have a count, the header 'image_name item_id evaluation_status', and as many "
                f"rows as the count says; got {count!r}, {header!r}, and {len(rows)} rows: unpack it again"
            )
        self.paths: list[str] = []
        self.labels: list[int] = []
        for row in rows:
            image, item, split = row.split()
            if split == self.split:
                self.paths.append(str(Path(self.root, "Img", image)))
                self.labels.append(int(item.removeprefix("id_")))

    def download_and_remove(self) -> None:
        raise NotImplementedError("In-Shop is given out on request by the authors of DeepFashion")


class ImageFolders(BaseDataset):  # type: ignore[misc]
    """A folder of images for each class; half of the classes are for training, rounded down.

    ``seed`` draws them. Without it, they are the first ones by name.
    """

    def __init__(self, root: str, split: str, transform: Any = None, *, seed: int | None = None) -> None:
        self.seed = seed
        super().__init__(root, split, transform)

    def get_available_splits(self) -> list[str]:
        return ["train", "test"]

    def generate_split(self) -> None:
        names = class_names(Path(self.root))
        order = torch.arange(len(names))
        if self.seed is not None:
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed))
        half = len(names) // 2
        chosen = sorted((order[:half] if self.split == "train" else order[half:]).tolist())
        images = [(path, label) for label in chosen for path in images_in(Path(self.root, names[label]))]
        self.paths = [str(path) for path, _ in images]
        self.labels = [label for _, label in images]

    def download_and_remove(self) -> None:
        raise NotImplementedError("a folder of images is your own")


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def class_names(root: Path) -> list[str]:
    """Folders with images. Their order is that of the labels."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and images_in(path))
    if len(names) < 4:
        raise ValueError(f"{root} must have a folder of images for each of at least 4 classes, got {len(names)}")
    return names


def read_taxonomy(file: Path, root: Path) -> torch.Tensor:
    """Number of the superclass for each class of a folder."""
    above: dict[str, str] = json.loads(file.read_text())
    names = class_names(root)
    missing = [name for name in names if name not in above]
    if missing:
        raise ValueError(
            f"{file} must have the superclass of every folder of {root}; "
            f"{len(missing)} are missing, the first is {missing[0]!r}"
        )
    superclasses = sorted(set(above.values()))
    return torch.tensor([superclasses.index(above[name]) for name in names])


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A dataset and how it is evaluated.

    Without a gallery, every image of the query split is searched for among the others.
    """

    dataset: Callable[..., BaseDataset]
    recall_at: Sequence[int]
    query: str = "test"
    gallery: str | None = None

    def train_set(self, root: Path, transform: Any) -> BaseDataset:
        """Training images, with labels from 0 to the number of classes less one."""
        dataset = self.dataset(str(root), "train", transform)
        dataset.target_transform = {c: i for i, c in enumerate(sorted(set(dataset.labels)))}.__getitem__
        return dataset


BENCHMARKS = {
    "cub": Benchmark(CUB, (1, 2, 4, 8)),
    "cars": Benchmark(Cars196, (1, 2, 4, 8)),
    "sop": Benchmark(StanfordOnlineProducts, (1, 10, 100, 1000)),
    "inshop": Benchmark(InShop, (1, 10, 20, 30), query="query", gallery="gallery"),
    "folder": Benchmark(ImageFolders, (1, 2, 4, 8)),
}

# Some images are grey, or CMYK.
TO_RGB = operator.methodcaller("convert", "RGB")


def train_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([TO_RGB, crop, v2.RandomHorizontalFlip(), *as_input(mean, std)])


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    # The middle 224 of 256 pixels, whatever the size.
    resize = v2.Resize(round(size * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([TO_RGB, resize, v2.CenterCrop(size), *as_input(mean, std)])


def as_input(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
