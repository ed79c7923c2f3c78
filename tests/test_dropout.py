"""The dropout mask: a pure function of seed, row and column; the generator behind the seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import INTERPRETED, keep_mask, philox4x32

from fused_mlp import backends, dropout
from fused_mlp.functional import linear_relu, research_net

OP = torch.ops.fused_mlp.linear_relu
SEEDS = [(0, 0), (1, 2), (-1, -1), (2**63 - 1, 2**32 - 1), (-(2**63), 2**32), (0x123456789, -5)]
# Counter, key and result of ten rounds: the known answers Random123 ships (kat_vectors).
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def mask_of(rows: int, columns: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Return the mask the active backend applies: what is left of an output of ones."""
    weight = seed.new_zeros((columns, 1), dtype=torch.float32)
    bias = torch.ones_like(weight[:, 0])
    return OP(weight.new_zeros(rows, 1), weight, bias, p, seed) != 0


@pytest.mark.smoke
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    """The oracle of these tests and the package's Philox give Random123's known answers."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, answer)]
    oracle = philox4x32(tuple(np.array(word) for word in words[0]), tuple(words[1]))
    assert oracle.tolist() == words[2]
    ours = dropout._philox(
        tuple(torch.tensor(word) for word in words[0]),
        tuple(torch.tensor(word) for word in words[1]),
    )
    assert [int(word) for word in ours] == words[2]


def test_known_answer_through_the_op(device: torch.device) -> None:
    """Random123's first answer decides row 0, columns 0 to 7, under the seed (0, 0)."""
    halves = [
        n
        for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
        for n in (word & 0xFFFF, word >> 16)
    ]
    seed = torch.tensor([0, 0], device=device)
    for number in halves:
        at = mask_of(1, 8, number / 65536, seed)[0].tolist()
        above = mask_of(1, 8, (number + 1) / 65536, seed)[0].tolist()
        assert at == [n >= number for n in halves]
        assert above == [n >= number + 1 for n in halves]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33, 64, 257])
def test_mask_is_the_oracles(device: torch.device, seed: tuple[int, int], columns: int) -> None:
    rows = 17 if INTERPRETED else 300
    given = torch.tensor(seed, device=device)
    assert torch.equal(mask_of(rows, columns, 0.3, given), keep_mask(given, rows, columns, 0.3))
    assert torch.equal(
        dropout.keep_mask(given, rows, columns, 0.3, 2), keep_mask(given, rows, columns, 0.3, 2)
    )


@pytest.mark.parametrize(
    "p", [0.0, 1.0, 2**-17, 2**-16, 1.5 * 2**-16, 2.5 * 2**-16, 0.5, 1 - 2**-16, 1 - 1e-9, 1e-30]
)
def test_threshold(device: torch.device, p: float) -> None:
    """p is rounded half to even to a multiple of 2^-16, and nothing below the threshold is kept."""
    seed = torch.tensor([5, 6], device=device)
    assert torch.equal(mask_of(40, 100, p, seed), keep_mask(seed, 40, 100, p))


def test_extremes(device: torch.device) -> None:
    x, weight = torch.rand(20, 6, device=device) + 0.1, torch.rand(9, 6, device=device)
    x.requires_grad_()
    assert torch.equal(linear_relu(x, weight, None, 0.0, True), linear_relu(x, weight))
    y = linear_relu(x, weight, None, 1.0, True)
    assert (y == 0).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad == 0).all()
    y = linear_relu(x, weight, None, 1 - 1e-9, True)
    assert (y == 0).all()
    assert y.isfinite().all()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_keep_rate(device: torch.device, p: float) -> None:
    """The share of survivors lies within five standard deviations of its binomial law.

    A correct mask misses that once in 1.7 million runs (and these runs are seeded). Of 2^20
    elements it notices a p that is off by 0.5 % of the unit: at p = 0.5 the bound is 0.0024, so a
    shift of 0.005 lies more than ten standard deviations away.
    """
    rows, columns = (64, 128) if INTERPRETED else (4096, 256)
    seed = dropout.draw_seed(device)
    keep = mask_of(rows, columns, p, seed).double()
    n = rows * columns
    assert abs(keep.mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    for dim, count in ((0, rows), (1, columns)):  # no row and no column is special: Bonferroni
        rates = keep.mean(dim)
        assert (rates - (1 - p)).abs().max() < 6.5 * math.sqrt(p * (1 - p) / count) + 0.5 / count


def test_neighbours_are_independent(device: torch.device) -> None:
    """Correlations along rows, along columns, across streams and seeds are those of chance."""
    rows, columns = (64, 128) if INTERPRETED else (2048, 256)
    seed = torch.tensor([12, 34], device=device)
    base = mask_of(rows, columns, 0.5, seed).double() - 0.5
    bound = 5 * 0.25 / math.sqrt(rows * columns / 2)
    for shift in (1, 2, 3, 4, 7, 8, 9, 16):
        assert (base[:, shift:] * base[:, :-shift]).mean().abs() < bound
        assert (base[shift:] * base[:-shift]).mean().abs() < bound
    for other in ((12, 35), (13, 34), (12 + 2**32, 34), (34, 12)):
        mask = mask_of(rows, columns, 0.5, torch.tensor(other, device=device)).double() - 0.5
        assert (base * mask).mean().abs() < bound


def test_a_rows_mask_depends_on_its_index_only(device: torch.device) -> None:
    """More rows, other leading shapes and other threads leave every row's mask alone."""
    seed = torch.tensor([3, 1], device=device)
    rows = 40 if INTERPRETED else 1000
    full = mask_of(rows, 50, 0.4, seed)
    for count in (1, 2, 3, 31, 32, 33):
        assert torch.equal(mask_of(count, 50, 0.4, seed), full[:count])
    x = torch.zeros(rows // 10, 2, 5, 1, device=device)
    weight, bias = torch.zeros(50, 1, device=device), torch.ones(50, device=device)
    assert torch.equal(OP(x, weight, bias, 0.4, seed).reshape(rows, 50) != 0, full)


def test_more_columns_keep_the_first(device: torch.device) -> None:
    seed = torch.tensor([3, 1], device=device)
    full = mask_of(33, 300, 0.4, seed)
    for count in (1, 5, 8, 13, 64, 255):
        assert torch.equal(mask_of(33, count, 0.4, seed), full[:, :count])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(device: torch.device, threads: int) -> None:
    seed = torch.tensor([3, 1], device=device)
    rows = 40 if INTERPRETED else 5000
    torch.set_num_threads(threads)
    assert torch.equal(mask_of(rows, 65, 0.4, seed), keep_mask(seed, rows, 65, 0.4))


def test_any_backend(device: torch.device) -> None:
    """Every backend of the device gives the same mask for the same seed, in both ops."""
    seed = torch.tensor([9, 2**32 - 1], device=device)  # the second layer's offset wraps
    weights = [torch.rand(o, i, device=device) for o, i in ((24, 4), (20, 24), (8, 20), (3, 8))]
    biases = [torch.rand(w.shape[0], device=device) for w in weights]
    x = torch.rand(33, 4, device=device)
    results = {}
    for state in backends.status():
        if state.device == device.type and state.available:
            with backends.use_backend(state.name):
                net = torch.ops.fused_mlp.research_net(
                    x, weights, biases, None, None, None, None, True, [0.4, 0.6], seed
                )
                results[state.name] = mask_of(33, 20, 0.6, seed), net
    (mask, net), *others = results.values()
    for other_mask, other_net in others:
        assert torch.equal(mask, other_mask)
        torch.testing.assert_close(net, other_net, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------- the generator


def network_call(device: torch.device) -> torch.Tensor:
    weights = [torch.ones(s, device=device) for s in ((16, 4), (8, 16), (3, 8))]
    biases = [torch.ones(w.shape[0], device=device) for w in weights]
    x = torch.arange(40.0, device=device).reshape(10, 4)
    return research_net(x, weights, biases, None, None, None, None, True, [0.5])


def layer_call(device: torch.device) -> torch.Tensor:
    x, weight = torch.ones(10, 4, device=device), torch.ones(16, 4, device=device)
    return linear_relu(x, weight, None, 0.5, True)


@pytest.mark.parametrize("call", [layer_call, network_call])
def test_manual_seed(device: torch.device, call) -> None:
    """torch.manual_seed decides the masks; calls one after the other differ."""
    torch.manual_seed(1)
    first, second = call(device), call(device)
    torch.manual_seed(1)
    assert torch.equal(call(device), first)
    assert torch.equal(call(device), second)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert not torch.equal(call(device), first)


@pytest.mark.parametrize("call", [layer_call, network_call])
def test_generator_state(device: torch.device, call) -> None:
    """The generator's state can be kept and set, as checkpointing does, and it moves on."""
    generator = torch.cuda if device.type == "cuda" else torch
    state = generator.get_rng_state()
    first = call(device)
    assert not torch.equal(generator.get_rng_state(), state)
    generator.set_rng_state(state)
    assert torch.equal(call(device), first)


def test_no_dropout_leaves_the_generator(device: torch.device) -> None:
    generator = torch.cuda if device.type == "cuda" else torch
    state = generator.get_rng_state()
    x, weight = torch.ones(10, 4, device=device), torch.ones(16, 4, device=device)
    linear_relu(x, weight, None, 0.5, False)
    linear_relu(x, weight, None, 0.0, True)
    OP(x, weight, None, 0.5, torch.tensor([1, 2], device=device))
    assert torch.equal(generator.get_rng_state(), state)


def test_checkpointing(device: torch.device) -> None:
    """torch.utils.checkpoint recomputes the same mask."""
    x = torch.rand(50, 6, device=device, requires_grad=True)
    weight = torch.rand(20, 6, device=device)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(
                linear_relu, x, weight, None, 0.5, True, use_reentrant=False
            )
        else:
            y = linear_relu(x, weight, None, 0.5, True)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_seed_is_read_when_the_op_runs(device: torch.device) -> None:
    """A seed changed in place changes the next mask: it is data, as CUDA graphs need it."""
    seed = torch.tensor([3, 1], device=device)
    first = mask_of(33, 40, 0.5, seed)
    seed += 1
    assert torch.equal(mask_of(33, 40, 0.5, seed), keep_mask(seed, 33, 40, 0.5))
    assert not torch.equal(mask_of(33, 40, 0.5, seed), first)


def test_mean_is_preserved(device: torch.device) -> None:
    """The survivors are scaled so that the expectation stays."""
    rows = 100 if INTERPRETED else 2000
    x, weight = torch.ones(rows, 4, device=device), torch.ones(100, 4, device=device)
    y = linear_relu(x, weight, None, 0.3, True)
    assert set(y.unique().tolist()) <= {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(4 / 0.7)
    assert abs(y.mean().item() - 4) < 5 * 4 * math.sqrt(0.3 / 0.7 / y.numel())
