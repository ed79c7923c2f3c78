"""What the benchmarks make of results: files, comparison, report, plots, the docs page."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support.made_up import made_up, made_up_results

from bench import compare, docs, plots, results, tables
from bench.__main__ import main
from bench.errors import BenchError
from bench.results import Results

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
    assert "| 10,64,32,5 | train | 32: 2.00× (4×) |" in text  # an aim not reached
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
