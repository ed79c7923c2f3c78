"""The ops as torch knows them: schemas, autograd nodes and fake kernels.

Importing this package registers ``torch.ops.fused_mlp.*`` and ``torch.ops.fused_mlp_kernels.*``.
"""

from . import over_group, traced_mlp
from ._common import check_probability
from .batch_norm_act import batch_norm_act
from .batch_norm_leaky_relu import batch_norm_leaky_relu
from .linear_act import linear_act
from .linear_batch_norm_act import linear_batch_norm_act
from .linear_relu import linear_relu
from .normalize import normalize
from .research_net import research_net

__all__ = [
    "batch_norm_act",
    "batch_norm_leaky_relu",
    "check_probability",
    "linear_act",
    "linear_batch_norm_act",
    "linear_relu",
    "normalize",
    "over_group",
    "research_net",
    "traced_mlp",
]
