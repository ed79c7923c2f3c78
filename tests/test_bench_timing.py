"""How the benchmarks take turns, count and check. No number is judged here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import cases, counting, rivals, timing, workload
from bench.errors import Wrong
from bench.measure import measure

# ------------------------------------------------------------------------------- statistics


def test_spread_gives_median_and_quartiles() -> None:
    found = timing.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.low, found.high, found.count) == (3.0, 2.0, 4.0, 5)
    assert found.relative == pytest.approx(1 / 3)
    assert timing.spread([1.0, 2.0]).median == 1.5
    with pytest.raises(ValueError, match="no values"):
        timing.spread([])


def test_ratios_pair_the_rounds() -> None:
    # The machine became ten times slower halfway; each round's ratio is still 2.
    found = timing.ratios([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


def test_interleave_takes_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    budget = timing.Budget(seconds=0.0, sample=0.0, rounds=(4, 9), warm_up=0.0, pause=0.0)
    samples = timing.interleave(steps, budget)
    assert all(len(s.seconds) == 4 for s in samples.values())
    assert calls[:3] == ["a", "b", "c"]  # the warm-up
    turns = calls[3::2]  # a call that is not timed comes before each that is
    assert turns == calls[4::2]
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == 4
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # in another order each time


def test_interleave_repeats_short_steps() -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    timing.interleave({"short": step}, timing.Budget(0.0, 1e-3, (2, 2), warm_up=1e-3))
    assert count > 100


def test_runtimes_with_threads_of_their_own_race_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    races = []
    taken = {"eager": 8.0, "eager again": 8.0, "fused": 2.0, "stranger": 4.0}

    def made_up(steps, budget, synchronize, pause):
        races.append((sorted(steps), pause))
        return {name: timing.Samples([taken[name] * (1 + pause)] * 3) for name in steps}

    monkeypatch.setattr("bench.measure.interleave", made_up)
    stranger = rivals.Rival("stranger", "", (), rivals.RIVALS["eager"].prepare, own_threads=True)
    monkeypatch.setitem(rivals.RIVALS, "stranger", stranger)
    case = cases.Case("research_net", (4, 8, 8, 3), 4, "eval")
    who = [rivals.RIVALS["eager"], rivals.RIVALS["fused"], stranger]
    found = {row.contestant: row for row in measure(case, who, timing.Budget(pause=0.5))}
    assert races == [(["eager", "eager again", "fused"], 0.0), (["stranger"], 0.5)]
    assert found["fused"].median_s == 2.0
    assert found["stranger"].over_fused == 3.0  # 4 s, and half as much for the rest
    assert found["stranger"].speed_up == pytest.approx(8.0 / 6.0)


# ------------------------------------------------------------------------ cases and workload


def test_cases_count_what_they_say() -> None:
    case = cases.Case("research_net", (10, 64, 32, 5), 100, "eval")
    products = 10 * 64 + 64 * 32 + 32 * 5
    assert case.flops == 2 * 100 * products
    assert dataclasses.replace(case, mode="train").flops == 6 * 100 * products - 2 * 100 * 640
    assert case.bytes == 4 * (100 * 15 + products + 64 + 32 + 5)
    assert case.shape == "10,64,32,5"
    mlp = cases.Case("mlp", (7, 4, 8, 2), 7, "eval")
    assert (mlp.shape, mlp.widths) == ("7×4×8×2", (4, 8, 2))
    assert mlp.flops == 2 * 7 * (4 * 8 + 8 * 2)
    assert mlp.bytes == 4 * (7 * (4 + 2) + (4 + 1) * 8 + (8 + 1) * 2)
    normalize = cases.Case("normalize", (50, 4), 50, "train")
    assert (normalize.shape, normalize.bytes) == ("50×4", 8 * 200 * 4)


@pytest.mark.parametrize("sweep", ["quick", "docs", "full", "smoke"])
def test_sweeps_train_no_single_row_through_a_batch_norm(sweep: str) -> None:
    found = cases.sweep(sweep, torch.float32, "cpu")
    assert len(found) == len(set(found))
    single = {c.op for c in found if c.mode == "train" and c.batch < 2}
    assert not single - {"mlp"}
    assert {c.op for c in found} == {"research_net", *cases.OPS}


@pytest.mark.parametrize("case", cases.sweep("smoke", torch.float32, "cpu"), ids=str)
def test_contestants_start_equal(case: cases.Case) -> None:
    work = workload.build(case)
    eager = work.results(work.eager, torch.float64)
    fused = work.results(work.fused)
    assert workload.error(fused, eager) < 1e-3
    assert all(float(x.detach().abs().min()) > 0 for x, _ in work.inputs)  # never zeros


def test_float32_beside_half_precision_has_the_same_data() -> None:
    # Random numbers of many elements drawn in bfloat16 are others than those drawn in float32.
    case = cases.Case("research_net", (100, 64, 32, 5), 64, "eval", torch.bfloat16)
    work = workload.build(case)
    contestant = rivals.RIVALS["float32"].prepare(work)
    assert contestant.results is not None
    exact = work.results(work.eager, torch.float64)
    assert workload.error(contestant.results(), exact) < 1e-5


def test_wrong_results_are_found() -> None:
    exact = [torch.ones(4, dtype=torch.float64)]
    assert workload.error([torch.full((4,), 1.5)], exact) == pytest.approx(0.5)
    assert workload.error([torch.tensor([1.0, 1.0, 1.0, float("nan")])], exact) == float("inf")
    with pytest.raises(Wrong, match="shape"):
        workload.error([torch.ones(3)], exact)
    with pytest.raises(Wrong, match="against float64"):
        workload.check(0.5, 1e-7, torch.float32)
    workload.check(3e-7, 1e-7, torch.float32)


def test_a_wrong_contestant_is_not_timed() -> None:
    def prepare(work: workload.Workload) -> rivals.Contestant:
        return rivals.Contestant(lambda: None, lambda: [torch.zeros(8, 5)])

    cheat = rivals.Rival("cheat", "", (), prepare)
    chosen = [rivals.RIVALS["eager"], rivals.RIVALS["fused"], cheat]
    case = cases.Case("research_net", cases.REFERENCE, 8, "eval")
    rows = {row.contestant: row for row in measure(case, chosen, timing.SMOKE)}
    assert rows["cheat"].median_s is None
    assert rows["cheat"].note.startswith("wrong, so not timed: relative error 1")
    assert rows["fused"].median_s is not None
    assert rows["fused"].error is not None
    assert rows["eager again"].speed_up is not None
    assert (rows["eager"].ops, rows["eager"].peak_bytes) > (5, 0)
    assert rows["cheat"].first_call_s is None
    assert rows["fused"].first_call_s is not None


def test_ops_and_bytes_are_counted_once() -> None:
    x = torch.randn(8, 4)
    assert counting.count_ops(lambda: x.t().relu()) == (1, 2 * 8 * 4 * 4)
    expanded = torch.ones(1).expand(8, 4)
    assert counting.count_ops(lambda: x + expanded) == (1, 2 * 8 * 4 * 4 + 4)


def test_peak_memory_sees_what_is_held() -> None:
    peak = counting.peak_memory(lambda: torch.empty(1000).add(1).sum(), torch.device("cpu"))
    assert peak is not None
    assert 8000 <= peak < 9000


def test_units_at_the_kink_of_relu_have_no_gradient() -> None:
    """Rounding chooses their side, and a gradient that one contestant passes on is not wrong."""
    case = cases.Case("linear_relu", (64, 32, 16), 64, "train")
    linear = workload.build(case).eager[0]
    x, grad = torch.randn(3, 32), torch.ones(3, 16)
    with torch.no_grad():
        linear.bias[2] -= linear(x)[1, 2]
    kept = workload._where_sure(linear, x, grad)
    assert kept[1, 2] == 0
    assert kept.sum() == grad.numel() - 1
