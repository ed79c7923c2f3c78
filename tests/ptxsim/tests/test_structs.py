"""Structs with pointers, and arrays as misaligned as they are on the host."""
import numpy as np
import pytest

import ptxsim

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry add_one(.param .align 8 .b8 p[24])
{
    .reg .b64 %rd<6>;
    .reg .f32 %f<3>;
    .reg .b32 %r<2>;
    ld.param.u64 %rd1, [p];
    ld.param.u64 %rd2, [p+8];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f1, [%rd4];
    add.f32 %f2, %f1, 0f3F800000;
    st.global.f32 [%rd5], %f2;
    ret;
}
.visible .entry pack(.param .u64 x)
{
    .reg .b64 %rd<2>;
    .reg .f32 %f<5>;
    ld.param.u64 %rd1, [x];
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
    st.global.f32 [%rd1], %f4;
    ret;
}
"""


def aligned(n, offset=0):
    """float32 numbers that begin `offset` bytes behind a 256-byte boundary."""
    raw = np.zeros(4 * n + 512, np.uint8)
    start = -raw.ctypes.data % 256 + offset
    return raw[start:start + 4 * n].view(np.float32)


def pointers(*arrays):
    return b"".join(a.ctypes.data.to_bytes(8, "little") for a in arrays) + (7).to_bytes(8, "little")


@pytest.mark.parametrize("keep_alignment", [False, True])
def test_pointers_in_a_struct(keep_alignment):
    module = ptxsim.Module(PTX, check_uninit=True, keep_alignment=keep_alignment)
    x, y = aligned(8, 4), aligned(8)
    x[:] = np.arange(8)
    module.launch("add_one", 1, 8, [ptxsim.Struct(pointers(x, y), [x, ptxsim.Undef(y)])])
    assert (y == np.arange(8) + 1).all()


def test_pointer_into_an_array():
    module = ptxsim.Module(PTX)
    x = aligned(16)
    x[:] = np.arange(16)
    module.launch("add_one", 1, 8, [ptxsim.Struct(pointers(x, x[8:]), [x])])
    assert (x[8:] == np.arange(8) + 1).all()


def test_memory_that_the_struct_does_not_name():
    module = ptxsim.Module(PTX)
    x, y = aligned(8), aligned(8)
    with pytest.raises(ptxsim.MemoryFault):
        module.launch("add_one", 1, 8, [ptxsim.Struct(pointers(x, y), [x])])
    with pytest.raises(ptxsim.MemoryFault):
        module.launch("add_one", 1, 9, [ptxsim.Struct(pointers(x, y), [x, y])])


def test_unwritten_memory_of_a_struct():
    module = ptxsim.Module(PTX, check_uninit=True)
    x, y = aligned(8), aligned(8)
    with pytest.raises(ptxsim.MemoryFault, match="never-written"):
        module.launch("add_one", 1, 8, [ptxsim.Struct(pointers(x, y), [ptxsim.Undef(x), y])])


def test_alignment():
    x = aligned(8, 4)
    ptxsim.Module(PTX).launch("pack", 1, 1, [x])
    with pytest.raises(ptxsim.MemoryFault, match="misaligned"):
        ptxsim.Module(PTX, keep_alignment=True).launch("pack", 1, 1, [x])
    y = aligned(8, 16)
    y[:] = np.arange(8)
    ptxsim.Module(PTX, keep_alignment=True).launch("pack", 1, 1, [y])
    assert y[0] == 3
