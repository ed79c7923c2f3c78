"""What each op means, in plain PyTorch.

This is the oracle of the tests, the implementation on devices and machines without kernels of
ours, and the formula that double backward, ``torch.func`` transforms and forward-mode AD
differentiate. Functions named like a kernel have that kernel's signature (ops/schemas.py); the
``*_formula`` functions are differentiable and return the output alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations
from .dropout import keep_mask


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums and statistics of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------- normalize


def _dims(input: Tensor, dim: Sequence[int] | None) -> list[int]:
    return list(range(input.dim())) if dim is None else list(dim)


def _count(input: Tensor, dim: Sequence[int] | None) -> int:
    count = 1
    for d in _dims(input, dim):
        count *= input.shape[d]
    return count


def _centre(x: Tensor, dims: list[int], keepdim: bool) -> tuple[Tensor, Tensor]:
    """Return the mean over ``dims`` and x less it.

    One value of each group is taken off first: a large offset then costs no accuracy, and equal
    values have a deviation of exactly 0.
    """
    if not dims:
        return x.clone(), x - x
    first = x.new_zeros(())
    if x.numel():
        first = x
        for d in dims:
            first = first.narrow(d, 0, 1)
    shifted = x - first
    mean = shifted.mean(dims, keepdim=True)
    centred = shifted - mean
    # What the first sum lost, where torch adds up outer dimensions one rounding a term.
    lost = centred.mean(dims, keepdim=True)
    centred = centred - lost
    mean = first + (mean + lost)
    return mean if keepdim else mean.squeeze(dims), centred


def normalize(
    input: Tensor, dim: Sequence[int] | None, correction: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.to(accumulate_dtype(input.dtype))
    dims = _dims(input, dim)
    keepdim = dim is not None
    mean, centred = _centre(x, dims, keepdim)
    # torch.var with the dims and a correction above the count gives inf; clamp as torch.std does.
    freedom = max(_count(input, dim) - correction, 0.0)
    if dims and freedom:
        # By Welford's formula: over outer dimensions a sum of squares adds up one rounding a term.
        std = centred.std(dims, correction=correction, keepdim=keepdim)
    else:
        squares = centred.square().sum(dims, keepdim=keepdim) if dims else centred.square()
        std = (squares / torch.full_like(squares, freedom)).sqrt()
    return (centred / (std + eps)).to(input.dtype), mean, std


def normalize_formula(
    input: Tensor, dim: Sequence[int] | None, correction: float, eps: float
) -> Tensor:
    dims = _dims(input, dim)
    x = input.to(accumulate_dtype(input.dtype))
    keepdim = dim is not None
    mean = x.mean(dims, keepdim=keepdim) if dims else x
    std = x.std(dims, correction=correction, keepdim=keepdim)
    return ((x - mean) / (std + eps)).to(input.dtype)


def normalize_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    dim: Sequence[int] | None,
    correction: float,
    eps: float,
) -> Tensor:
    dims = _dims(input, dim)
    grad = grad_output.to(mean.dtype)
    centred = input.to(mean.dtype) - mean
    rstd = 1 / (std + eps)
    freedom = max(_count(input, dim) - correction, 0.0)
    slope = (grad * centred).sum(dims, keepdim=True) if dims else grad * centred
    slope = (slope * rstd.square() / (freedom * std)).masked_fill(std == 0, 0)
    centre = grad.mean(dims, keepdim=True) if dims else grad
    return (rstd * (grad - centre) - centred * slope).to(input.dtype)


# ------------------------------------------------------------------ linear_act, linear_relu


def _dropout(input: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if p == 0 or seed is None:
        return input
    if not 0 <= p <= 1:
        raise ValueError(f"a dropout probability has to be between 0 and 1, but got {p}")
    columns = input.shape[-1]
    rows = input.numel() // columns if columns else 0
    keep = keep_mask(seed, rows, columns, p, stream).reshape(input.shape)
    # A product, as torch's dropout: a NaN or an infinity that is dropped becomes NaN.
    return input * (keep.to(input.dtype) * _scale(p))


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def activate_and_drop(
    input: Tensor, activation: int, negative_slope: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Return what stands behind the Linear or the batch norm in linear_act and batch_norm_act."""
    output = activations.TABLE[activation].value(input, negative_slope)
    return _dropout(output, dropout_p, seed, 0)


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_input: bool,
) -> list[Tensor]:
    activations.check_number("linear_act", activation)
    hidden = F.linear(input, weight, bias)
    output = activate_and_drop(hidden, activation, negative_slope, dropout_p, seed)
    if not keep_input:
        return [output]
    return [output, hidden.clone() if output is hidden else hidden]


def linear_act_formula(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return linear_act(
        input, weight, bias, activation, negative_slope, dropout_p, seed, False
    )[0]  # fmt: skip


def linear_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    kept: Tensor | None,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    activations.check_number("linear_act_backward", activation)
    grad = _dropout(grad_output, dropout_p, seed, 0)
    known = activations.TABLE[activation]
    if known.kept != activations.NOTHING:
        if kept is None:
            raise RuntimeError("linear_act_backward(): this activation needs what forward kept")
        if activation == activations.TANH and seed is not None and dropout_p > 0:
            kept = torch.tanh(kept)
        grad = known.gradient(grad, kept, negative_slope)
    return _linear_gradients(grad, input, weight, output_mask)


def _linear_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of input, weight and bias that are wanted, from the product's."""
    rows = math.prod(input.shape[:-1])  # a size of -1 is ambiguous beside one of 0
    flat = grad.reshape(rows, weight.shape[0])
    gradients = []
    if output_mask[0]:
        gradients.append(grad @ weight)
    if output_mask[1]:
        gradients.append(flat.t() @ input.reshape(rows, weight.shape[1]))
    if output_mask[2]:
        gradients.append(flat.sum(0, dtype=accumulate_dtype(flat.dtype)).to(flat.dtype))
    return gradients


def linear_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return linear_act_formula(input, weight, bias, activations.RELU, 0.0, dropout_p, seed)


linear_relu_formula = linear_relu


def linear_relu_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    # Zero exactly where ReLU or the mask stopped the value: here the output is all that is needed.
    grad = (grad_output * _scale(dropout_p)).masked_fill(output <= 0, 0)
    return _linear_gradients(grad, input, weight, output_mask)


# --------------------------------------------------- batch_norm_act, batch_norm_leaky_relu


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.reshape(-1, 1) if input.dim() == 3 else vector


def _channel_dims(input: Tensor) -> list[int]:
    return [0, 2] if input.dim() == 3 else [0]


def _affine(x: Tensor, vector: Tensor | None, default: float, input: Tensor) -> Tensor | float:
    return default if vector is None else _per_channel(vector.to(x.dtype), input)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    activations.check_number("batch_norm_act", activation, activations.LEAKY_RELU)
    x = input.to(accumulate_dtype(input.dtype))
    dims = _channel_dims(input)
    if training:
        mean, centred = _centre(x, dims, False)
        var = centred.square().mean(dims)
        _update_running(mean, var, input, running_mean, running_var, num_batches_tracked, momentum)
    elif running_mean is None or running_var is None:
        raise RuntimeError("batch norm: evaluation needs running_mean and running_var")
    else:
        mean, var = running_mean.to(x.dtype, copy=True), running_var.to(x.dtype)
    rstd = (var + eps).rsqrt()
    normalized = (x - _per_channel(mean, input)) * _per_channel(rstd, input)
    affine = normalized * _affine(x, weight, 1.0, input) + _affine(x, bias, 0.0, input)
    output = activate_and_drop(affine, activation, negative_slope, dropout_p, seed)
    return output.to(input.dtype), mean, rstd


def batch_norm_leaky_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm_act(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
        eps, activations.LEAKY_RELU, negative_slope, 0.0, None,
    )  # fmt: skip


def _update_running(
    mean: Tensor,
    var: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> None:
    count = input.numel() // max(input.shape[1], 1)
    if count == 0:  # nothing to learn from; the batch is counted all the same, as torch does
        running_mean = running_var = None
    if running_mean is not None:
        running_mean.copy_(running_mean.to(mean.dtype).lerp(mean, momentum))
    if running_var is not None:
        unbiased = var * (count / max(count - 1, 1))
        running_var.copy_(running_var.to(var.dtype).lerp(unbiased, momentum))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def batch_norm_act_formula(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the output from differentiable steps; running statistics are read, never written."""
    x = input.to(accumulate_dtype(input.dtype))
    if training:
        mean, var = x.mean(_channel_dims(input)), x.var(_channel_dims(input), correction=0)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
    normalized = (x - _per_channel(mean, input)) * _per_channel((var + eps).rsqrt(), input)
    affine = normalized * _affine(x, weight, 1.0, input) + _affine(x, bias, 0.0, input)
    output = activate_and_drop(affine, activation, negative_slope, dropout_p, seed)
    return output.to(input.dtype)


def batch_norm_leaky_relu_formula(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
) -> Tensor:
    return batch_norm_act_formula(
        input, running_mean, running_var, weight, bias, training, eps, activations.LEAKY_RELU,
        negative_slope, 0.0, None,
    )  # fmt: skip


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    activations.check_number("batch_norm_act_backward", activation, activations.LEAKY_RELU)
    dims = _channel_dims(input)
    x, grad = input.to(mean.dtype), _dropout(grad_output.to(mean.dtype), dropout_p, seed, 0)
    normalized = (x - _per_channel(mean, input)) * _per_channel(rstd, input)
    gamma = _affine(x, weight, 1.0, input)
    affine = normalized * gamma + _affine(x, bias, 0.0, input)
    grad = activations.TABLE[activation].gradient(grad, affine, negative_slope)
    count = max(input.numel() // max(input.shape[1], 1), 1)
    grad_bias = grad.sum(dims)
    grad_weight = (grad * normalized).sum(dims)
    gradients = []
    if output_mask[0]:
        if training:
            grad = grad - _per_channel(grad_bias / count, input)
            grad = grad - normalized * _per_channel(grad_weight / count, input)
        gradients.append((grad * _per_channel(rstd, input) * gamma).to(input.dtype))
    if output_mask[1]:
        gradients.append(grad_weight.to(weight.dtype if weight is not None else input.dtype))
    if output_mask[2]:
        gradients.append(grad_bias.to(bias.dtype if bias is not None else input.dtype))
    return gradients


def batch_norm_leaky_relu_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    return batch_norm_act_backward(
        grad_output, input, weight, bias, mean, rstd, training, activations.LEAKY_RELU,
        negative_slope, 0.0, None, output_mask,
    )  # fmt: skip


def linear_batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return batch_norm_act(
        F.linear(input, weight, bias), running_mean, running_var, None, bn_weight, bn_bias, False,
        0.0, eps, activation, negative_slope, dropout_p, seed,
    )[0]  # fmt: skip


# ---------------------------------------------------------------------------- research_net

# A graph holds what one backend keeps for backward.
_COMPILED = (
    "research_net(): this graph was compiled for the native CPU backend, which does not run now; "
    "compile again after torch.compiler.reset()"
)


def _hidden_activations(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> list[Tensor]:
    """Return the input followed by the output of every Linear+ReLU+Dropout layer."""
    outputs = [input]
    for layer, p in enumerate(dropout_p):
        hidden = F.linear(outputs[-1], weights[layer], biases[layer]).relu()
        outputs.append(_dropout(hidden, p, seed, layer))
    return outputs


def research_net(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    hidden = _hidden_activations(input, weights, biases, dropout_p, seed)[-1]
    hidden, mean, rstd = batch_norm_leaky_relu(
        F.linear(hidden, weights[-2], biases[-2]),
        running_mean,
        running_var,
        num_batches_tracked,
        bn_weight,
        bn_bias,
        training,
        momentum,
        eps,
        negative_slope,
    )
    return F.linear(hidden, weights[-1], biases[-1]), torch.cat([mean, rstd])


def research_net_formula(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """Return the output from differentiable steps; running statistics are read, never written."""
    hidden = _hidden_activations(input, weights, biases, dropout_p, seed)[-1]
    hidden = batch_norm_leaky_relu_formula(
        F.linear(hidden, weights[-2], biases[-2]),
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        eps,
        negative_slope,
    )
    return F.linear(hidden, weights[-1], biases[-1])


def research_net_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    saved: Tensor,
    training: bool,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    channels = weights[-2].shape[0]  # other backends keep more behind these
    mean, rstd = saved[:channels], saved[channels : 2 * channels]
    outputs = _hidden_activations(input, weights, biases, dropout_p, seed)
    before_norm = F.linear(outputs[-1], weights[-2], biases[-2])
    normalized = (before_norm.to(mean.dtype) - mean) * rstd
    affine = normalized * (1.0 if bn_weight is None else bn_weight.to(mean.dtype))
    affine = affine if bn_bias is None else affine + bn_bias.to(mean.dtype)
    hidden = F.leaky_relu(affine, negative_slope).to(input.dtype)

    grad_weights: list[Tensor] = [grad_output.t() @ hidden]
    grad_biases: list[Tensor] = [grad_output.sum(0)]
    grad, grad_bn_weight, grad_bn_bias = batch_norm_leaky_relu_backward(
        grad_output @ weights[-1],
        before_norm,
        bn_weight,
        bn_bias,
        mean,
        rstd,
        training,
        negative_slope,
        (True, True, True),
    )
    grad_weights.insert(0, grad.t() @ outputs[-1])
    grad_biases.insert(0, grad.sum(0))
    grad = grad @ weights[-2]
    for layer in reversed(range(len(dropout_p))):
        p = dropout_p[layer] if seed is not None else 0.0
        grad, grad_weight, grad_bias = linear_relu_backward(
            grad, outputs[layer], weights[layer], outputs[layer + 1], p, (True, True, True)
        )
        grad_weights.insert(0, grad_weight)
        grad_biases.insert(0, grad_bias)
    everything = [grad, *grad_weights, *grad_biases, grad_bn_weight, grad_bn_bias]
    return [g for g, wanted in zip(everything, output_mask, strict=True) if wanted]


def research_net_compiled(
    input: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    raise RuntimeError(_COMPILED)


def research_net_compiled_backward(
    grad_output: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor],
    saved: Tensor,
    options: Sequence[float],
    output_mask: int,
) -> list[Tensor]:
    raise RuntimeError(_COMPILED)


def research_net_compiled_evaluate(
    input: Tensor, tensors: Sequence[Tensor], eps: float, negative_slope: float
) -> Tensor:
    *parameters, running_mean, running_var = tensors
    layers = sum(parameter.dim() == 2 for parameter in parameters)
    bn_weight, bn_bias = parameters[2 * layers :] or (None, None)
    return research_net(
        input, parameters[:layers], parameters[layers : 2 * layers], bn_weight, bn_bias,
        running_mean, running_var, None, False, [0.0] * (layers - 2), None, 0.0, eps,
        negative_slope,
    )[0]  # fmt: skip
