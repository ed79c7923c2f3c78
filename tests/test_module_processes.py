"""Modules in several processes: Hogwild over shared memory, DataLoader workers."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from support.drop_in import KINDS, drop_in, rows
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.parametrize("kind", KINDS)
STEPS = 40


def train(net, seed):
    """One Hogwild worker: steps on the shared parameters without any lock."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    x = rows(64)
    target = x[:, :5].sin()
    for step in range(STEPS):
        picked = torch.randperm(64, generator=torch.Generator().manual_seed(seed + step))[:32]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x[picked]), target[picked]).backward()
        optimizer.step()


@pytest.mark.parametrize("start", ["spawn", pytest.param("fork", marks=pytest.mark.slow)])
def test_hogwild_workers_train_the_shared_network(kind, start):
    _, net = drop_in(kind)
    x = rows(64)

    def loss():
        with torch.no_grad():
            return torch.nn.functional.mse_loss(net.eval()(x), x[:, :5].sin()).item()

    net(x)  # a plan exists and must not travel
    before = loss()
    net.train().share_memory()
    assert all(parameter.is_shared() for parameter in net.parameters())
    context = mp.get_context(start)
    workers = [context.Process(target=train, args=(net, 1000 * i)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    assert loss() < 0.8 * before
    counter = next(b for n, b in net.named_buffers() if n.endswith("num_batches_tracked"))
    assert STEPS < counter <= 2 * STEPS + 1


class Encoded(Dataset):
    """Samples that a fused network makes in the worker."""

    def __init__(self, net):
        self.net = net

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.net(rows(4, seed=index))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_run_the_network(kind, start):
    eager, fused = (net.eval() for net in drop_in(kind))
    fused(rows())
    loader = DataLoader(Encoded(fused), batch_size=4, num_workers=1, multiprocessing_context=start)
    outputs = torch.cat([batch.flatten(0, 1) for batch in loader])
    expected = torch.cat([eager(rows(4, seed=index)) for index in range(8)])
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
