"""Run NVIDIA PTX on the CPU with NumPy, to check what a GPU kernel computes and count the traffic it causes.

    import numpy as np, ptxsim
    module = ptxsim.Module(open("kernels.ptx").read())         # nvcc -ptx, or Triton's asm["ptx"]
    module.launch("saxpy", grid=4, block=256, args=[x, y, np.float32(2), n])
    stats = module.launch("saxpy", grid=4, block=256, args=[x, y, np.float32(2), n], stats=True)

Arrays are updated in place.  See README.md for what is covered.
"""
from .errors import MemoryFault, ParseError, PtxError, SyncError, Unsupported
from .formats import bf16_to_f32, f32_to_bf16
from .module import Module, Struct, Undef
from .stats import BufferTraffic, LaunchStats

__all__ = [
    "BufferTraffic", "LaunchStats", "MemoryFault", "Module", "ParseError", "PtxError", "Struct", "SyncError",
    "Undef", "Unsupported", "bf16_to_f32", "f32_to_bf16"]
