"""The accuracy rule: a fused result may err at most twice as much as torch's own.

Both are measured against the same formula in float64, as the largest error over the largest
value and as the relative error in the 2-norm, so nobody tunes a tolerance for a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Case

# What is let through where torch happens to be exact: about 8 units in the last place of float32.
# The float64 oracle is itself rounded, by some 100 units after a sum of a few hundred terms.
_FLOOR = {torch.float64: 5e-14}
_FLOOR_ELSE = 1e-6


def _errors(result: Tensor, exact: Tensor, scale: Tensor) -> tuple[float, float]:
    difference = result.double() - exact
    largest = scale.abs().max().item() if scale.numel() else 0.0
    norm = largest * exact.numel() ** 0.5 if scale is not exact else exact.norm().item()
    return (
        difference.abs().max().item() / (largest or 1.0),
        difference.norm().item() / (norm or 1.0),
    )


def assert_as_accurate(
    fused: Tensor,
    eager: Tensor,
    exact: Tensor,
    what: str = "result",
    scale: Tensor | None = None,
    roundings: int = 1,
) -> None:
    """Assert that ``fused`` errs less than twice as much as ``eager``, which has its dtype.

    Args:
        fused: the result under test.
        eager: what torch's own operations give for the same inputs in the same dtype.
        exact: what they give in float64.
        what: names the result in the message.
        scale: something of the size of the terms that cancel where ``exact`` is zero by nature.
        roundings: how often the steps round to the dtype one after the other.
    """
    assert fused.shape == exact.shape, f"{what}: shape {fused.shape}, expected {exact.shape}"
    assert fused.dtype == eager.dtype, f"{what}: dtype {fused.dtype}, expected {eager.dtype}"
    assert fused.device == eager.device, f"{what}: on {fused.device}, expected {eager.device}"
    assert_same_nonfinite(fused, eager, what)
    finite = exact.isfinite() & eager.isfinite()
    fused, eager, exact = fused[finite], eager[finite], exact[finite]
    if not exact.numel():
        return
    floor = _FLOOR.get(fused.dtype, _FLOOR_ELSE)
    # Nothing of this dtype comes nearer than the exact values rounded, not even lucky torch; of a
    # few values, or of a chain of steps, the rounding itself may be lucky.
    unit = torch.finfo(fused.dtype).eps
    least = (roundings * unit / 2,) * 2
    if scale is not None and fused.dtype == torch.float64:
        floor *= 50  # what is zero by nature is rounding alone, in the oracle as well
    if scale is None:
        scale = exact
        if exact.numel() >= 8 and roundings == 1:
            least = _errors(exact.to(fused.dtype), exact, scale)
    for kind, ours, torchs, unavoidable in zip(
        ("largest", "norm"),
        _errors(fused, exact, scale),
        _errors(eager, exact, scale),
        least,
        strict=True,
    ):
        allowed = 2 * max(torchs, unavoidable) + floor
        assert ours < allowed, (
            f"{what}: {kind} relative error {ours:.3g}, torch's own is {torchs:.3g} "
            f"(allowed {allowed:.3g}, {fused.dtype}, {fused.numel()} finite elements)"
        )


def assert_same_nonfinite(fused: Tensor, eager: Tensor, what: str = "result") -> None:
    """Assert that NaN and the infinities stand exactly where torch has them."""
    for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        ours, torchs = test(fused), test(eager)
        wrong = (ours != torchs).nonzero()
        assert not len(wrong), (
            f"{what}: {name} at {len(wrong)} other places than torch's own, the first at "
            f"{tuple(wrong[0].tolist())} (ours {int(ours.sum())}, torch's {int(torchs.sum())})"
        )


def check_case(
    case: Case, tensors: Sequence[Tensor] | None = None, grad_output: Tensor | None = None
) -> None:
    """Assert that output and every gradient of ``case`` are as accurate as torch's own.

    Args:
        case: the op and its plain counterpart.
        tensors: differentiable inputs in place of the case's own, of any strides.
        grad_output: gradient of the output; random when None.
    """
    inputs = [t.detach() for t in (case.tensors.values() if tensors is None else tensors)]
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, function in (("eager", case.plain), ("exact", case.exact), ("fused", case.fused)):
        leaves = [(t.double() if name == "exact" else t).detach().requires_grad_() for t in inputs]
        output = function(*leaves)
        if grad_output is None:
            generator = torch.Generator().manual_seed(output.numel())
            grad_output = torch.randn(output.shape, generator=generator).to(output)
            if case.sure is not None:
                grad_output = grad_output * case.sure(*(t.double() for t in inputs)).to(output)
        grad = grad_output.double() if name == "exact" else grad_output
        results[name] = (output.detach(), *torch.autograd.grad(output, leaves, grad))
    names = ("output", *(f"gradient of {name}" for name in case.tensors))
    exact_gradients = dict(zip(case.tensors, results["exact"][1:], strict=True))
    for what, fused, eager, exact in zip(
        names, results["fused"], results["eager"], results["exact"], strict=True
    ):
        partner = case.scales.get(what.removeprefix("gradient of "))
        scale = exact_gradients[partner] if partner else None
        assert_as_accurate(fused, eager, exact, f"{case.name}: {what}", scale, case.roundings)


def assert_same_differentiable_gradients(case: Case) -> None:
    """Assert that eager's gradients of a float64 ``case``, and theirs, are the fused op's too."""
    x, *rest = (t.detach().requires_grad_() for t in case.tensors.values())
    found = []
    for function in (case.fused, case.plain):
        output = function(x, *rest)
        gradients = torch.autograd.grad(output.square().sum(), [x, *rest], create_graph=True)
        (second,) = torch.autograd.grad(gradients[0].square().sum(), x)
        found.append((*gradients, second))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
