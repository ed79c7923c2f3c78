"""Say once, for each kind of device, that the fused ops have no kernels there."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def reference_runs(device: str) -> None:
    """Warn that plain PyTorch computes the ops on a device type; once a process and type."""
    if device == "meta":
        text = "meta tensors hold no values: only shapes and dtypes are worked out"
    else:
        text = (
            f"there are no kernels for {device}: the ops run on plain PyTorch there, with the "
            "same results. On the CPU and on NVIDIA and AMD GPUs they are fused"
        )
    warnings.warn(f"fused_mlp: {text}.", stacklevel=2)
