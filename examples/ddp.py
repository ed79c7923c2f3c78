"""Train on the digits of scikit-learn with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Each process takes its share of every batch. The batch norm takes the statistics of all of it, so
the result is that of one process, whatever the number of processes.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import fused_mlp

EPOCHS, BATCH = 10, 64


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(labels, device=device)

    torch.manual_seed(0)
    net = fused_mlp.FusedResearchNet(64, [64, 32], 10, dropout=0.0, device=device)
    net = fused_mlp.synchronize_batch_norm(net)
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, momentum=0.9)

    for epoch in range(EPOCHS):
        total = torch.zeros((), device=device)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            mine = batch.tensor_split(processes)[rank].to(device)  # the last one may be uneven
            loss = F.cross_entropy(parallel(images[mine]), labels[mine], reduction="sum")
            optimizer.zero_grad()
            # DistributedDataParallel takes the mean over processes.
            (loss * processes / len(batch)).backward()
            optimizer.step()
            total += loss.detach()
        distributed.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch}  loss {total.item() / len(images):.6f}")

    net.eval()
    if rank == 0:
        accuracy = (net(images).argmax(1) == labels).float().mean().item()
        print(f"{processes} processes  accuracy {accuracy:.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
