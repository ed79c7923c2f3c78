"""The public interface: a module of PTX and its launches."""
import os
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np

from .batch import Batch
from .errors import PtxError
from .formats import FLOAT, TYPES
from .machine import Machine
from .memory import GlobalMemory
from .parse import parse
from .program import build
from .traffic import Instrument

MAX_THREADS_PER_BLOCK = 1024


class Undef:
    """Wraps an output array whose initial contents must not be read (with check_uninit)."""

    def __init__(self, array):
        self.array = array


class Struct:
    """A struct passed by value: its bytes as the host has them, and the arrays it points into.

    Each aligned 8-byte word that is an address within one of the arrays (or an Undef of one) is replaced by the
    simulated address of the same byte."""

    def __init__(self, raw, arrays):
        self.raw, self.arrays = bytes(raw), arrays


@dataclass
class Options:
    check_uninit: bool
    check_races: bool
    strict: bool
    blocks_per_batch: int | None
    max_threads: int
    max_steps: int
    keep_alignment: bool


class Module:
    """A PTX module whose kernels run on the CPU.

    ptx               the text: what `nvcc -ptx` writes, or Triton's `compiled.asm["ptx"]`
    check_uninit      fault on reading shared or local memory nobody wrote, and arrays passed as Undef
    check_races       fault on two threads touching a shared-memory byte, one writing, with no barrier between
    shuffle           a seed: blocks and the threads of an atomic run in random order
    strict            fault on barriers in divergent code and on shuffles from inactive lanes
    blocks_per_batch  blocks that run together (default: as many as hold max_threads threads); blocks that wait
                      for one another must be in one batch
    max_steps         scheduler steps of a batch after which a kernel counts as endless
    keep_alignment    arrays lie at their host addresses modulo 256, so that views are as misaligned as they are
                      on the host; otherwise every array starts at a 256-byte boundary

    Raises ParseError or Unsupported for text it cannot take apart; unsupported instructions raise when executed.
    """

    def __init__(self, ptx, check_uninit=False, check_races=False, shuffle=None, strict=True, blocks_per_batch=None,
                 max_threads=1 << 16, max_steps=20_000_000, keep_alignment=False):
        self.text = ptx
        self.options = Options(check_uninit, check_races, strict, blocks_per_batch, max_threads, max_steps,
                               keep_alignment)
        self.rng = None if shuffle is None else np.random.default_rng(shuffle)
        self.source = parse(ptx)
        self.memory = GlobalMemory()
        for variable in self.source.variables.values():
            if variable.space in ("global", "const") and not variable.extern:
                a = variable.allocation = self.memory.allocate(variable.size, variable.name)
                variable.address = a.base
                if variable.init:
                    a.bytes[:len(variable.init)] = np.frombuffer(variable.init, np.uint8)
        self.global_count = len(self.memory.allocations)
        self.compiled = {}
        self.counters = {}

    @classmethod
    def from_binary(cls, path, arch=None, cuobjdump=None, **options):
        """The modules embedded as PTX in an executable, shared library or object file (only those for sm_<arch>,
        if given).  `cuobjdump` defaults to the one on the PATH, else the one Triton ships."""
        if cuobjdump is None and not (cuobjdump := shutil.which("cuobjdump")):
            import triton
            cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        out = subprocess.run([cuobjdump, "--dump-ptx", path], capture_output=True, text=True, check=True).stdout
        texts = [part[part.index(".version"):] for part in out.split("Fatbin ptx code:")[1:] if ".version" in part]
        return [cls(t, **options) for t in texts
                if ".entry" in t and (arch is None or f"sm_{arch}" in t.split("\n", 3)[1])]

    @property
    def kernels(self):
        """Names of the kernels."""
        return [f.name for f in self.source.functions.values() if f.entry]

    def find(self, part):
        """The one kernel whose (mangled) name is or contains `part`."""
        hits = [k for k in self.kernels if k == part] or [k for k in self.kernels if part in k]
        if len(hits) != 1:
            raise PtxError(f"{len(hits)} kernels match {part!r}: {hits or self.kernels}")
        return hits[0]

    def unsupported(self, name):
        """Instructions of a kernel and its callees that cannot run: [(line, text)]."""
        return self.compile(self.find(name)).unsupported

    def read_global(self, name, dtype):
        """A copy of a __device__ or __constant__ variable as an array of `dtype`."""
        variable = self.source.variables[name]
        return variable.allocation.bytes[:variable.size].view(dtype).copy()

    def write_global(self, name, array):
        """Set the first bytes of a __device__ or __constant__ variable."""
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        self.source.variables[name].allocation.bytes[:raw.size] = raw

    def compile(self, name, stats=False):
        key = name, stats
        if key not in self.compiled:
            self.compiled[key] = build(self.source, name, self.options, self.memory, self.rng,
                                       Instrument() if stats else None)
        return self.compiled[key]

    def launch(self, name, grid, block, args=(), shared_bytes=0, pad_args=False, stats=False):
        """Run a kernel to its end.

        name          a kernel, or any unique part of its name
        grid, block   an int or up to three of them
        args          one for each parameter: NumPy arrays or torch CPU tensors (pointers, updated in place), None
                      (null), Python or NumPy scalars, bytes or Struct (structs by value, the latter with pointers).
                      bfloat16 arrays are uint16.
        shared_bytes  dynamic shared memory of a block
        pad_args      append nulls for missing parameters
        stats         count memory traffic and work: returns a LaunchStats (see stats.py) instead of None

        Raises PtxError (Unsupported, MemoryFault, SyncError); arrays then hold what was written so far.
        """
        grid, block = three(grid), three(block)
        name = self.find(name)
        kernel = self.compile(name, stats)
        function = kernel.function
        threads = block[0] * block[1] * block[2]
        required = function.required_threads
        if required and int(np.prod(required)) != threads:
            raise PtxError(f"kernel {name} requires {required} threads per block, launched with {block}")
        if threads > MAX_THREADS_PER_BLOCK:
            raise PtxError(f"{block} is over {MAX_THREADS_PER_BLOCK} threads per block")
        args = list(args)
        if pad_args:
            args += [None] * (len(function.params) - len(args))
        if len(args) != len(function.params):
            raise PtxError(f"kernel {name} takes {len(function.params)} parameters, got {len(args)}")
        param_bytes, copies = bind(function, args, self.memory, self.options.check_uninit,
                                   self.options.keep_alignment)
        total = grid[0] * grid[1] * grid[2]
        per_batch = self.options.blocks_per_batch or max(1, self.options.max_threads // (-(-threads // 32) * 32))
        blocks = np.arange(total) if self.rng is None else self.rng.permutation(total)
        machine = Machine(kernel)
        self.counters = machine.counters
        meter = kernel.instrument.meter(self.memory) if stats else None
        try:
            with np.errstate(all="ignore"):
                for first in range(0, total, per_batch):
                    batch = Batch(kernel, blocks[first:first + per_batch], grid, block, shared_bytes, param_bytes)
                    batch.meter = meter
                    machine.run(batch)
            if stats:
                return meter.result(name, grid, block, copies)
        finally:
            for c in copies:
                raw = c.allocation.bytes[c.offset:c.offset + c.array.nbytes]
                c.array[...] = raw.view(c.array.dtype).reshape(c.array.shape)
            self.memory.keep(self.global_count)


def three(size):
    """An int or a sequence -> three ints."""
    size = (size,) if np.isscalar(size) else tuple(size)
    return tuple(int(x) for x in size) + (1,) * (3 - len(size))


# ---------------------------------------------------------------- arguments
@dataclass
class ArrayArgument:
    """A pointer argument: the array, and where it lives in simulated memory (offset in bytes)."""

    index: int
    parameter: object
    array: np.ndarray
    undefined: bool
    allocation: object = None
    offset: int = 0

    @property
    def start(self):
        return self.array.__array_interface__["data"][0]

    @property
    def end(self):
        return self.start + self.array.nbytes


def bind(function, args, memory, check_uninit, keep_alignment=False):
    """-> (the parameter buffer, [ArrayArgument]); copies the arrays into simulated memory."""
    size = 0
    for parameter in function.params:
        size = -(-size // max(parameter.align, 1)) * max(parameter.align, 1)
        parameter.address = size
        size += parameter.size
    buffer = np.zeros(max(size, 8), np.uint8)
    arrays, structs = [], []
    for k, (parameter, value) in enumerate(zip(function.params, args)):
        undefined = isinstance(value, Undef)
        value = value.array if undefined else value
        if isinstance(value, Struct):
            members = [struct_array((k, j), parameter, m) for j, m in enumerate(value.arrays)]
            arrays += members
            structs.append((parameter, value.raw, members))
            value = value.raw
        if hasattr(value, "data_ptr"):
            value = tensor_bytes(value)
        if isinstance(value, np.ndarray) and parameter.size == 8:
            if not value.flags.c_contiguous:
                raise PtxError(f"argument {k} of {function.name} is not C-contiguous")
            arrays.append(ArrayArgument(k, parameter, value if value.flags.writeable else value.copy(), undefined))
            continue
        raw = scalar_bytes(value, parameter, f"argument {k} of {function.name}")
        buffer[parameter.address:parameter.address + parameter.size] = np.frombuffer(raw, np.uint8)
    place(arrays, memory, check_uninit, keep_alignment)
    inside = {id(a) for _, _, members in structs for a in members}
    for parameter, raw, members in structs:
        relocate(buffer, parameter, raw, members)
    for a in arrays:
        if id(a) in inside:
            continue
        pointer = (a.allocation.base + a.offset).to_bytes(8, "little")
        buffer[a.parameter.address:a.parameter.address + 8] = np.frombuffer(pointer, np.uint8)
    for a in memory.allocations:                                   # device variables count as initialised
        if a.shadow is not None and not any(a is b.allocation for b in arrays):
            a.shadow[1][:] = 255
    return buffer, arrays


def struct_array(index, parameter, member):
    """An array that a struct points into."""
    undefined = isinstance(member, Undef)
    array = member.array if undefined else member
    if hasattr(array, "data_ptr"):
        array = tensor_bytes(array)
    return ArrayArgument(index, parameter, array, undefined)


def relocate(buffer, parameter, raw, members):
    """Replace the pointers of a struct in the parameter buffer."""
    for at in range(0, len(raw) - 7, 8):
        address = int.from_bytes(raw[at:at + 8], "little")
        hits = [a for a in members if a.start <= address < a.end or address == a.start]
        if hits and address:
            a = max(hits, key=lambda a: a.array.nbytes)
            pointer = (a.allocation.base + a.offset + address - a.start).to_bytes(8, "little")
            buffer[parameter.address + at:parameter.address + at + 8] = np.frombuffer(pointer, np.uint8)


def place(arrays, memory, check_uninit, keep_alignment=False):
    """Give each array an allocation; arrays that overlap on the host share one."""
    groups = []
    for a in sorted(arrays, key=lambda a: (a.start, a.array.nbytes)):
        if groups and a.start < max(b.end for b in groups[-1]):
            groups[-1].append(a)
        else:
            groups.append([a])
    for group in groups:
        start, end = group[0].start, max(a.end for a in group)
        start -= start % 256 if keep_alignment else 0              # the bytes before count as never written
        names = ", ".join(f"arg {a.index} ({a.parameter.name})" for a in group)
        allocation = memory.allocate(end - start, names, check_uninit)
        for a in group:
            a.allocation, a.offset = allocation, a.start - start
            where = slice(a.offset, a.offset + a.array.nbytes)
            allocation.bytes[where] = a.array.reshape(-1).view(np.uint8) if a.array.nbytes else 0
            if allocation.shadow is not None and not a.undefined:
                allocation.shadow[1][where] = 255


def scalar_bytes(value, parameter, what):
    """A scalar argument as the parameter's bytes."""
    size = parameter.size
    if value is None:
        raw = bytes(size)
    elif isinstance(value, (bytes, bytearray)):
        raw = bytes(value)
    elif isinstance(value, (float, np.floating)) and not (isinstance(value, np.generic) and value.nbytes != size):
        raw = np.array(value, FLOAT[8 * size]).tobytes()
    elif isinstance(value, (bool, int, np.integer, np.bool_)):
        if TYPES[parameter.type][1] == "f":
            raw = np.array(value, FLOAT[8 * size]).tobytes()
        else:
            raw = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
    else:
        raise PtxError(f"{what}: cannot pass {type(value).__name__} as a {size}-byte parameter")
    if len(raw) != size:
        raise PtxError(f"{what}: {len(raw)} bytes for a {size}-byte parameter")
    return raw


def tensor_bytes(tensor):
    """The memory a torch CPU tensor spans, from its first to its last element, as a byte array."""
    import torch
    if tensor.numel() == 0:
        return np.zeros(0, np.uint8)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().as_strided((span,), (1,)).view(torch.uint8).numpy()
