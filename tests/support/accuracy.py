"""The accuracy rule: a fused result may err at most twice as much as torch's own.

Both are measured against the same formula in float64, as the largest error over the largest
value and as the relative error in the 2-norm, so nobody tunes a tolerance for a kernel.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Case

Results = tuple[Tensor, ...]  # output and gradients

# What is let through where torch happens to be exact: about 8 units in the last place of float32.
# The float64 oracle is itself rounded, by some 100 units after a sum of a few hundred terms.
_FLOOR = {torch.float64: 5e-14}
_FLOOR_ELSE = 1e-6
_NEIGHBOURS = 24  # inputs a rounding away from those given, to see what luck torch has


def _errors(result: Tensor, exact: Tensor, scale: Tensor | None) -> tuple[float, float]:
    finite = exact.isfinite() & result.isfinite()
    result, exact = result[finite], exact[finite]
    difference = result.double() - exact
    scale = exact if scale is None else scale
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
    neighbours: Callable[[], Sequence[tuple[Tensor, Tensor]]] | None = None,
) -> None:
    """Assert that ``fused`` errs less than twice as much as ``eager``, which has its dtype.

    Args:
        fused: the result under test.
        eager: what torch's own operations give for the same inputs in the same dtype.
        exact: what they give in float64.
        what: names the result in the message.
        scale: something of the size of the terms that cancel where ``exact`` is zero by nature.
        roundings: how often the steps round to the dtype one after the other.
        neighbours: returns (eager, exact) of other inputs, as good as the given ones. Asked for
            where the rule is broken: of a few values one eager result may be lucky, and the worst
            of all of them is how much torch errs.
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
    if scale is None and exact.numel() >= 8 and roundings == 1:
        least = _errors(exact.to(fused.dtype), exact, scale)
    ours, torchs = _errors(fused, exact, scale), _errors(eager, exact, scale)

    def allowed() -> tuple[float, ...]:
        return tuple(2 * max(pair) + floor for pair in zip(torchs, least, strict=True))

    if neighbours is not None and not all(map(operator.lt, ours, allowed())):
        for near, its_exact in neighbours():
            torchs = tuple(map(max, torchs, _errors(near, its_exact, scale)))
    for kind, error, torch_error, most in zip(
        ("largest", "norm"), ours, torchs, allowed(), strict=True
    ):
        assert error < most, (
            f"{what}: {kind} relative error {error:.3g}, torch's own is {torch_error:.3g} "
            f"(allowed {most:.3g}, {fused.dtype}, {fused.numel()} finite elements)"
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
    if grad_output is None:
        output = case.plain(*inputs)
        generator = torch.Generator().manual_seed(output.numel())
        grad_output = torch.randn(output.shape, generator=generator).to(output)
        grad_output = _where_sure(case, inputs, grad_output)
    eager, exact = _plain_results(case, inputs, grad_output)
    fused = _results(case.fused, inputs, grad_output)

    @functools.cache
    def near() -> list[tuple[Results, Results]]:
        moved = ([_nudged(t) for t in inputs] for _ in range(_NEIGHBOURS))
        return [_plain_results(case, i, _where_sure(case, i, grad_output)) for i in moved]

    def neighbours_of(i: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        if eager[i].dtype == torch.float64:
            # Torch is its own oracle: how far a rounding of the input moves it is how far it errs.
            return lambda: [(moved[i], exact[i]) for moved, _ in near()]
        return lambda: [(its_eager[i], its_exact[i]) for its_eager, its_exact in near()]

    names = ("output", *(f"gradient of {name}" for name in case.tensors))
    exact_gradients = dict(zip(case.tensors, exact[1:], strict=True))
    sizes: list[Tensor | None] = [None] * len(exact)
    if case.terms is not None:
        _, *terms = _results(case.terms, [t.double() for t in inputs], grad_output.double())
        sizes[1:] = [t.nan_to_num(0, 0, 0) for t in terms]
    for i, what in enumerate(names):
        partner = case.scales.get(what.removeprefix("gradient of "))
        scale = exact_gradients[partner] if partner else sizes[i]
        assert_as_accurate(
            fused[i], eager[i], exact[i], f"{case.name}: {what}", scale, case.roundings,
            neighbours_of(i),
        )  # fmt: skip


def _results(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Results:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


def _plain_results(case: Case, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Results, Results]:
    exact = _results(case.exact, [t.double() for t in inputs], grad.double())
    return _results(case.plain, inputs, grad), exact


def _where_sure(case: Case, inputs: Sequence[Tensor], grad: Tensor) -> Tensor:
    return grad if case.sure is None else grad * case.sure(*(t.double() for t in inputs)).to(grad)


def _nudged(tensor: Tensor) -> Tensor:
    """Move values by a rounding; what is repeated with stride 0 stays equal, and so as lucky."""
    values = tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            values = values.narrow(dim, 0, 1)
    unit = torch.finfo(tensor.dtype).eps
    return (values * (1 + unit * torch.randint_like(values, -1, 2))).expand_as(tensor)


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
