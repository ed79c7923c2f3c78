"""Compiles csrc/ into ``_C_cpu.so`` and ``_C_cuda.so`` with plain compiler calls.

Used twice: by setup.py, which loads this package by its file path in an environment that may
have no torch at all, and by ``fused_mlp.backends`` at first use, when no library was built at
install time. So nothing in here imports torch or anything else outside the standard library.

- ``toolchain``: finds torch's headers, the compilers, ninja, and what they accept
- ``plan``: which source is compiled with which flags, and the fingerprint of the result
- ``runner``: runs a plan with ninja, or with a pool of threads where there is no ninja
- ``library``: where the libraries lie; builds one in place or in the user's cache
"""

from .errors import BuildFailed, BuildUnavailable
from .library import (
    build_library,
    cache_root,
    describe,
    installed_library,
    library_path,
    source_root,
)
from .runner import max_jobs
from .toolchain import (
    Tool,
    find_cxx,
    find_ninja,
    find_nvcc,
    find_torch,
    torch_lacks_cuda,
    version_line,
)

__all__ = [
    "BuildFailed",
    "BuildUnavailable",
    "Tool",
    "build_library",
    "cache_root",
    "describe",
    "find_cxx",
    "find_ninja",
    "find_nvcc",
    "find_torch",
    "installed_library",
    "library_path",
    "max_jobs",
    "source_root",
    "torch_lacks_cuda",
    "version_line",
]
