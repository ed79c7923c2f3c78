"""What the benchmarks ask of a GPU, with everything that needs one replaced: no GPU, no number."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import cases, counting, measure, rivals, rivals_external, tables, workload
from bench.errors import Unsupported
from bench.results import Results, Row, load, save

CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace torch.cuda and triton.testing; return what was called, in order."""
    calls: list[str] = []

    def note(name: str, result: object = None) -> Callable[..., object]:
        return lambda *_, **__: calls.append(name) or result

    for name, result in {
        "synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100,
        "max_memory_allocated": 356, "Stream": None, "stream": contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, note(name, result))
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", note("do_bench", 0.5))
    monkeypatch.setattr(testing, "do_bench_cudagraph", note("do_bench_cudagraph", 0.25))
    return calls


def test_peak_memory_is_what_cuda_says(cuda: list[str]) -> None:
    assert counting.peak_memory(lambda: cuda.append("step"), CUDA) == 256
    middle = cuda[cuda.index("reset_peak_memory_stats") :]
    assert middle == [
        "reset_peak_memory_stats", "memory_allocated", "step", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip


def test_times_are_taken_by_events_and_by_graph_replay(cuda: list[str]) -> None:
    found = counting.gpu_times(lambda: None)
    assert (found["event_s"], found["graph_s"]) == (5e-4, 2.5e-4)
    assert found["host_s"] > 0
    assert cuda.index("do_bench") < cuda.index("do_bench_cudagraph")


def test_a_step_that_cannot_be_captured_has_no_graph_time(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", fail)
    assert set(counting.gpu_times(lambda: None)) == {"event_s", "host_s"}


def test_launches_are_the_profilers_cuda_events(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = torch.autograd.DeviceType
    events = [SimpleNamespace(device_type=k) for k in (kinds.CPU, kinds.CUDA, kinds.CUDA)]

    @contextlib.contextmanager
    def profile(**_: object) -> object:  # type: ignore[misc]
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert counting.launches(lambda: cuda.append("step")) == 2
    assert "step" in cuda


def test_rows_and_tables_hold_what_a_gpu_gives(
    cuda: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counting, "launches", lambda step: 7)
    case = cases.Case("normalize", (50, 4), 50, "eval")
    work = workload.build(case)
    contestants = {n: rivals.RIVALS[n].prepare(work) for n in ("eager", "fused")}
    contestants["eager again"] = contestants["eager"]
    rows = {name: measure._row(case, name) for name in contestants}
    for row in rows.values():
        row.median_s, row.first_call_s = 1e-3, 2.0
    measure._count(rows, contestants, CUDA, case)
    fused = rows["fused"]
    assert (fused.launches, fused.event_s, fused.graph_s) == (7, 5e-4, 2.5e-4)
    assert fused.peak_bytes == 256
    # The roofline is of the device's time, not of the host's.
    assert fused.gb_per_s == pytest.approx(fused.bytes / 5e-4 / 1e9)  # type: ignore[operator]
    save(Results({}, {}, list(rows.values())), tmp_path)
    header, (line,) = tables.call_cells(load(tmp_path))
    shown = dict(zip(header, line, strict=True))
    assert shown["fused first"] == "2 s"
    assert shown["fused events"] == "500 µs"
    assert shown["fused graph"] == "250 µs"
    assert shown["fused launches"] == "7"


def fake_attorch() -> types.ModuleType:
    """Return attorch's layers as far as the adapter knows them: the weight is transposed."""

    class Linear(nn.Linear):
        def __init__(self, before: int, after: int) -> None:
            super().__init__(before, after)
            self.weight = nn.Parameter(self.weight.detach().t().contiguous())
            self.act_func: str | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight + self.bias
            return y.relu() if self.act_func == "relu" else y

    module = types.ModuleType("attorch")
    for name, layer in {"Linear": Linear, "Dropout": nn.Dropout, "BatchNorm1d": nn.BatchNorm1d,
                        "LeakyReLU": nn.LeakyReLU}.items():  # fmt: skip
        setattr(module, name, layer)
    return module


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attorch_runs_the_same_network(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    work = workload.build(cases.Case("research_net", cases.REFERENCE, 16, mode))
    with pytest.raises(Unsupported, match="float32 on cuda only"):
        rivals.RIVALS["attorch"].prepare(work)
    monkeypatch.setitem(sys.modules, "attorch", fake_attorch())
    monkeypatch.setattr(rivals_external, "_require", lambda *_, **__: None)
    contestant = rivals.RIVALS["attorch"].prepare(work)
    contestant.step()
    assert contestant.results is not None
    exact = work.results(work.eager, torch.float64)
    eagers = workload.error(work.results(work.eager), exact)
    workload.check(workload.error(contestant.results(), exact), eagers, torch.float32)


def test_first_calls_without_a_gpu_are_a_column_each() -> None:
    row = Row("research_net", "10,5", 8, "eval", "float32", "cpu", 2, "fused", first_call_s=1.5)
    header, lines = tables.call_cells(Results({}, rows=[row]))
    assert header == ["case", "batch", "mode", "eager first", "fused first"]
    assert lines == [["research_net 10,5", "8", "eval", "", "1.5 s"]]
