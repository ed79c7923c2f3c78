"""Where the libraries lie, and building one that is missing or older than its sources.

Three places: beside the package (built at install time); beside the package again in a checkout,
where a library that no longer fits its sources is rebuilt; and the user's cache, for an
installation that came without a library (no compiler then, one now).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import BuildFailed, BuildUnavailable
from .plan import KINDS, cuda_architectures, fingerprint, make_plan, sources
from .runner import run
from .toolchain import find_cxx, find_nvcc

PACKAGE = Path(__file__).resolve().parent.parent
CHECKOUT = PACKAGE.parent


def source_root() -> Path:
    """The csrc folder: inside an installed package, at the top of a checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else CHECKOUT / "csrc"


def in_checkout() -> bool:
    """Whether the package runs from its sources (a checkout, or an editable install of one)."""
    return not (PACKAGE / "csrc").is_dir() and (CHECKOUT / "setup.py").is_file()


def cache_root() -> Path:
    """FUSED_MLP_CACHE, else fused_mlp in the platform's folder for caches."""
    if named := os.environ.get("FUSED_MLP_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fused_mlp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_mlp"


def library_path(kind: str) -> Path:
    """The library of ``kind`` ("cpu" or "cuda"), built now if it must and can be.

    Raises BuildUnavailable(reason, remedy) where there is none. A build that failed is
    remembered, so that only the first process pays for it. FUSED_MLP_JIT=0 forbids building.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    if installed := installed_library(kind):
        return installed
    prebuilt = PACKAGE / f"_C_{kind}.so"
    csrc = source_root()
    if not in_checkout():
        return _cached(kind, csrc)
    allowed = os.environ.get("FUSED_MLP_JIT", "1") != "0"
    if prebuilt.is_file() and not allowed:
        warnings.warn(
            f"{prebuilt.name} was built from other sources than those in {csrc}; "
            "unset FUSED_MLP_JIT or run: pip install -e .",
            RuntimeWarning,
            stacklevel=2,
        )
        return prebuilt
    if not os.access(PACKAGE, os.W_OK) or not os.access(CHECKOUT, os.W_OK):
        return _cached(kind, csrc)
    _check_buildable(kind, csrc)
    return _build_once(kind, csrc, CHECKOUT / "build" / "fused_mlp" / kind, prebuilt)


def installed_library(kind: str) -> Path | None:
    """The library beside the package, where there is one and it goes with the sources."""
    library = PACKAGE / f"_C_{kind}.so"
    if not library.is_file():
        return None
    if in_checkout() and describe(library).get("fingerprint") != fingerprint(kind, source_root()):
        return None
    return library


def describe(library: Path) -> dict[str, Any]:
    """What is known of a built library: fingerprint, compiler, instruction sets or GPUs."""
    try:
        facts = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def build_library(kind: str, csrc: Path, folder: Path, output: Path, native: bool = False) -> None:
    """Compiles in ``folder`` (kept, for the next time) and puts the library at ``output``.

    Safe beside other processes that build or load the same library: one builds at a time, and
    the file at ``output`` is replaced as a whole. Raises BuildUnavailable or BuildFailed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock")):
        _build_locked(kind, csrc, folder, output, native)


def _build_locked(kind: str, csrc: Path, folder: Path, output: Path, native: bool) -> None:
    read = fingerprint(kind, csrc)  # before compiling, should a file change meanwhile
    plan = make_plan(kind, csrc, folder, native)
    run(plan)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"fingerprint": read, **plan.facts}
    _replace(output, lambda path: shutil.copyfile(plan.output, path))
    _replace(output.with_suffix(".json"), lambda path: path.write_text(json.dumps(facts)))


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o755 if target.suffix == ".so" else 0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_buildable(kind: str, csrc: Path) -> None:
    """Raises BuildUnavailable where it is plain, without trying, that nothing can be built."""
    if not sources(kind, csrc):
        raise BuildUnavailable(f"this version has no {kind} sources")
    for tool in (find_cxx(), find_nvcc()) if kind == "cuda" else (find_cxx(),):
        if tool.path is None:
            raise BuildUnavailable(tool.reason, tool.remedy)
    if os.environ.get("FUSED_MLP_JIT", "1") == "0":
        raise BuildUnavailable(
            f"_C_{kind}.so was not built at install time and FUSED_MLP_JIT=0 forbids to build now",
            "unset FUSED_MLP_JIT, or install again now that there is a compiler",
        )


def _cached(kind: str, csrc: Path) -> Path:
    name = fingerprint(kind, csrc)
    if kind == "cuda" and (nvcc := find_nvcc().path):
        # libraries for different GPUs lie side by side in a home that machines share
        name += "-" + "-".join(cuda_architectures(nvcc, native=True))
    folder = cache_root() / name
    library = folder / f"_C_{kind}.so"
    if library.is_file():
        return _check_private(folder) / library.name
    _check_buildable(kind, csrc)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BuildUnavailable(
            f"the cache {folder} cannot be written: {error.strerror}",
            "set FUSED_MLP_CACHE to a folder that can",
        ) from error
    folder = _check_private(folder)
    return _build_once(kind, csrc, folder / f"objects-{kind}", folder / library.name)


def _check_private(folder: Path) -> Path:
    """The folder without links. Raises BuildUnavailable where another user could change it.

    As sshd looks at its key files: the folder and all above it, up to the user's home, belong to
    the user or to root and are not writable by others. A group may write that is the user's own.
    Above the cache, others may write where only a file's owner can replace it, as in /tmp.
    """
    folder = folder.resolve()  # a link checked now may lead elsewhere later
    if not hasattr(os, "getuid"):
        return folder
    home = Path.home().resolve()
    places = [folder, *folder.parents]
    if home in places:
        places = places[: places.index(home) + 1]
    for place in places:
        state = place.stat()
        foreign = state.st_uid not in (os.getuid(), 0)
        by_group = state.st_mode & stat.S_IWGRP and state.st_gid not in (os.getgid(), 0)
        shared = by_group or state.st_mode & stat.S_IWOTH
        sticky = state.st_mode & stat.S_ISVTX and place not in (folder, folder.parent)
        if foreign or (shared and not sticky):
            raise BuildUnavailable(
                f"other users may write to the cache {folder}: {place} is "
                + ("another user's" if foreign else f"{stat.filemode(state.st_mode)}"),
                "set FUSED_MLP_CACHE to a folder of your own"
                if foreign
                else f"run: chmod go-w {place}, or set FUSED_MLP_CACHE to a folder of your own",
            )
    return folder


def _build_once(kind: str, csrc: Path, folder: Path, library: Path) -> Path:
    """Builds unless another process has done so, or has failed to, meanwhile or before."""
    folder.mkdir(parents=True, exist_ok=True)
    failure = folder.with_suffix(".failed")
    with _lock(folder.with_suffix(".lock")):
        current = fingerprint(kind, csrc)
        if library.is_file() and describe(library).get("fingerprint") == current:
            return library
        attempt = f"{current} {find_cxx().path} {find_nvcc().path}"
        known = failure.read_text().split("\n", 2) if failure.is_file() else []
        if len(known) == 3 and known[0] == attempt:
            raise BuildFailed(
                known[1], f"what the compiler said is in {failure}; delete it to retry"
            )
        print(f"fused_mlp: compiling the {kind} kernels, once …", file=sys.stderr, flush=True)
        try:
            _build_locked(kind, csrc, folder, library, native=True)
        except BuildFailed as error:
            failure.write_text(f"{attempt}\n{error.reason}\n{error.output}")
            remedy = f"what the compiler said is in {failure}"
            raise BuildFailed(error.reason, remedy, error.output) from error
        failure.unlink(missing_ok=True)
        if not in_checkout():
            shutil.rmtree(folder, ignore_errors=True)
    return library


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds ``path`` against other processes; released by the system should this one die."""
    try:
        import fcntl
    except ImportError:  # no POSIX locks: the last of two builders wins, with the same result
        yield
        return
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
