"""What a kernel may move."""

from __future__ import annotations

from ptxsim import LaunchStats


def assert_traffic(stats: LaunchStats, read: int, written: int) -> None:
    """At most 5 % more bytes than must be moved, whole sectors, no conflicts, no atomics."""
    assert stats.dram_read_bytes <= 1.05 * read
    assert stats.dram_write_bytes <= 1.05 * written
    assert stats.load_efficiency >= 0.99 and stats.store_efficiency >= 0.99
    assert stats.shared_wavefronts <= 1.1 * stats.shared_ideal_wavefronts
    assert stats.atomics == 0
