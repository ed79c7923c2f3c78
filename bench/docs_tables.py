"""The tables of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from . import aims, overhead, tables
from .cases import NETWORK
from .results import Results, Row
from .rivals import AGAIN, EAGER, FUSED, KERNEL
from .tables import markdown, times

PICTURES = {
    "speed_up": "Speed-up over eager PyTorch against the batch size, by network",
    "ops": "Speed-up over eager PyTorch of the ops on their own",
    "roofline": "FLOP/s against FLOPs per byte, under the measured ceilings",
    "time_split": "Where a training step at batch 32 spends its time",
    "memory": "Peak memory of a training step against the batch size",
}


def sections(
    main: Results, others: Mapping[str, Results], parts: Mapping[str, Results], images: str
) -> Iterator[str]:
    """Yield the page's paragraphs and tables.

    Args:
        main: the networks, the ops and what was measured end to end, as one.
        others: ``bfloat16``, ``one-thread`` and ``avx2``, if they are there.
        parts: every section by name, to say where the numbers are from.
        images: the folder of the pictures, as the page links to it.
    """
    yield provenance(main, parts)
    networks, ops = _only(main, True), _only(main, False)
    if networks.rows:
        yield "### Networks"
        yield _picture("speed_up", images)
        yield (
            "Eval is `net(x)`, train `net(x)` and backward, both through the modules. *best rival* "
            "is the fastest of torch.compile (both modes), ONNX Runtime, OpenVINO and JAX, *over "
            "it* its time over ours; below 1.00× it is faster. *avx2*: the gain over eager with "
            "our kernels held to AVX2, eager unchanged. *kernels*: the raw ops alone, of the "
            "measured multiply-adds' FLOP/s or copy's bytes/s, whichever is nearer. *memory*: "
            "eager's peak over ours."
        )
        yield markdown(*_network_cells(networks, others.get("avx2")))
        if tables.rivals_of(networks.rows):
            yield "### Everybody, over eager"
            yield _versions(networks)
            yield markdown(*rival_cells(networks))
        yield _picture("memory", images)
    if ops.rows:
        yield "### The ops on their own"
        yield _picture("ops", images)
        yield markdown(*tables.cells(ops))
    if "bfloat16" in others:
        yield "### bfloat16"
        yield (
            "Against eager in bfloat16; *vs float32* is the time of the same module in float32 "
            "over it. *of peak* is of torch's own bfloat16 product of 2048 squared."
        )
        yield markdown(*tables.cells(others["bfloat16"]))
    if main.peaks and main.rows:
        yield "### Under the ceilings"
        yield _picture("roofline", images)
    if "one-thread" in others:
        yield "### Threads"
        yield (
            f"One thread and {main.environment.get('threads')}: the time, and in brackets the gain "
            "over eager on as many threads. A call takes as many threads as its work pays for, so "
            "small ones run alike."
        )
        yield _threads(others["one-thread"], networks)
    if main.overhead:
        yield "### One small training step"
        yield _picture("time_split", images)
        yield overhead.text(main.overhead)
    for name, rows in main.extra.items():
        yield f"### {name.capitalize()}"
        yield tables.plain(rows)
    if missed := list(aims.missed(main)):
        yield "### Aims not reached"
        yield "What the CPU kernels are meant to gain (`bench/aims.py`), and what falls short."
        yield from missed
    yield "### Where others are faster, and what could not run"
    for name, part in {"": main, **others}.items():
        losing = tables.losing_lines(part)
        who = f"{name}, {len(losing)}" if name else str(len(losing))
        lines = "".join(f"\n- {line}" for line in losing)
        yield f"Faster than fused ({who}):" + (f"\n{lines}" if losing else " nobody.")
    failed = dict.fromkeys(
        line for part in (main, *others.values()) for line in tables.failed_lines(part)
    )
    if failed:
        yield "Not timed:\n\n" + "\n".join(f"- {line}" for line in failed)


def provenance(main: Results, parts: Mapping[str, Results]) -> str:
    """Say where, when and of what the numbers are; and which sections differ in that."""
    where = main.environment
    aa = [abs((r.speed_up or 1) - 1) for part in parts.values() for r in part.of(AGAIN)]
    text = (
        f"Measured {str(where.get('time'))[:10]} on {where.get('cpu')}, {where.get('cores')} "
        f"cores, {where.get('threads')} threads, kernels for {where.get('isa')}, torch "
        f"{where.get('versions', {}).get('torch')}, float32, at {_revisions(parts)}."
    )
    if main.peaks:
        fma = main.peaks.get("fma_gflops")
        text += (
            " Measured ceilings: "
            + (f"{fma:.0f} GFLOP/s of multiply-adds, " if fma else "")
            + (
                f"{main.peaks['gflops']:.0f} GFLOP/s in a product of 2048 squared, "
                f"{main.peaks['gb_per_s']:.1f} GB/s copying 256 MiB."
            )
        )
    if aa:
        text += f" Eager against itself strays by {100 * median(aa):.1f} % in the median case."
    busy = [p.environment.get("busy_cores") or 0 for p in parts.values()]
    if busy:
        text += f" At most {max(busy)} cores were busy with something else before a section."
    return text


def _revisions(parts: Mapping[str, Results]) -> str:
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        found.setdefault(str(part.environment.get("git_revision")), []).append(name)
    if len(found) == 1:
        return f"revision `{next(iter(found))}`"
    return "revisions " + "; ".join(
        f"`{revision}` ({', '.join(names)})" for revision, names in found.items()
    )


def _picture(name: str, images: str) -> str:
    return f"![{PICTURES[name]}]({images}/{name}.png)"


def _only(results: Results, networks: bool) -> Results:
    rows = [r for r in results.rows if (r.op == NETWORK) == networks]
    return Results(results.environment, results.peaks, rows)


def _versions(results: Results) -> str:
    versions = results.environment.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _network_cells(results: Results, avx2: Results | None) -> tuple[list[str], list[list[str]]]:
    held = {r.case: r for r in avx2.of(FUSED)} if avx2 else {}
    lines = []
    for case, rows in tables.by_case(results.rows).items():
        eager, fused = rows.get(EAGER), rows.get(FUSED)
        if eager is None or fused is None:
            continue
        best = _best_rival(rows)
        line = [
            fused.shape, str(fused.batch), fused.mode, tables.seconds(eager.median_s),
            tables.seconds(fused.median_s), f"**{times(fused.speed_up)}**",
            _over(rows.get("onednn")),
            f"{best.contestant} {times(best.speed_up)}" if best else "–", _over(best),
        ]  # fmt: skip
        if avx2:
            line.append(times(held[case].speed_up) if case in held else "–")
        line += [
            tables.of_peak(rows.get(KERNEL, fused), results.peaks),
            times((eager.peak_bytes or 0) / fused.peak_bytes) if fused.peak_bytes else "–",
        ]
        lines.append(line)
    header = ["network", "batch", "mode", "eager", "fused", "speed-up", "over onednn",
              "best rival", "over it"]  # fmt: skip
    header += [*(["avx2"] if avx2 else []), "kernels", "memory"]
    return header, lines


def _best_rival(rows: Mapping[str, Row]) -> Row | None:
    names = [n for n in tables.rivals_of(rows.values()) if n != "onednn"]
    timed = [rows[n] for n in names if rows[n].median_s]
    return min(timed, key=lambda r: r.over_fused or 0.0) if timed else None


def _over(row: Row | None) -> str:
    return "–" if row is None else times(row.over_fused)


def rival_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of each contestant's speed-up over eager."""
    names = [FUSED, *tables.rivals_of(results.rows)]
    lines = []
    for rows in tables.by_case(results.rows).values():
        first = next(iter(rows.values()))
        line = [first.shape, str(first.batch), first.mode]
        lines.append(line + [times(rows[n].speed_up) if n in rows else "" for n in names])
    return ["network", "batch", "mode", *names], lines


def _threads(one: Results, several: Results) -> str:
    more = {r.case[:-1]: r for r in several.of(FUSED)}

    def cell(row: Row | None) -> str:
        return f"{tables.seconds(row.median_s)} ({times(row.speed_up)})" if row else ""

    lines = []
    for row in one.of(FUSED):
        other = more.get(row.case[:-1])
        gain = (row.median_s or 0) / (other.median_s or 1) if other else None
        lines.append([row.shape, str(row.batch), row.mode, cell(row), cell(other), times(gain)])
    return markdown(["network", "batch", "mode", "1 thread", "all", "1 over all"], lines)
