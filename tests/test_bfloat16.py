"""Products of bfloat16 on its own instructions: accuracy beside torch's, and what they round.

Where the processor lacks them the same promises hold of the kernels that convert to float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_nonfinite, check_case, linear_case, research_case
from torch import Tensor

from fused_mlp.functional import linear_relu, research_net

DTYPE = torch.bfloat16
# Odd and even widths about the pairs of an instruction, the 16 lanes of a vector, a panel of 32
# columns, tiles of 14 and 16 rows; rows about blocks of 112 and 256 and the 4 of dot products.
WIDTHS = ((1, 2, 1), (5, 3, 4), (31, 33, 17), (64, 48, 32), (129, 14, 15), (300, 270, 257))
ROWS = (2, 4, 5, 16, 17, 33, 113, 260, 513)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_relu(device: torch.device, rows: int, widths: tuple[int, int, int]) -> None:
    inputs, outputs, _ = widths
    check_case(linear_case((rows, inputs), outputs, p=0.3, dtype=DTYPE, device=device))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("widths", WIDTHS[2:])  # a few channels average no rounding out
@pytest.mark.parametrize("rows", ROWS)
def test_research_net(
    device: torch.device, rows: int, widths: tuple[int, int, int], training: bool
) -> None:
    if rows < 8 and training:
        rows += 8  # of two rows a batch norm leaves little but rounding
    inputs, *hidden = widths
    for p in (0.0, 0.4):
        case = research_case(rows, (inputs, *hidden, 3), training, p, dtype=DTYPE, device=device)
        check_case(case)


@pytest.mark.usefixtures("all_threads")
def test_sums_beyond_a_block(device: torch.device) -> None:
    """More terms than are summed at a time, and more columns than a block has."""
    check_case(linear_case((70, 2100), 480, dtype=DTYPE, device=device))
    check_case(research_case(70, (1100, 300, 1030, 7), True, dtype=DTYPE, device=device))
    check_case(research_case(70, (1100, 300, 1030, 7), False, dtype=DTYPE, device=device))


def network(*widths: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights, biases and the batch norm's running mean and variance."""
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(n, k, generator=generator).to(DTYPE) / k**0.5
        for k, n in zip(widths, widths[1:], strict=False)
    ]
    biases = [torch.randn(len(w), generator=generator).to(DTYPE) for w in weights]
    channels = widths[-2]
    return weights, biases, [torch.zeros(channels).to(DTYPE), torch.ones(channels).to(DTYPE)]


def eager(x: Tensor, weights: list[Tensor], biases: list[Tensor], norm: list[Tensor]) -> Tensor:
    hidden = F.relu(F.linear(x, weights[0], biases[0]))
    hidden = F.batch_norm(F.linear(hidden, weights[1], biases[1]), *norm)
    return F.linear(F.leaky_relu(hidden), weights[2], biases[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("rows", [3, 40])
def test_nonfinite_values_reach_what_torchs_do(rows: int, value: float) -> None:
    weights, biases, norm = network(33, 65, 48, 7)
    for place in ("input", "first weight", "last weight", "bias"):
        x = torch.randn(rows, 33, generator=torch.Generator().manual_seed(rows)).to(DTYPE)
        tensors = [t.clone() for t in (x, weights[0], weights[2], biases[1])]
        changed = ("input", "first weight", "last weight", "bias").index(place)
        tensors[changed].view(-1)[-1] = value
        x, first, last, bias = tensors
        use = [first, weights[1], last], [biases[0], bias, biases[2]]
        ours = research_net(x, *use, None, None, *norm, dropout_p=[0.0])
        assert_same_nonfinite(ours, eager(x, *use, norm), place)


def test_denormals_count_as_zero_or_as_themselves() -> None:
    """The instructions take them for zero, as torch's library does where it uses them."""
    tiny = torch.finfo(DTYPE).tiny
    x = torch.full((40, 64), tiny / 4, dtype=DTYPE)
    weight = torch.full((48, 64), 1.0, dtype=DTYPE)
    exact = torch.full((40, 48), 16 * tiny, dtype=DTYPE)
    ours = linear_relu(x, weight)
    assert torch.equal(ours, exact) or torch.equal(ours, torch.zeros_like(exact))
    large = linear_relu(x * 8, weight)  # normal ones are exact
    assert torch.equal(large, exact * 8)
