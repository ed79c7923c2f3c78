"""How torch.compile's code generator calls the raw ops: shortly, trusting what they return.

Inductor asserts sizes and strides of every tensor that a custom op returns, at every call: 0.5 us
each, and a training step of a small network has ten. What ours return is compared with what their
fake implementations promise by ``torch.library.opcheck`` in the tests instead. The Python frame of
``OpOverload.__call__`` takes another microsecond.
"""

from __future__ import annotations

import functools
import sys
from contextlib import suppress
from typing import Any

from torch.utils import _pytree as pytree


def call_shortly(op: Any) -> None:
    """Have Inductor lower an op as any other, but for its assertions and that frame.

    It has no public switch for single ops; where its insides are not those that are known here, it
    does as with any other. To be called while a graph is traced: Inductor is loaded then, if it is
    what compiles the graph.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    with suppress(AttributeError, TypeError):
        if op not in lowering.lowerings:
            lowering.make_fallback(op, lowering.constrain_to_fake_tensors)
            lowering.lowerings[op] = shortened(lowering.lowerings[op])


def shortened(lower: Any) -> Any:
    """Return the lowering of an op, made short."""

    @functools.wraps(lower)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        results = lower(*args, **kwargs)
        with suppress(AttributeError, TypeError, ValueError):
            for tensor in pytree.tree_leaves(results):
                _shorten(tensor.data.data)
        return results

    return lowered


def _shorten(output: Any) -> None:
    """Change the code that is written for one result of a call."""
    from torch._inductor.virtualized import V

    output.skip_size_stride_alignment_checks = True
    (call,) = output.inputs
    name = call.python_kernel_name
    # Code in C++ looks the op up by its name.
    if hasattr(call.op_overload, "_op") and not name.endswith("._op") and not V.graph.cpp_wrapper:
        call.python_kernel_name = f"{name}._op"
