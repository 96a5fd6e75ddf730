"""A warning for users who forget to give the proxies of a loss to the optimizer."""

import warnings

import torch
from torch import Tensor

__all__ = ["OptimizerWatch"]

_FORGOTTEN_AFTER = 100
"""Updates of the model without one of the proxies after which the warning comes."""


class OptimizerWatch:
    """Warns once if an optimizer updates the model and none ever updates the proxies.

    An update in place raises the version of a parameter, which costs nothing to read.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from here, after the proxies were set by something else than an optimizer."""
        self._updates: int | None = 0
        self._versions: tuple[int, int | None] | None = None

    def check(self, proxies: Tensor, embeddings: Tensor) -> None:
        """Compare the versions with those of the last training step."""
        if self._updates is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        model = _first_version(embeddings)
        if not proxies.requires_grad or (model is None and proxies.grad is None):
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
            # Some optimizers write to .data, which leaves the version as it was.
            if torch.equal(proxies.detach().sum(), self._start):
                warnings.warn(
                    f"the proxies of HIERLoss did not change in {_FORGOTTEN_AFTER} training steps: no optimizer "
                    "has them. Build it with the parameters of both, "
                    "torch.optim.Adam([*model.parameters(), *loss_func.parameters()]); in a trainer of PML it is "
                    "the metric_loss_optimizer",
                    stacklevel=5,  # the line that calls the loss
                )


def _first_version(embeddings: Tensor) -> int | None:
    """The version of a parameter that the embeddings depend on, ``None`` if there is none."""
    node = embeddings.grad_fn
    while node is not None and not hasattr(node, "variable"):  # a node that accumulates has its variable
        node = next((above for above, _ in node.next_functions if above is not None), None)
    return None if node is None else node.variable._version
