"""What the tests of every op share: an independent oracle, the accuracy rule, sample arguments."""

from .accuracy import (
    assert_as_accurate,
    assert_same_differentiable_gradients,
    assert_same_nonfinite,
    check_case,
)
from .cases import (
    ACTIVATIONS,
    DTYPES,
    EXAMPLES,
    Case,
    act_case,
    batch_norm_case,
    example,
    linear_case,
    normalize_case,
    odd_sizes,
    odd_triples,
    research_case,
)
from .chains import mlp_case
from .environment import (
    INTERPRETED,
    MULTIPLIES_BFLOAT16,
    free_memory,
    native_python,
    needs_memory,
)
from .layouts import LAYOUTS, lay_out
from .philox import keep_mask, philox4x32
from .special import check_special_values

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "EXAMPLES",
    "INTERPRETED",
    "LAYOUTS",
    "MULTIPLIES_BFLOAT16",
    "Case",
    "act_case",
    "assert_as_accurate",
    "assert_same_differentiable_gradients",
    "assert_same_nonfinite",
    "batch_norm_case",
    "check_case",
    "check_special_values",
    "example",
    "free_memory",
    "keep_mask",
    "lay_out",
    "linear_case",
    "mlp_case",
    "native_python",
    "needs_memory",
    "normalize_case",
    "odd_sizes",
    "odd_triples",
    "philox4x32",
    "research_case",
]
