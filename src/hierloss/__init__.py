"""HIER, hierarchical regularization on the Poincaré ball, for pytorch-metric-learning."""

from . import functional, metrics, poincare
from .distances import PoincareDistance
from .hierarchy import Hierarchy
from .losses import HIERLoss
from .miners import ReciprocalNeighborMiner
from .modules import FromPoincare, ToPoincare
from .retrieval import PoincareKNN

__version__ = "0.1.0"

__all__ = [
    "FromPoincare",
    "HIERLoss",
    "Hierarchy",
    "PoincareDistance",
    "PoincareKNN",
    "ReciprocalNeighborMiner",
    "ToPoincare",
    "functional",
    "metrics",
    "poincare",
]
