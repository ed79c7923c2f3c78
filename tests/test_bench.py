"""The benchmarks: statistics, files, comparison, report, command line. No number is judged here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import (
    cases,
    compare,
    counting,
    docs,
    plots,
    results,
    rivals,
    run,
    tables,
    timing,
    workload,
)
from bench.__main__ import main
from bench.errors import BenchError, Wrong
from bench.measure import measure
from bench.results import Results, Row

ROOT = Path(__file__).resolve().parent.parent


def made_up(fused: float = 5e-5, spread: float = 0.01, batch: int = 32) -> list[Row]:
    """Return one case's rows, as if eager took 100 µs and fused as given."""
    rows = []
    for name, seconds in (("eager", 1e-4), ("fused", fused), ("eager again", 1.01e-4)):
        ratio = 1e-4 / seconds
        rows.append(
            Row(
                "research_net", "10,64,32,5", batch, "train", "float32", "cpu", 2, name,
                median_s=seconds, low_s=seconds * (1 - spread), high_s=seconds * (1 + spread),
                samples=9, first_call_s=0.1, speed_up=ratio, speed_up_low=ratio * (1 - spread),
                speed_up_high=ratio * (1 + spread), over_fused=seconds / fused,
                error=1e-7, flops=1e6, bytes=1e5, peak_bytes=2**20,
            )
        )  # fmt: skip
    return rows


def made_up_results(**options: float) -> Results:
    environment = {"cpu": "<a & b>", "threads": 2, "load_average": 0.1, "versions": {"torch": "2"}}
    return Results(environment, {"gflops": 100.0, "gb_per_s": 20.0}, made_up(**options))


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


# ------------------------------------------------------------------------ cases and workload


def test_cases_count_what_they_say() -> None:
    case = cases.Case("research_net", (10, 64, 32, 5), 100, "eval")
    products = 10 * 64 + 64 * 32 + 32 * 5
    assert case.flops == 2 * 100 * products
    assert dataclasses.replace(case, mode="train").flops == 6 * 100 * products - 2 * 100 * 640
    assert case.bytes == 4 * (100 * 15 + products + 64 + 32 + 5)
    assert case.shape == "10,64,32,5"
    normalize = cases.Case("normalize", (50, 4), 50, "train")
    assert (normalize.shape, normalize.bytes) == ("50×4", 8 * 200 * 4)


@pytest.mark.parametrize("sweep", ["quick", "docs", "full", "smoke"])
def test_sweeps_never_train_a_single_row(sweep: str) -> None:
    found = cases.sweep(sweep, torch.float32, "cpu")
    assert len(found) == len(set(found))
    assert not [c for c in found if c.mode == "train" and c.batch < 2]
    assert {c.op for c in found} == {"research_net", *cases.OPS}


@pytest.mark.parametrize("case", cases.sweep("smoke", torch.float32, "cpu"), ids=str)
def test_contestants_start_equal(case: cases.Case) -> None:
    work = workload.build(case)
    eager = work.results(work.eager, torch.float64)
    fused = work.results(work.fused)
    assert workload.error(fused, eager) < 1e-3
    assert all(float(x.detach().abs().min()) > 0 for x, _ in work.inputs)  # never zeros


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


# ------------------------------------------------------------------------- files and tables


def test_results_survive_their_file(tmp_path: Path) -> None:
    before = made_up_results()
    before.rows[0].first_call_s = float("nan")  # JSON has no such number
    json_path, csv_path = results.save(before, tmp_path)
    after = results.load(json_path)
    assert after.rows[0].first_call_s is None
    after.rows[0].first_call_s = before.rows[0].first_call_s
    assert after == before
    assert results.load(tmp_path).peaks == before.peaks
    lines = csv_path.read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("op,shape,batch,mode")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ('{"rows": []}', "is not a result"),
        ('{"format": "fused_mlp-bench", "version": 99}', "version 99"),
        ('{"format": "fused_mlp-bench", "version": 1}', "damaged: 'environment'"),
    ],
)
def test_load_names_what_is_wrong(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchError, match=message) as caught:
        results.load(path)
    assert "a.json" in str(caught.value)


def test_losing_rows_are_listed() -> None:
    assert made_up_results().losing() == []
    slow = made_up_results(fused=2e-4)
    assert [row.contestant for row in slow.losing()] == ["eager"]
    assert "eager 100 µs, fused 200 µs (0.50×)" in tables.losing_lines(slow)[0]


def test_failures_and_absent_rivals_are_named() -> None:
    found = made_up_results()
    found.skipped["jax"] = "not installed: jax"
    found.rows.append(
        dataclasses.replace(found.rows[0], contestant="compile", median_s=None, over_fused=None)
    )
    found.rows[-1].note = "CppCompileError: no g++"
    text = "\n".join(tables.failed_lines(found))
    assert "jax: not installed" in text
    assert "compile at research_net 10,64,32,5 batch 32 train: CppCompileError" in text
    assert "failed" in tables.cells(found)[1][0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1.234e-6, "1.23 µs"), (5.678e-4, "568 µs"), (0.0123, "12.3 ms"), (2.5, "2.5 s")],
)
def test_times_are_readable(value: float | None, text: str) -> None:
    assert tables.seconds(value) == text


# ------------------------------------------------------------------------------- comparison


def test_compare_sees_a_change_beyond_noise() -> None:
    (change,) = compare.changes(made_up_results(), made_up_results(fused=6e-5))
    assert change.verdict == "slower"
    assert change.factor == pytest.approx(1.2)
    (change,) = compare.changes(made_up_results(), made_up_results(fused=4e-5))
    assert change.verdict == "faster"


def test_compare_calls_noise_noise() -> None:
    (change,) = compare.changes(made_up_results(), made_up_results(fused=5.1e-5))
    assert change.verdict == "same"  # below 3 %
    (change,) = compare.changes(made_up_results(), made_up_results(fused=6e-5, spread=0.3))
    assert change.verdict == "same"  # within the quartiles


def test_compare_corrects_for_a_slower_machine() -> None:
    slow = made_up_results()
    for row in slow.rows:
        assert row.median_s
        row.median_s *= 3
    (change,) = compare.changes(made_up_results(), slow)
    assert change.verdict == "same"


def test_compare_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = made_up_results(fused=7e-5)
    after.environment["threads"] = 1
    after.rows += made_up(batch=64)
    results.save(made_up_results(), tmp_path / "a")
    results.save(after, tmp_path / "b")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "threads: 2 → 1" in out
    assert "1.40×" in out
    assert "slower" in out
    assert "Only in the first: 0; only in the second: 1." in out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--fail"]) == 1


# ------------------------------------------------------------------- report, plots, the docs


def test_report_is_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = made_up_results()
    found.environment |= {"load_average": 3.0, "busy_cores": 1.5}
    results.save(found, tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert page.count("data:image/svg+xml;base64,") == 3  # no overhead was measured
    assert "http" not in page.split("</style>")[1].split("base64,")[0]
    assert "&lt;a &amp; b&gt;" in page  # escaped
    assert "1.5 cores busy (load average 3.0)" in page
    assert "2.00×" in page


def test_plots_are_drawn_for_what_is_there(tmp_path: Path) -> None:
    found = made_up_results()
    found.overhead = {
        "fused": {"python": 3.0, "kernel": 9.0}, "eager": {"forward": 40.0}, "widths": [10, 64, 5],
        "batch": 32, "fused step": 12.0, "eager step": 40.0,
    }  # fmt: skip
    found.rows.append(
        dataclasses.replace(found.rows[1], op="normalize", shape="50×4", contestant="fused")
    )
    names = {path.name for path in plots.save_all(found, tmp_path)}
    expected = {"speed_up", "ops", "roofline", "time_split", "memory"}
    assert names == {f"{n}.{s}" for n in expected for s in ("png", "svg")}
    assert plots.save_all(Results({}), tmp_path / "empty") == []


def test_docs_are_rewritten_between_their_marks(tmp_path: Path) -> None:
    results.save(made_up_results(), tmp_path / "net-10-train")
    slow = made_up_results(fused=1e-4)
    slow.environment["git_revision"] = "abc"
    results.save(slow, tmp_path / "avx2")
    (tmp_path / "gpu").mkdir()
    steps = "## Launches in ptxsim\n\nlong\n\n## Steps beside eager's\n\n| a |\n"
    (tmp_path / "gpu" / "steps.md").write_text(steps)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    arguments = ["docs", "--no-run", "--folder", str(tmp_path), "--page", str(page)]
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old\n" not in text
    assert "| 10,64,32,5 | 32 | train | 100 µs | 50 µs | **2.00×** | – | – | – | 1.00× |" in text
    assert "revisions `None` (net-10-train); `abc` (avx2)" in text
    assert "GPUs: predictions, nothing here was measured on one\n\n#### Steps beside" in text
    assert "long" not in text
    assert (tmp_path / "images" / "speed_up.png").is_file()
    page.write_text("no marks")
    assert main(arguments) == 1


def test_docs_measures_the_sections_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs.environment, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(docs, "SECTIONS", {n: docs.SECTIONS[n] for n in ("ops", "avx2", "net-784")})
    ran = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        name = "gpu" if "gpu-report" in command else Path(command[-1]).name.removesuffix(".new")
        ran.append(name)
        if name == "gpu":
            return subprocess.CompletedProcess(command, 0, "## Steps beside eager's\n")
        if name == "net-784":
            return subprocess.CompletedProcess(command, 1)
        results.save(made_up_results(), Path(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(docs.subprocess, "run", run)
    results.save(made_up_results(), tmp_path / "avx2")
    page = tmp_path / "page.md"
    page.write_text(f"{docs.BEGIN}{docs.END}")
    arguments = ["docs", "--missing", "--folder", str(tmp_path), "--page", str(page)]
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 1
    assert ran == ["ops", "net-784", "gpu"]
    assert "not measured: net-784" in capsys.readouterr().err
    assert "Measured" in page.read_text()  # what was measured is written all the same
    ran.clear()
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 1
    assert ran == ["net-784"]  # the others are there now
    monkeypatch.setattr(docs.environment, "busy_cores", lambda: 1.9)
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 1
    assert "1.9 cores busy" in capsys.readouterr().err


def test_the_docs_page_has_its_marks() -> None:
    text = docs.PAGE.read_text(encoding="utf-8")
    assert text.count(docs.BEGIN) == text.count(docs.END) == 1


# ----------------------------------------------------------------------------- command line


def test_compile_shows_what_compiling_adds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--smoke"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[0].strip() for row in rows] == ["mode", "---", "train", "eval"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:3])


def test_train_step_prints_a_line_for_every_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-step", "--smoke"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("TrainStep", "SGD, momentum", "Adam", "AdamW"))
    assert out.count("10,64,32,5") == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--net", "10,5"],
        ["--net", "ten,4,4"],
        ["--batch", "0"],
        ["--dtype", "int8"],
        ["--threads", "none"],
        ["--full", "--smoke"],
        ["frobnicate"],
        ["compare", "one.json"],
        ["overhead", "--batch", "1"],
        ["train-step", "--threads", "none"],
    ],
)
def test_wrong_options_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "numpy"], "--against numpy: choose from eager, onednn"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["compare", "gone.json", "gone.json"], "cannot read gone.json"),
        (["report", "nowhere"], "cannot read nowhere"),
        (["docs", "--no-run", "--folder", "nowhere"], "there are no results in nowhere"),
        (["docs", "--only", "nothing"], "--only nothing: choose from net-10-eval"),
        (["--batch", "1", "--mode", "train"], "batch norm cannot train at batch 1"),
    ],
)
def test_errors_are_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_a_backend_that_cannot_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    from fused_mlp import backends

    if any(s.name == "triton" and s.available for s in backends.status()):
        pytest.skip("Triton runs here")
    assert main(["--smoke", "--backend", "triton"]) == 1
    assert "error: --backend: backend 'triton' cannot run here" in capsys.readouterr().err


def test_absent_packages_are_skipped() -> None:
    absent = rivals.Rival("absent", "", ("no_such_package_at_all",), lambda work: None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rivals.RIVALS, "absent", absent)
        patch.setattr(rivals, "AGAINST", (*rivals.AGAINST, "absent"))
        chosen, skipped = rivals.choose(["absent", "eager"])
    assert [rival.name for rival in chosen] == ["eager", "fused", "kernel"]
    assert skipped == {"absent": "not installed: no_such_package_at_all"}


@pytest.mark.slow  # compiles networks with torch.compile
def test_smoke_runs_every_path() -> None:
    command = [sys.executable, "-m", "bench", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for word in ("research_net", "normalize", "linear_relu", "batch_norm_leaky_relu", "engine",
                 "requests/s", "synthetic", "compile-max", "Adam", "mean nothing"):  # fmt: skip
        assert word in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_of_ones_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--smoke", "--net", "6,5,4", "--batch", "4", "--backend", "reference"]
    assert main(arguments) == 0
    assert not list(tmp_path.iterdir())  # a smoke run leaves nothing
    assert "mean nothing" in capsys.readouterr().out
    assert main([*arguments, "--mode", "eval", "--output", "kept"]) == 0
    found = results.load(Path("kept"))
    assert {row.mode for row in found.rows} == {"eval"}
    assert {row.shape for row in found.rows} == {"6,5,4"}


def test_what_was_measured_before_an_interruption_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(case: cases.Case, *rest: object) -> list[Row]:
        calls.append(case)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return made_up()

    monkeypatch.setattr(run, "measure", interrupted)
    arguments = ["--smoke", "--net", "6,5,4", "--batch", "4", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert len(results.load(tmp_path).rows) == len(made_up())
