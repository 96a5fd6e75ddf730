"""The four datasets, as they are unpacked, and their conventions of evaluation."""

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.datasets.base_dataset import BaseDataset
from pytorch_metric_learning.datasets.cars196 import Cars196
from pytorch_metric_learning.datasets.cub import CUB
from pytorch_metric_learning.datasets.sop import StanfordOnlineProducts
from torchvision.transforms import v2

__all__ = ["BENCHMARKS", "Benchmark", "InShop", "eval_transform", "train_transform"]


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


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A dataset and how it is evaluated.

    Without a gallery, every image of the query split is searched for among the others.
    """

    dataset: type[BaseDataset]
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
