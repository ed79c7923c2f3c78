"""research_net in CUDA C++, executed in ptxsim: one kernel for the whole network."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from cuda_fixtures import CPU, cuda_library, each_gpu, gpu, simulate, tf32  # noqa: F401
from cuda_simulator import Simulator
from support import DTYPES, check_case, lay_out, research_case

from fused_mlp import on_chip

KERNELS = torch.ops.fused_mlp_kernels
REFERENCE = (10, 64, 32, 5)


@pytest.fixture(autouse=True)
def _fits(cuda_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the simulated device answer which widths it takes."""

    def fits(input: torch.Tensor, weights: list[torch.Tensor]) -> bool:
        widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
        array = (ctypes.c_int64 * len(widths))(*widths)
        return bool(
            cuda_library.fused_mlp_research_net_fits(array, len(widths), input.element_size())
        )

    monkeypatch.setattr(on_chip, "fits", fits)


@pytest.mark.parametrize(
    ("rows", "widths"),
    [
        (40, REFERENCE),
        (130, REFERENCE),
        (70, (7, 33, 18, 3)),
        (33, (3, 5, 2)),
        (2, (1, 1, 1, 1)),
        (50, (12, 40, 24, 16, 8)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_shapes(gpu: Simulator, rows: int, widths: tuple[int, ...], training: bool) -> None:
    check_case(research_case(rows, widths, training, p=0.3, device=CPU))
    assert all("_net_" in record.kernel for record in gpu.records)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_dtypes(each_gpu: Simulator, dtype: torch.dtype, training: bool) -> None:
    check_case(research_case(100, REFERENCE, training, p=0.3, dtype=dtype, device=CPU))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chips_without_tensor_cores_for_it(cuda_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """sm_75 has no bfloat16 and other float16 products: it multiplies and adds in float32."""
    simulator = Simulator(cuda_library, 75, shared_bytes_per_block=64 * 1024)
    with simulator.running():
        check_case(research_case(100, REFERENCE, True, p=0.3, dtype=dtype, device=CPU))
    suffix = "bf16_fma" if dtype == torch.bfloat16 else "f16_fma"
    kernels = {record.kernel for record in simulator.records}
    assert kernels >= {f"fused_mlp_net_forward_{suffix}", f"fused_mlp_net_backward_{suffix}"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(128, 128, 32, 10), (33, 100, 47, 65, 20), (5, 130, 1)])
def test_wide(
    cuda_library: ctypes.CDLL,
    dtype: torch.dtype,
    widths: tuple[int, ...],
) -> None:
    """Whatever the device takes in one op is right; the rest goes op by op."""
    with Simulator(cuda_library, 90, shared_bytes_per_block=227 * 1024).running():
        check_case(research_case(150, widths, True, p=0.3, dtype=dtype, device=CPU))


@pytest.mark.parametrize("layout", ["transposed", "columns", "gap", "steps", "offset", "expanded"])
def test_layouts(gpu: Simulator, layout: str) -> None:
    case = research_case(39, (8, 20, 12, 4), False, device=CPU)
    x, *parameters = case.tensors.values()
    check_case(case, [lay_out(x, layout), *parameters], lay_out(torch.randn(39, 4), layout))
    check_case(case, [x, *(lay_out(p, layout) for p in parameters)])


def test_without_affine(gpu: Simulator) -> None:
    for training in (True, False):
        check_case(research_case(40, REFERENCE, training, affine=False, device=CPU))


def arguments(rows: int, dtype: torch.dtype = torch.float32, p: float = 0.3) -> dict:
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    pairs = list(zip(REFERENCE, REFERENCE[1:], strict=False))
    return {
        "x": normal(rows, REFERENCE[0]),
        "g": normal(rows, REFERENCE[-1]),
        "weights": [normal(o, i) / i**0.5 for i, o in pairs],
        "biases": [normal(o) for _, o in pairs],
        "bn": [normal(32), normal(32)],
        "dropout": [p],
        "seed": torch.tensor([1234, 5]),
    }


def forward(a: dict, training: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    return KERNELS.research_net(
        a["x"], a["weights"], a["biases"], *a["bn"], torch.zeros(32).to(a["x"]),
        torch.ones(32).to(a["x"]), None, training, a["dropout"], a["seed"], 0.1, 1e-5, 0.01,
    )  # fmt: skip


def backward(a: dict, saved: torch.Tensor, training: bool = True, mask: int = -1) -> list:
    wanted = [bool(mask >> k & 1) for k in range(9)]
    return KERNELS.research_net_backward(
        a["g"], a["x"], a["weights"], a["biases"], *a["bn"], saved, training, a["dropout"],
        a["seed"], 0.01, wanted,
    )  # fmt: skip


def test_launches(gpu: Simulator) -> None:
    """Eval 1; training forward 2, backward 3. A batch that one block takes: 1 and 2."""
    for rows, training, expected in ((500, True, (2, 3)), (64, True, (1, 2)), (500, False, (1, 3))):
        a = arguments(rows)
        gpu.records.clear()
        _, saved = forward(a, training)
        assert len(gpu.records) == expected[0]
        gpu.records.clear()
        backward(a, saved, training)
        assert len(gpu.records) == expected[1]
    gpu.records.clear()
    backward(arguments(500), saved, False, mask=0x7F)  # no gradients of batch norm: no sums
    assert len(gpu.records) == 2


def test_every_subset_of_gradients(gpu: Simulator) -> None:
    a = arguments(40)
    _, saved = forward(a)
    full = backward(a, saved)
    for mask in (0x001, 0x002, 0x010, 0x080, 0x100, 0x0F3, 0x18C):
        chosen = [full[k] for k in range(9) if mask >> k & 1]
        assert all(map(torch.equal, chosen, backward(a, saved, mask=mask)))


def test_running_statistics(gpu: Simulator) -> None:
    for rows in (40, 200):
        a = arguments(rows)
        mean, var, count = torch.zeros(32), torch.ones(32), torch.tensor(6)
        KERNELS.research_net(
            a["x"], a["weights"], a["biases"], *a["bn"], mean, var, count, True, [0.0], None, 0.1,
            1e-5, 0.01,
        )  # fmt: skip
        hidden = torch.nn.functional.linear(a["x"], a["weights"][0], a["biases"][0]).relu()
        hidden = torch.nn.functional.linear(hidden, a["weights"][1], a["biases"][1])
        plain = torch.nn.BatchNorm1d(32)
        plain(hidden)
        torch.testing.assert_close(mean, plain.running_mean)
        torch.testing.assert_close(var, plain.running_var)
        assert count == 7


def test_empty(gpu: Simulator) -> None:
    a = arguments(0)
    output, saved = forward(a)
    assert output.shape == (0, 5) and saved.shape == (64,)
    assert not any(g.any() for g in backward(a, saved))
    assert not gpu.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_any_block_order(
    simulate: Callable[..., Simulator],
    dtype: torch.dtype,
) -> None:
    a = arguments(300, dtype)
    results = []
    for shuffle in (None, 1):
        with simulate(multiprocessors=5, shuffle=shuffle).running():
            output, saved = forward(a)
            results.append((output, saved, *backward(a, saved)))
    assert all(map(torch.equal, *results))


def test_mask_is_the_same_for_any_tile(simulate: Callable[..., Simulator]) -> None:
    """Devices of 1 and 64 multiprocessors cut 200 rows into tiles of 64 and of 16."""
    a, outputs, blocks = arguments(200, p=0.5), [], []
    for multiprocessors in (1, 64):
        simulator = simulate(multiprocessors=multiprocessors, check=False)
        with simulator.running():
            outputs.append(forward(a, False)[0])
        blocks.append(simulator.records[0].grid[0])
    assert blocks[0] != blocks[1]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_tf32(each_gpu: Simulator) -> None:
    case = research_case(100, REFERENCE, True, p=0.3, device=CPU)
    inputs = [t.clone().requires_grad_() for t in case.tensors.values()]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = case.exact(*doubles)
    with tf32():
        result = case.fused(*inputs)
        gradients = torch.autograd.grad(result.sum(), inputs)
    assert {r.kernel for r in each_gpu.records} >= {"fused_mlp_net_forward_tf32"}
    assert 1e-6 < (result - exact).norm() / exact.norm() < 2e-3
    for name, ours, theirs in zip(
        case.tensors, gradients, torch.autograd.grad(exact.sum(), doubles), strict=True
    ):
        if name != "biases[1]":  # before batch norm: rounding of zero
            # A value next to a kink may fall to its other side, so this is no rounding error.
            assert (ours - theirs).norm() <= 0.1 * theirs.norm(), name


@pytest.mark.parametrize("math", ["float32", "bfloat16", "tf32"])
def test_traffic(simulate: Callable[..., Simulator], math: str) -> None:
    """Rows are read once a launch, weights once, outputs written once, activations never."""
    dtype = torch.bfloat16 if math == "bfloat16" else torch.float32
    rows = 512
    a = arguments(rows, dtype)
    simulator = simulate(multiprocessors=4, stats=True, check=False)
    with simulator.running(), tf32(math == "tf32"):
        _, saved = forward(a)
        backward(a, saved)
    size = a["x"].element_size()
    x, g, y = rows * 10 * size, rows * 5 * size, rows * 5 * size
    parameters = sum(t.numel() for t in a["weights"] + a["biases"])
    weights, vectors = parameters * size, 2 * 32 * size  # of batch norm, as are the running ones
    saved_bytes, seed = 2 * 32 * 4, 16
    measure, apply, sums, main, reduce = (record.stats for record in simulator.records)
    measured, blocks = (simulator.records[k].grid[0] for k in (0, 3))
    partials, gradients = measured * 2 * 32 * 4, blocks * parameters * 4
    needs = {
        "measure": (measure, x + weights + seed, partials),
        "apply": (apply, x + weights + seed + partials + 2 * vectors, y + saved_bytes + vectors),
        "sums": (sums, x + g + weights + seed + vectors + saved_bytes, partials),
        "main": (
            main,
            x + g + weights + seed + vectors + saved_bytes + partials,
            x + gradients + vectors,
        ),
        "reduce": (reduce, gradients, weights),
    }
    for name, (s, read, written) in needs.items():
        assert s.dram_read_bytes <= 1.05 * read, name
        assert s.dram_write_bytes <= 1.05 * written, name
        assert s.atomics == 0, name
        assert s.load_efficiency >= 0.99 and s.store_efficiency >= 0.99, name
        assert s.shared_wavefronts <= 1.1 * s.shared_ideal_wavefronts, name
        assert ("mma" in s.instructions) == (math != "float32" and name != "reduce"), name


def test_fits(cuda_library: ctypes.CDLL, simulate: Callable[..., Simulator]) -> None:
    def fits(*widths: int, size: int = 4) -> bool:
        array = (ctypes.c_int64 * len(widths))(*widths)
        return bool(cuda_library.fused_mlp_research_net_fits(array, len(widths), size))

    with simulate(shared_bytes_per_block=64 * 1024).running():  # sm_75
        assert fits(*REFERENCE) and not fits(128, 128, 128, 10)
    with simulate(shared_bytes_per_block=227 * 1024).running():  # sm_90
        assert fits(*REFERENCE, size=8) and fits(128, 128, 32, 10) and fits(64, 128, 64, 10, size=2)
        assert not fits(128, 256, 256, 10) and not fits(10, 5) and not fits(0, 4, 4)
