"""What HIERLoss warns of: forgotten proxies, too few points, and a gradient ratio without effect or too large."""

import warnings
from collections import Counter

import torch
from torch import Tensor

_FORGOTTEN_AFTER = 100  # updates of the model without an update of the proxies, before the warning is given
_SMALL_AFTER = 10  # consecutive steps without triplets: the last batch of an epoch can be small
_LARGE_AFTER = 100  # consecutive backward passes with a gradient larger than all others, before a warning


class OptimizerWatch:
    """Warns once if an optimizer updates the model, but no optimizer ever updates the proxies.

    An in-place update increments the version of a parameter. Reading the version costs no time.
    """

    def __init__(self) -> None:
        self._updates: int | None = 0
        self._versions: tuple[int, int | None] | None = None

    def check(self, proxies: Tensor, embeddings: Tensor) -> None:
        """Compare the versions with those of the last training step."""
        if self._updates is None or not proxies.requires_grad or not torch.is_grad_enabled():
            return
        model = _first_version(embeddings)
        if model is None and proxies.grad is None:
            return
        if self._versions is None:
            self._start = proxies.detach().sum()
        elif self._versions[0] != proxies._version:
            self._updates = None
            return
        elif model is None or self._versions[1] != model:  # without a model, each step counts
            self._updates += 1
        self._versions = proxies._version, model
        if self._updates == _FORGOTTEN_AFTER:
            self._updates = None
            # Some optimizers write to .data, which does not change the version.
            if torch.equal(proxies.detach().sum(), self._start.to(proxies)):
                warnings.warn(
                    f"the proxies of HIERLoss did not change in {_FORGOTTEN_AFTER} training steps: no optimizer "
                    "has them. Use torch.optim.Adam([*model.parameters(), *loss_func.parameters()]); in a trainer "
                    "of PML, it is the metric_loss_optimizer",
                    stacklevel=5,  # the line that calls the loss
                )


def _first_version(embeddings: Tensor) -> int | None:
    """The version of a parameter that the embeddings depend on, ``None`` if there is none."""
    node = embeddings.grad_fn
    while node is not None:
        if isinstance(variable := getattr(node, "variable", None), Tensor):  # of a gradient accumulator
            return variable._version
        node = next((above for above, _ in node.next_functions if above is not None), None)
    return None


class Reports:
    """The other warnings of a loss, each given once."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()

    def _is_due(self, name: str, holds: bool, after: int = 1) -> bool:
        """Whether ``holds`` has been true ``after`` times in a row, for the first time."""
        count = self._in_a_row[name]
        self._in_a_row[name] = count + 1 if holds or count >= after else 0
        return self._in_a_row[name] == after

    def size(self, points: str, size: int, num_neighbors: int) -> None:
        """How many embeddings or proxies a step has. All of a few are neighbours of each other."""
        if self._is_due(points, size <= num_neighbors, _SMALL_AFTER):
            warnings.warn(
                f"HIERLoss has no triplets of {points}: in {_SMALL_AFTER} steps in a row, their number ({size} in "
                f"the last) was at most num_neighbors={num_neighbors}. Use more {points}, or fewer neighbours, "
                "well below that number: HIERLoss(miner=ReciprocalNeighborMiner(num_neighbors=...))",
                stacklevel=5,  # the line that calls the loss
            )

    def alone(self, ratio: float | None) -> None:
        """No other loss used the same tensor."""
        if self._is_due("alone", True):
            warnings.warn(
                f"gradient_ratio={ratio} had no effect: no other gradient reached the embeddings of HIERLoss. "
                "Call losses.MultipleLosses([base, hier])(embeddings, labels).backward(), or give the same tensor "
                "to all losses and call backward() once for their sum. Make one copy such as embeddings.float() "
                "for all; DistributedLossWrapper makes one each. If HIERLoss is alone, pass gradient_ratio=None",
                stacklevel=6,  # the line that calls backward()
            )

    def large(self, ratio: float) -> None:
        """The ratio of a backward pass in which nothing was scaled."""
        if self._is_due("large", ratio > 1, _LARGE_AFTER):
            warnings.warn(
                "the gradient of HIERLoss at the embeddings was larger than that of all other losses in "
                f"{_LARGE_AFTER} backward passes in a row ({ratio:.2g} times, in the last one), which can stop "
                "the base loss from learning; use HIERLoss(gradient_ratio=0.1), or a smaller weight",
                stacklevel=7,  # the line that calls backward()
            )
