"""Scores of retrieval against a known taxonomy, for PML's testers. Not in ``import hierloss``: it loads slowly."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import accuracy_calculator as pml
from torch import Tensor

from ._checks import to_numpy
from .metrics import average_precisions


class HierarchicalAccuracyCalculator(pml.AccuracyCalculator):  # type: ignore[misc]
    """PML's `AccuracyCalculator` with scores of the superclasses, for any ``knn_func``.

    - ``superclass_precision_at_1``: share of queries whose nearest neighbour has the same superclass.
    - ``superclass_precision_at_k``: share of the ``k`` nearest neighbours that have the same superclass.
    - ``hierarchical_average_precision``: H-AP, see `metrics.hierarchical_average_precision`. It ranks all
      references for every query, in ``O(NM)`` memory.

    The superclass is that of the first level above the classes; H-AP uses all levels, and is a mean over queries
    also with ``avg_of_avgs`` and ``return_per_class``. Queries without a relevant reference do not count.

    Args:
        taxonomy: a mapping from each label to its superclass, or to several superclasses from fine to coarse,
            equally long for all labels. Or a text file of a tree whose leaves are the labels: each line is
            ``parent child``, and there is one root, which is not a superclass.
        **kwargs: PML's options: ``include``, ``knn_func``, ``device`` and so on. Without ``k``, all references are
            neighbours, so ``superclass_precision_at_k`` is left out.

    Raises:
        ValueError: a taxonomy without superclasses, or with different numbers of them; ``include`` with
            ``superclass_precision_at_k`` but no ``k``; in use, a label that the taxonomy does not have.

    Example:
        >>> scores = ("superclass_precision_at_1", "hierarchical_average_precision")
        >>> calculator = HierarchicalAccuracyCalculator({0: 7, 1: 7, 2: 8}, include=scores)
        >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> calculator.get_accuracy(points, torch.tensor([0, 1, 2, 2]))
        {'hierarchical_average_precision': 1.0, 'superclass_precision_at_1': 1.0}

    Source: Ramzi et al., "Hierarchical Average Precision Training for Pertinent Image Retrieval" (ECCV 2022).
    """

    def __init__(self, taxonomy: Mapping[int, Any] | str | PathLike[str], **kwargs: Any) -> None:
        if kwargs.get("k") is None:
            if (at_k := "superclass_precision_at_k") in kwargs.get("include", ()):
                raise ValueError(f"k must be given for {at_k}, got None: it would be the same for all embeddings")
            kwargs["exclude"] = [*kwargs.get("exclude", ()), at_k]
        super().__init__(**kwargs)
        given = taxonomy if isinstance(taxonomy, Mapping) else _read_edges(Path(taxonomy))
        chains = [np.ravel(to_numpy(above)).tolist() for above in given.values()]
        depths = {len(chain) for chain in chains}
        if len(depths) != 1 or depths == {0}:
            got = " and ".join(map(str, sorted(depths))) or "no label"
            raise ValueError(f"taxonomy must give labels the same number of superclasses, at least one, got {got}")
        levels = [np.unique(np.array(level), return_inverse=True)[1] for level in zip(*chains, strict=True)]
        try:
            labels = [int(label) for label in given]
        except ValueError as error:
            raise ValueError(f"taxonomy must have integer labels: {error}") from None
        if (largest := max(map(abs, labels))) > 2**24:
            raise ValueError(f"taxonomy must have labels up to 2**24, because PML's are float32, got {largest}")
        if len(set(labels)) < len(labels):
            raise ValueError("taxonomy must have each label once, but some are the same number, as 1 and 01")
        self._superclasses = dict(zip(labels, np.stack([labels, *levels], 1), strict=True))

    def requires_knn(self) -> list[str]:
        own = ["superclass_precision_at_1", "superclass_precision_at_k", "hierarchical_average_precision"]
        return [*super().requires_knn(), *own]

    def calculate_superclass_precision_at_1(self, knn_labels: Tensor, **arguments: Any) -> Any:
        return self.calculate_superclass_precision_at_k(knn_labels[:, :1], **arguments)

    def calculate_superclass_precision_at_k(
        self, knn_labels: Tensor, query_labels: Tensor, reference_labels: Tensor, ref_includes_query: bool,
        **_: Any,
    ) -> Any:  # fmt: skip
        own, other = (
            torch.from_numpy(self._taxonomy(values)[:, 1]) for values in (query_labels, reference_labels)
        )
        counts = pml.get_label_match_counts(own, other, pml.EQUALITY)
        counted = pml.get_lone_query_labels(own, counts, ref_includes_query, pml.EQUALITY)[1]
        if not counted.any() or knn_labels.shape[1] == 0:  # PML requests 0 neighbours if no two labels are equal
            return pml.nan_accuracy(counts[0], self.return_per_class)
        found = torch.from_numpy(self._taxonomy(knn_labels)[..., 1])
        options = self.avg_of_avgs, self.return_per_class, pml.EQUALITY
        return pml.precision_at_k(found[counted], own[counted][:, None], found.shape[1], *options)

    def calculate_hierarchical_average_precision(
        self, query: Tensor, reference: Tensor, query_labels: Tensor, reference_labels: Tensor,
        ref_includes_query: bool, **_: Any,
    ) -> float:  # fmt: skip
        nearest = self.knn_func(query, len(reference) - ref_includes_query, reference, ref_includes_query)[1]
        own, other = self._taxonomy(query_labels), self._taxonomy(reference_labels)
        scores = average_precisions(own, (other[order] for order in nearest.cpu().numpy()))
        return float(scores.mean()) if len(scores) else float("nan")

    def _taxonomy(self, labels: Tensor) -> np.ndarray:
        """Class and superclasses of labels ``(...)``, shape ``(..., L)``, from fine to coarse."""
        values, index = np.unique(labels.cpu().numpy().astype(int), return_inverse=True)
        if missing := [value for value in values.tolist() if value not in self._superclasses]:
            raise ValueError(f"taxonomy must have a superclass for each label, got none for {missing[:5]}")
        rows = np.stack([self._superclasses[value] for value in values.tolist()])
        return rows[index.reshape(labels.shape)]


def _read_edges(file: Path) -> dict[str, list[str]]:
    """The nodes above each leaf, from fine to coarse, without the root."""
    parents: dict[str, str] = {}
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        if len(words := line.split()) not in (0, 2):
            raise ValueError(f"{file}, line {number}: expected a parent and a child, got {line!r}")
        if words and (other := parents.setdefault(words[1], words[0])) != words[0]:
            raise ValueError(f"{file}, line {number}: {words[1]} has two parents, {other} and {words[0]}")
    if len(roots := set(parents.values()) - parents.keys()) > 1:
        raise ValueError(f"{file}: expected one root above all nodes, got {' and '.join(sorted(roots)[:3])}")
    above: dict[str, list[str]] = {}
    for leaf in parents.keys() - set(parents.values()):
        node, above[leaf] = leaf, []
        while (node := parents[node]) in parents:
            above[leaf].append(node)
            if len(above[leaf]) > len(parents):
                raise ValueError(f"{file}: the nodes above {leaf} form a cycle")
    return above
