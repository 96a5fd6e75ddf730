"""A warning for users who forget to give the proxies of a loss to the optimizer."""

import warnings

import torch
from torch import Tensor

__all__ = ["OptimizerWatch"]

_FORGOTTEN_AFTER = 100  # updates of the model without an update of the proxies, before the warning is given


class OptimizerWatch:
    """Warns once if an optimizer updates the model, but no optimizer ever updates the proxies.

    An in-place update increments the version of a parameter. Reading the version costs no time.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Restart the count, after something other than an optimizer has changed the proxies."""
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
            # Some optimizers write to .data, which does not change the version.
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
    while node is not None and not hasattr(node, "variable"):  # only gradient accumulators have one
        node = next((above for above, _ in node.next_functions if above is not None), None)
    return None if node is None else node.variable._version
