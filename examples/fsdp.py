"""Train with fully_shard (FSDP2), stop, and go on with another number of processes.

    torchrun --standalone --nproc-per-node 2 examples/fsdp.py --checkpoint /tmp/digits --epochs 5
    torchrun --standalone --nproc-per-node 3 examples/fsdp.py --checkpoint /tmp/digits --epochs 10

Parameters and the optimizer's state lie in shards, in memory and in the checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_mlp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of checkpoints")
    parser.add_argument("--epochs", type=int, default=10, help="of all runs together")
    options = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32, device=kind) / 16
    labels = torch.tensor(labels, device=kind)

    torch.manual_seed(0)
    net = fused_mlp.FusedResearchNet(64, [64, 32], 10, dropout=0.0, device=kind)
    fused_mlp.synchronize_batch_norm(net)
    fully_shard(net, mesh=init_device_mesh(kind, (processes,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)

    epoch = 0
    saved = sorted(options.checkpoint.glob("epoch-*"))
    if saved:
        state = state_of(net, optimizer, epoch)
        checkpoint.load(state, checkpoint_id=saved[-1])
        set_state_dict(
            net,
            optimizer,
            model_state_dict=state["net"],
            optim_state_dict=state["optimizer"],
        )
        epoch = state["epoch"]

    while epoch < options.epochs:
        total = torch.zeros((), device=kind)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            mine = batch.tensor_split(processes)[rank].to(kind)
            loss = F.cross_entropy(net(images[mine]), labels[mine], reduction="sum")
            optimizer.zero_grad()
            (loss * processes / len(batch)).backward()  # fully_shard takes the mean over processes
            optimizer.step()
            total += loss.detach()
        distributed.all_reduce(total)
        if rank == 0:
            print(f"{processes} processes  epoch {epoch}  loss {total.item() / len(images):.6f}")
        epoch += 1

    folder = options.checkpoint / f"epoch-{epoch:03}"
    checkpoint.save(state_of(net, optimizer, epoch), checkpoint_id=folder)
    distributed.destroy_process_group()


def state_of(net: torch.nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> dict:
    """Return what a checkpoint holds."""
    net_state, optimizer_state = get_state_dict(net, optimizer)
    return {"net": net_state, "optimizer": optimizer_state, "epoch": epoch}


if __name__ == "__main__":
    main()
