"""Values at which an activation is most easily wrong."""

from __future__ import annotations

import torch

from .accuracy import assert_as_accurate, assert_same_nonfinite
from .cases import act_case

SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-30, -1e-30, 88.0, -88.0, 1e4,
           -1e4, 3e38, -3e38, 5e-324, -20.0, 9.0, -9.0, 0.5, -0.5, 1.0]  # fmt: skip


def check_special_values(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Assert that linear_act treats SPECIAL as torch does, forward and backward.

    Infinities, NaN, zeros of both signs and the ends of the range.
    """
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype).to(device)[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=device)
    example = act_case(kind, (1, 1), 1, bias=False, dtype=dtype, device=device)
    results = []
    # oneDNN's GELU of infinity is NaN, torch's own is not.
    with torch.backends.mkldnn.flags(enabled=False):
        for function in (example.fused, example.plain):
            leaf = x.clone().requires_grad_()
            output = function(leaf, one)
            (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
            results.append((output.detach(), grad))
        exact = example.exact(x.double(), one.double())
    for ours, torchs in zip(*results, strict=True):
        assert_same_nonfinite(ours, torchs)
    (ours, grad), (torchs, torchs_grad) = results
    huge = 1 + 2**-5  # relative errors alone: among these values the largest hides the others
    settled = ours.isfinite()
    assert torch.equal(ours.sign()[settled], torchs.sign()[settled])
    for i in range(len(SPECIAL)):
        if settled[i] and exact[i].abs() < torch.finfo(dtype).max / huge:
            assert_as_accurate(ours[i], torchs[i], exact[i], f"{kind}({SPECIAL[i]})", roundings=2)
    finite = torchs_grad.isfinite()
    torch.testing.assert_close(grad[finite], torchs_grad[finite])
    if kind in ("none", "relu", "leaky_relu", "tanh"):
        assert torch.equal(ours.signbit()[settled], torchs.signbit()[settled])
