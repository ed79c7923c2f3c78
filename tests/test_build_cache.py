"""First use: the library is built in the user's cache, once, and only in a safe place."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from build_fixtures import OF_BFLOAT16, counting_compiler, installed, loads_by_path, needs_compiler  # noqa: F401

from fused_mlp import _build


@needs_compiler
def test_first_use_builds_in_the_cache_once(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = counting_compiler(tmp_path, monkeypatch)
    library = installed.library_path("cpu")
    assert library.is_relative_to(tmp_path / "cache")
    count = compiled()
    assert count > 0
    assert installed.library_path("cpu") == library
    assert compiled() == count
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".json", ".lock", ".so"]


@needs_compiler
def test_prebuilt_library_is_preferred(installed: ModuleType, tmp_path: Path) -> None:
    prebuilt = tmp_path / "site/fused_mlp/_C_cpu.so"
    prebuilt.touch()
    assert installed.library_path("cpu") == prebuilt


def test_no_compiler(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(installed.BuildUnavailable, match="no C\\+\\+ compiler") as caught:
        installed.library_path("cpu")
    assert caught.value.remedy


def test_no_compiler_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = _build.find_cxx()
    assert tool.path is None
    assert "no C++ compiler" in tool.reason
    assert tool.remedy


@needs_compiler
def test_first_use_can_be_forbidden(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_MLP_JIT", "0")
    with pytest.raises(installed.BuildUnavailable, match="FUSED_MLP_JIT=0"):
        installed.library_path("cpu")


@needs_compiler
def test_a_failed_build_is_remembered(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that finds a failure on record says so at once and compiles nothing."""
    broken = tmp_path / "site/fused_mlp/csrc/cpu/broken.cpp"
    broken.write_text("#error this cannot be\n")
    compiled = counting_compiler(tmp_path, monkeypatch)
    for attempt in range(2):
        with pytest.raises(installed.BuildFailed, match="this cannot be") as caught:
            installed.library_path("cpu")
        if attempt == 0:
            count = compiled()
    assert compiled() == count
    record = re.search(r"\S+\.failed", caught.value.remedy)
    assert record is not None
    assert "#error this cannot be" in Path(record[0]).read_text()
    broken.unlink()
    assert installed.library_path("cpu").is_file()


@needs_compiler
def test_cache_that_cannot_be_written(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_MLP_CACHE", str(tmp_path / "file"))
    with pytest.raises(installed.BuildUnavailable, match="cannot be written") as caught:
        installed.library_path("cpu")
    assert "FUSED_MLP_CACHE" in caught.value.remedy


on_posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@needs_compiler
@on_posix
def test_cache_that_others_may_write_to_is_refused(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_MLP_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(installed.BuildUnavailable, match="other users may write") as caught:
        installed.library_path("cpu")
    assert "chmod go-w" in caught.value.remedy
    tmp_path.chmod(0o755)
    assert installed.library_path("cpu").is_file()
    tmp_path.chmod(0o777)  # nor is a library taken from there that others may have replaced
    with pytest.raises(installed.BuildUnavailable, match="other users may write"):
        installed.library_path("cpu")


@needs_compiler
@on_posix
def test_cache_is_made_for_its_user_alone(installed: ModuleType) -> None:
    folder = installed.library_path("cpu").parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@on_posix
@pytest.mark.parametrize(
    ("mode", "owner", "group", "taken"),
    [
        (0o755, 0, 0, True),
        (0o775, 0, 0, True),  # the user's own group
        (0o775, 0, 12345, False),
        (0o1777, 0, 0, True),  # as /tmp: others can add files and not replace ours
        (0o777, 0, 0, False),
        (0o755, 12345, 0, False),
    ],
)
def test_folders_above_the_cache_count(
    installed: ModuleType, tmp_path: Path, mode: int, owner: int, group: int, taken: bool
) -> None:
    """Whoever can rename a folder above the cache can put another in its place."""
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    above = tmp_path / "above"
    folder = above / "root" / "fingerprint"
    folder.mkdir(parents=True)
    os.chown(above, owner, group)
    above.chmod(mode)
    check = sys.modules[f"{installed.__name__}.library"]._check_private
    if taken:
        assert check(folder) == folder.resolve()
        return
    with pytest.raises(installed.BuildUnavailable, match="other users may write") as caught:
        check(folder)
    assert str(above) in caught.value.reason
    assert caught.value.remedy


@on_posix
def test_cache_is_looked_for_behind_links(installed: ModuleType, tmp_path: Path) -> None:
    """Who owns a link can turn it elsewhere after the check: what is used has no link in it."""
    folder = tmp_path / "real" / "fingerprint"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check = sys.modules[f"{installed.__name__}.library"]._check_private
    assert check(tmp_path / "link" / "fingerprint") == folder.resolve()


@needs_compiler
def test_processes_that_start_together_build_once(
    installed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = counting_compiler(tmp_path, monkeypatch)
    script = tmp_path / "use.py"
    loads = loads_by_path(tmp_path / "site/fused_mlp/_build")
    script.write_text(loads + 'print(module.library_path("cpu"))\n')
    running = [
        subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    isas = set(_build.describe(Path(printed.pop().strip()))["isas"]) - OF_BFLOAT16
    assert compiled() == 1 + len(isas)
