"""HIER, hierarchical regularization on the Poincaré ball, for pytorch-metric-learning."""

from . import functional, poincare
from .distances import PoincareDistance
from .losses import HIERLoss
from .miners import ReciprocalNeighborMiner
from .modules import FromPoincare, ToPoincare

__version__ = "0.1.0"

__all__ = [
    "FromPoincare",
    "HIERLoss",
    "PoincareDistance",
    "ReciprocalNeighborMiner",
    "ToPoincare",
    "functional",
    "poincare",
]
