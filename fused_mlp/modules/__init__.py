"""The modules: what a user puts in a network in place of plain ``torch.nn`` ones."""

from .layers import BatchNormLeakyReLU, LinearReLU, Normalize
from .research_net import FusedResearchNet
from .sequential import FusedSequential

__all__ = [
    "BatchNormLeakyReLU",
    "FusedResearchNet",
    "FusedSequential",
    "LinearReLU",
    "Normalize",
]
