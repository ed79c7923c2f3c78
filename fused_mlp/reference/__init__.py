"""What each op means, in plain PyTorch.

This is the oracle of the tests, the implementation on devices and machines without kernels of
ours, and the formula that double backward, ``torch.func`` transforms and forward-mode AD
differentiate. Functions named like a kernel have that kernel's signature (ops/schemas.py); the
``*_formula`` functions are differentiable and return the output alone.
"""

from __future__ import annotations

from .batch_norm_act import (
    batch_norm_act,
    batch_norm_act_backward,
    batch_norm_act_formula,
    batch_norm_leaky_relu,
    batch_norm_leaky_relu_backward,
    batch_norm_leaky_relu_formula,
    linear_batch_norm_act,
)
from .compiled import (
    mlp_compiled,
    mlp_compiled_backward,
    mlp_compiled_evaluate,
    research_net_compiled,
    research_net_compiled_backward,
)
from .linear_act import (
    activate_and_drop,
    linear_act,
    linear_act_backward,
    linear_act_formula,
    linear_relu,
    linear_relu_backward,
    linear_relu_formula,
)
from .normalize import (
    normalize,
    normalize_backward,
    normalize_formula,
)
from .research_net import (
    research_net,
    research_net_backward,
    research_net_compiled_evaluate,
    research_net_formula,
)
from .statistics import (
    accumulate_dtype,
)

__all__ = [
    "accumulate_dtype",
    "activate_and_drop",
    "batch_norm_act",
    "batch_norm_act_backward",
    "batch_norm_act_formula",
    "batch_norm_leaky_relu",
    "batch_norm_leaky_relu_backward",
    "batch_norm_leaky_relu_formula",
    "linear_act",
    "linear_act_backward",
    "linear_act_formula",
    "linear_batch_norm_act",
    "linear_relu",
    "linear_relu_backward",
    "linear_relu_formula",
    "mlp_compiled",
    "mlp_compiled_backward",
    "mlp_compiled_evaluate",
    "normalize",
    "normalize_backward",
    "normalize_formula",
    "research_net",
    "research_net_backward",
    "research_net_compiled",
    "research_net_compiled_backward",
    "research_net_compiled_evaluate",
    "research_net_formula",
]
