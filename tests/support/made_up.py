"""Made-up results of benchmarks."""

from __future__ import annotations

from bench.results import Results, Row


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
