"""Fused kernels that make small PyTorch networks fast, behind a drop-in ``nn.Module``.

Swap :class:`FusedResearchNet` in for your own network, or call :func:`fuse` on any model.
"""

from pathlib import Path as _Path

from ._version import __version__

# The Triton kernels stand at the top of the source tree, beside this package. An installed
# package holds them itself; in a checkout the path finds them where they are.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from . import backends, functional, ops
from .backends import use_backend
from .export import decompose
from .fuse import FuseReport, fuse, unfuse
from .modules import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    LinearReLU,
    Normalize,
)
from .synchronize import synchronize_batch_norm
from .training import TrainStep

backends.start()

__all__ = [
    "BatchNormLeakyReLU",
    "FuseReport",
    "FusedResearchNet",
    "FusedSequential",
    "LinearReLU",
    "Normalize",
    "TrainStep",
    "__version__",
    "decompose",
    "functional",
    "fuse",
    "ops",
    "synchronize_batch_norm",
    "unfuse",
    "use_backend",
]
