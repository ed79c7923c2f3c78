"""What a kernel may move."""

from __future__ import annotations

from collections.abc import Sequence

from ptxsim import LaunchStats


def assert_traffic(stats: LaunchStats, read: int, written: int) -> None:
    """At most 5 % more bytes than must be moved, whole sectors, no conflicts, no atomics."""
    assert stats.dram_read_bytes <= 1.05 * read
    assert stats.dram_write_bytes <= 1.05 * written
    assert stats.load_efficiency >= 0.99 and stats.store_efficiency >= 0.99
    assert stats.shared_wavefronts <= 1.1 * stats.shared_ideal_wavefronts
    assert stats.atomics == 0


def assert_standardization_traffic(
    stats: Sequence[LaunchStats], launches: int, size: int, statistics: int
) -> None:
    """Forward's launches, then as many of backward; each direction reads once a launch.

    size: bytes of the input. statistics: bytes that forward keeps. Besides these: parameters and
    partial statistics, which are small.
    """
    assert len(stats) == 2 * launches
    forward, backward = stats[:launches], stats[launches:]
    assert sum(s.dram_read_bytes for s in forward) <= 1.05 * launches * size
    assert sum(s.dram_write_bytes for s in forward) <= 1.05 * (size + statistics)
    assert sum(s.dram_read_bytes for s in backward) <= 1.05 * launches * (2 * size + statistics)
    assert sum(s.dram_write_bytes for s in backward) <= 1.05 * size
    for s in stats:
        assert s.atomics == 0
        assert s.shared_wavefronts <= 1.1 * s.shared_ideal_wavefronts
