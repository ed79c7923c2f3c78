"""The single layers: LinearReLU, BatchNormLeakyReLU, Normalize."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from support.networks import kernels_run
from torch import nn

from fused_mlp import (
    BatchNormLeakyReLU,
    FusedResearchNet,
    FusedSequential,
    LinearReLU,
    Normalize,
)
from fused_mlp.dropout import draw_seed, keep_mask

pytestmark = pytest.mark.usefixtures("target")


@pytest.mark.parametrize("bias", [True, False])
def test_linear_relu_layer_agrees_with_eager(device, bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 8, bias, device=device)
    torch.manual_seed(0)
    layer = LinearReLU(6, 8, bias, device=device)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(layer(x), linear(x).relu())
    assert kernels_run(layer, x) == ["linear_relu"]
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_linear_relu_layer_drops_in_training_alone(device):
    layer = LinearReLU(6, 64, dropout=0.5, device=device)
    x = torch.randn(5, 6, device=device)
    dense = layer.eval()(x)
    torch.manual_seed(3)
    output = layer.train()(x)
    torch.manual_seed(3)
    keep = keep_mask(draw_seed(device), 5, 64, 0.5)
    torch.testing.assert_close(output, dense * keep * 2)
    nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(layer.eval()(x), dense)
    with pytest.raises(ValueError, match="dropout probability"):
        LinearReLU(6, 8, dropout=-0.1)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 3)])
def test_batch_norm_leaky_relu_layer_agrees_with_eager(device, options, shape):
    norm = nn.BatchNorm1d(6, **options, device=device)
    layer = BatchNormLeakyReLU(6, **options, negative_slope=0.2, device=device)
    layer.load_state_dict(norm.state_dict(), strict=True)
    norm.load_state_dict(layer.state_dict(), strict=True)
    for _ in range(3):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(layer(x), F.leaky_relu(norm(x), 0.2), rtol=1e-4, atol=1e-5)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)
    layer.eval()
    norm.eval()
    torch.testing.assert_close(layer(x), F.leaky_relu(norm(x), 0.2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(x[0, 0])
    layer.train().eps = 0.0
    with pytest.raises(ValueError, match=r"^batch_norm eps must be positive during training"):
        layer(x)


@pytest.mark.parametrize("dim", [None, 0, 1, (0, 1)])
def test_normalize_layer_standardises(device, dim):
    x = torch.randn(9, 4, device=device) * 3 + 1
    dims = tuple(range(2)) if dim is None else dim
    expected = (x - x.mean(dims, keepdim=True)) / (x.std(dims, keepdim=True) + 0.1)
    torch.testing.assert_close(Normalize(dim, eps=0.1)(x), expected)


@pytest.mark.parametrize("layer", [LinearReLU(6, 8), BatchNormLeakyReLU(6), Normalize()])
def test_single_layers_compile_copy_and_show_their_options(device, layer):
    layer = layer.to(device)
    x = torch.randn(5, 6, device=device)
    expected = layer.eval()(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected)
    assert any(word in repr(layer) for word in ("dropout=0.0", "negative_slope=0.01", "dim=None"))


NESTED = {
    "research_net": lambda: FusedResearchNet(10, [64, 32], 5),
    "linear_relu": lambda: FusedSequential(nn.Linear(10, 5), nn.ReLU()),
    "linear_act": lambda: FusedSequential(nn.Linear(10, 5), nn.Tanh(), nn.Dropout(0.2)),
    "batch_norm_act": lambda: FusedSequential(nn.BatchNorm1d(10), nn.ReLU()),
    "linear_batch_norm_act": lambda: FusedSequential(nn.Linear(10, 5), nn.BatchNorm1d(5)),
    "LinearReLU": lambda: LinearReLU(10, 5),
    "BatchNormLeakyReLU": lambda: BatchNormLeakyReLU(10),
    "Normalize": Normalize,
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("kind", NESTED)
def test_nested_tensor_after_plain_ones(
    device: torch.device, kind: str, layout: torch.layout, gradients: bool
) -> None:
    """What recognises inputs seen before is torch's, and ends the process at a nested one."""
    module = NESTED[kind]().to(device).eval()
    parts = [torch.randn(n, 10, device=device) for n in (2, 3)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with torch.set_grad_enabled(gradients):
        expected = [module(part) for part in parts]
        try:
            outputs = module(nested).unbind()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return  # as torch's own batch norm, which takes none
        for output, one in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, one, rtol=1e-4, atol=1e-5)
