"""What must hold of every op's gradients: numerical derivatives, subsets, strides, reuse."""

from __future__ import annotations

import pytest
import torch
from support import EXAMPLES, INTERPRETED, Case, check_case, example

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")

# The interpreter needs a second or more for a Jacobian of the whole network by differences.
DERIVABLE = [e for e in EXAMPLES if not (INTERPRETED and e.startswith("research_net-train-d"))]


@pytest.fixture
def case(device: torch.device, request: pytest.FixtureRequest) -> Case:
    """The example named by the test's parameter ``name``, in float64, ready to differentiate."""
    found = example(request.getfixturevalue("name"), dtype=torch.float64, device=device)
    for tensor in found.tensors.values():
        tensor.requires_grad_()
    return found


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.smoke), torch.bfloat16]
)
def test_values_and_gradients(device: torch.device, name: str, dtype: torch.dtype) -> None:
    check_case(example(name, dtype=dtype, device=device))


@pytest.mark.parametrize("name", DERIVABLE)
def test_gradcheck(case: Case, name: str) -> None:
    """First derivatives by differences; dropout's mask is fixed by a seed."""
    assert torch.autograd.gradcheck(case.fused, list(case.tensors.values()), fast_mode=False)


@pytest.mark.parametrize("name", DERIVABLE)
def test_gradgradcheck(case: Case, name: str) -> None:
    tensors = list(case.tensors.values())
    assert torch.autograd.gradgradcheck(case.fused, tensors, fast_mode=name.startswith("research"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_zero_stride_gradient(case: Case, name: str) -> None:
    """``out.sum().backward()`` hands back one number expanded over the output."""
    weights = torch.randn(case.fused(*case.tensors.values()).shape[-1:]).to(case.tensors["input"])
    check_case(case, None, weights.expand_as(case.fused(*case.tensors.values())))
    one = weights.new_ones(()).expand_as(case.fused(*case.tensors.values()))
    given = torch.autograd.grad(case.fused(*case.tensors.values()).sum(), [*case.tensors.values()])
    dense = torch.autograd.grad(
        case.fused(*case.tensors.values()), [*case.tensors.values()], one.contiguous()
    )
    for a, b in zip(given, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_subset_of_inputs(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Frozen inputs get no gradient, and the others the same one as if nothing were frozen."""
    case = example(name, dtype=dtype, device=device)
    tensors = [t.requires_grad_() for t in case.tensors.values()]
    output = case.fused(*tensors)
    grad_output = torch.randn(output.shape).to(output)
    everything = torch.autograd.grad(output, tensors, grad_output)
    count = len(tensors)
    subsets = range(1, 2**count) if count <= 4 else [2**i for i in range(count)]
    if count > 4:  # of many inputs each alone, each frozen, and a few mixtures
        subsets = [
            *subsets,
            *(2**count - 1 - 2**i for i in range(count)),
            0x55555,
            0x2AAAA,
            0x0F0F6,
        ]
    for subset in subsets:
        leaves = [t.detach().requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(tensors)]
        case.fused(*leaves).backward(grad_output)
        for leaf, expected, given in zip(leaves, everything, case.tensors, strict=True):
            if not leaf.requires_grad:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(
                    leaf.grad, expected, msg=lambda m, g=given: f"{name}, gradient of {g}: {m}"
                )
    assert not case.fused(*(t.detach() for t in tensors)).requires_grad
    with torch.no_grad():
        assert not case.fused(*tensors).requires_grad


@pytest.mark.parametrize("name", EXAMPLES)
def test_same_output_with_and_without_autograd(device: torch.device, name: str) -> None:
    case = example(name, dtype=torch.float32, device=device)
    tensors = list(case.tensors.values())
    recorded = case.fused(*(t.detach().requires_grad_() for t in tensors))
    assert torch.equal(case.fused(*tensors), recorded)
    with torch.inference_mode():
        assert torch.equal(case.fused(*tensors), recorded)


@pytest.mark.parametrize("name", EXAMPLES)
def test_retained_graph(case: Case, name: str) -> None:
    """Backward twice over one graph gives the same bits twice."""
    tensors = list(case.tensors.values())
    output = case.fused(*tensors)
    grad_output = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    second = torch.autograd.grad(output, tensors, grad_output)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, tensors, grad_output)


@pytest.mark.parametrize("name", EXAMPLES)
def test_saved_tensor_changed_in_place(case: Case, name: str) -> None:
    """A changed input makes backward raise, never a wrong gradient."""
    for changed in ("input", *(t for t in case.tensors if t.startswith(("weight", "bn_weight")))):
        tensors = list(case.tensors.values())
        output = case.fused(*tensors)
        with torch.no_grad():
            case.tensors[changed].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_output_changed_in_place(device: torch.device) -> None:
    """linear_relu keeps its output for backward."""
    case = example("linear_relu", dtype=torch.float32, device=device)
    output = case.fused(*(t.requires_grad_() for t in case.tensors.values()))
    with torch.no_grad():
        output.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["linear_relu", "batch_norm-train", "research_net-train"])
def test_same_tensor_twice(device: torch.device, name: str) -> None:
    """One tensor in two places gets the sum of both gradients, in double backward too."""
    case = example(name, dtype=torch.float64, device=device)
    shared = case.tensors["weight" if "weight" in case.tensors else "bn_weight"]
    shared = shared.requires_grad_()
    names = [n for n, t in case.tensors.items() if n != "input" and t.shape == shared.shape]

    def twice(t: torch.Tensor) -> torch.Tensor:
        return case.fused(*(t if n in names else v for n, v in case.tensors.items()))

    def twice_plain(t: torch.Tensor) -> torch.Tensor:
        return case.plain(*(t if n in names else v for n, v in case.tensors.items()))

    for function in (twice, twice_plain):
        (grad,) = torch.autograd.grad(function(shared).square().sum(), shared, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), shared)
        if function is twice:
            ours = grad.detach(), second
    torch.testing.assert_close(ours[0], grad.detach())
    torch.testing.assert_close(ours[1], second)


def test_undefined_output_gradient(device: torch.device) -> None:
    """An output nobody used costs nothing and breaks nothing."""
    case = example("linear_relu", dtype=torch.float32, device=device)
    x, *rest = (t.requires_grad_() for t in case.tensors.values())
    case.fused(x, *rest)
    (x * 2).sum().backward()
    assert (x.grad == 2).all()


@pytest.mark.parametrize("name", ["linear_relu", "batch_norm-train", "normalize-dim"])
def test_chained(device: torch.device, name: str) -> None:
    """Inputs that are not leaves, as in a network, and a hook on the way."""
    case = example(name, dtype=torch.float64, device=device)
    seen = []
    results = []
    for function in (case.fused, case.plain):
        leaves = [t.detach().requires_grad_() for t in case.tensors.values()]
        inputs = [t * 2 for t in leaves]
        inputs[0].register_hook(lambda g: seen.append(g))
        results.append(torch.autograd.grad(function(*inputs).tanh().sum(), leaves))
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(results[0], results[1])
