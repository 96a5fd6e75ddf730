"""The features by which a loss finds neighbours, in a ``with`` block."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor


class NeighborFeatures:
    """Features for the calls of one loss until the end of a block, in the thread of that block."""

    def __init__(self) -> None:
        self._of_threads: dict[int, Tensor] = {}
        self._unused: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._of_threads)

    def take(self) -> Tensor | None:
        """The features of the innermost block in this thread."""
        self._unused.discard(get_ident())
        return self._of_threads.get(get_ident())

    @contextmanager
    def use(self, features: Tensor) -> Iterator[None]:
        """A block with these features. It warns if there was no call in it."""
        thread = get_ident()
        outer = self._of_threads.get(thread)
        self._of_threads[thread] = features
        self._unused.add(thread)
        try:
            yield
            if thread in self._unused:
                warnings.warn(
                    "a neighbors_from block ended without a call of its HIERLoss, so its features had no effect; "
                    "call the loss within the block",
                    stacklevel=3,  # the with statement
                )
        finally:
            self._unused.discard(thread)
            del self._of_threads[thread]
            if outer is not None:
                self._of_threads[thread] = outer
