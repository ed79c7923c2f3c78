"""Keep checkpoints in safetensors: saved from a fused network, loaded into a plain one, and back.

python examples/safetensors_checkpoint.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from fused_mlp import FusedResearchNet
from fused_mlp.eager import IntelligentResearchNetwork


def copy_through_file(source: nn.Module, target: nn.Module, path: Path) -> None:
    """Save the parameters and buffers of ``source`` and load them into ``target``."""
    save_model(source, str(path))
    load_model(target, str(path))


def main() -> None:
    fused = FusedResearchNet(10, [64, 32], 5)
    fused(torch.randn(32, 10))  # the batch norm's running statistics move
    plain = IntelligentResearchNetwork(10, [64, 32], 5)
    again = FusedResearchNet(10, [64, 32], 5)
    with tempfile.TemporaryDirectory() as folder:
        copy_through_file(fused, plain, Path(folder) / "fused.safetensors")
        copy_through_file(plain, again, Path(folder) / "plain.safetensors")
    data = torch.randn(4, 10)
    with torch.inference_mode():
        outputs = [net.eval()(data) for net in (fused, plain, again)]
    print(f"largest difference {max((o - outputs[0]).abs().max().item() for o in outputs):.1e}")


if __name__ == "__main__":
    main()
