"""``mlp``: Linear layers with what stands behind them, handed over once and run in one node.

The CPU library alone has it, for modules that call it again and again; ``compiled_mlp.py`` has the
ops of graphs of torch.compile. On a GPU each layer goes to an op of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations, reference
from ._common import (
    bound,
    check_floating,
    check_like,
    check_probability,
    check_tensor,
    differentiate_formula,
    grad_needed,
    mark_written,
    spread,
)
from .batch_norm_leaky_relu import check_norm
from .nested import shape_of

# A batch norm behind the product of a layer: weight, bias, running mean, running variance, batch
# counter, whether the batch's own statistics count, momentum, eps. As modules/norm.py has it.
Norm = tuple[Any, ...]


class Layers(NamedTuple):
    """Linear layers in a row.

    Attributes:
        weights: (out_features, in_features) each.
        biases: (out_features,) each, or None.
        activations, negative_slopes, dropout_p: what stands behind each, by number.
        norms: the batch norms between product and activation, by layer, in order.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    activations: Sequence[int]
    negative_slopes: Sequence[float]
    dropout_p: Sequence[float]
    norms: dict[int, Norm]

    def parameters(self) -> tuple[Tensor | None, ...]:
        affine = [tensor for norm in self.norms.values() for tensor in norm[:2]]
        return (*self.weights, *self.biases, *affine)

    def train(self) -> bool:
        """Return whether a batch norm takes the statistics of its batch."""
        return any(norm[5] for norm in self.norms.values())

    def keeps_output(self) -> bool:
        """Return whether the derivative of the last layer comes from what it puts out."""
        last = len(self.weights) - 1
        options = self.activations[last], self.negative_slopes[last], self.dropout_p[last]
        kept = activations.kept(*options)
        return kept == activations.OUTPUT and last not in self.norms

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return parameters and buffers."""
        buffers = [tensor for norm in self.norms.values() for tensor in norm[2:5]]
        return (*self.parameters(), *buffers)

    def written(self) -> tuple[Tensor, ...]:
        """Return the buffers that a call writes."""
        written = [norm[2:5] for norm in self.norms.values() if norm[5]]
        return tuple(tensor for tensors in written for tensor in tensors if tensor is not None)


_prepare = torch.ops.fused_mlp_kernels.mlp_prepare.default
prepared = bound(torch.ops.fused_mlp_kernels.mlp_prepared.default)  # takes input and handle
_backward = bound(torch.ops.fused_mlp_kernels.mlp_prepared_backward.default)
evaluate = bound(torch.ops.fused_mlp_kernels.mlp_evaluate.default)  # takes input and handle


class MLPFunction(torch.autograd.Function):
    """The autograd node of a chain of Linear layers.

    ``call`` holds what ``mlp_prepare`` made of the tensors; ``needs_input_grad`` where all
    parameters and no input want a gradient; whether the output tells the last derivative; the
    layers. The tensors that may need a gradient follow: input and :meth:`Layers.parameters`.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        output: Tensor
        output, saved = prepared(tensors[0], call[0])
        # Not the biases, which torch's own Linear does not need either: another value of one may
        # stand there in backward. Only gradients that are themselves differentiable see them.
        count = len(call[3].weights)
        ctx.save_for_backward(
            *tensors[: 1 + count], *tensors[1 + 2 * count :], saved, output if call[2] else None
        )
        ctx.call = call
        ctx.versions = _versions(call[3].biases)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *others, saved, output = ctx.saved_tensors
        handle, usual, _, layers = ctx.call
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            if ctx.versions != _versions(layers.biases):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: a bias, which a gradient of a gradient takes"
                )
            count = len(layers.weights)
            tensors = (input, *others[:count], *layers.biases, *others[count:])
            return None, *_differentiable(layers, tensors, saved, needed[1:], grad_output)
        if needed == usual:  # a mask takes 0.6 us to hand over
            found = _backward(grad_output, input, output, saved, handle, None)
            return None, None, *spread(found, needed[2:])
        found = _backward(grad_output, input, output, saved, handle, needed[1:])
        return None, *spread(found, needed[1:])


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


# See research_net.py.
apply_checked = super(torch.autograd.Function, MLPFunction).apply


def make_call(layers: Layers) -> tuple[Any, ...]:
    """Hand the layers over and return what the autograd node takes first, a handle at its start."""
    weights, biases, numbers, slopes, dropout_p, norms = layers
    norm_tensors = [tensor for norm in norms.values() for tensor in norm[:5]]
    options = [[norm[i] for norm in norms.values()] for i in (5, 6, 7)]
    handle = _prepare(
        weights, biases, numbers, slopes, dropout_p, list(norms), norm_tensors, *options
    )
    usual = (False, False, *[tensor is not None for tensor in layers.parameters()])
    return handle, usual, layers.keeps_output(), layers


def run(input: Tensor, layers: Layers) -> Tensor:
    """Return the output for checked arguments that fit: through the node, or the bare kernel."""
    call = make_call(layers)
    parameters = layers.parameters()
    output: Tensor
    if grad_needed(input, *parameters):
        output = apply_checked(call, input, *parameters)
    elif layers.train():
        output = prepared(input, call[0])[0]
    else:
        return evaluate(input, call[0])
    mark_written(*layers.written())
    return output


def check(input: Tensor, layers: Layers) -> None:
    """Raise for tensors that do not fit together."""
    check_floating("mlp", "input", input)
    check_layers("mlp", input, layers.weights, layers.biases, biases_may_lack=True)
    for layer, p in enumerate(layers.dropout_p):
        check_probability("mlp", f"dropout_p[{layer}]", p)
    for layer, norm in layers.norms.items():
        if input.dim() != 2:
            raise ValueError(f"mlp(): expected 2D input, but got {input.dim()}D")
        weight, bias, running_mean, running_var, tracked, training, _, eps = norm
        check_norm(
            "mlp", input, layers.weights[layer].shape[0], running_mean, running_var, weight, bias,
            training, eps, tracked, "bn_",
        )  # fmt: skip


def check_layers(
    op: str,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    biases_may_lack: bool = False,
) -> None:
    """Raise unless each layer takes what the one before it puts out."""
    features = (-1, *shape_of(op, "input", input))[-1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_tensor(op, f"weights[{layer}]", weight)
        shape = shape_of(op, f"weights[{layer}]", weight)
        if len(shape) != 2 or shape[1] != features:
            raise RuntimeError(
                f"{op}(): weights[{layer}] must have shape (out_features, {features}) to take "
                f"what comes before it, but got {shape}"
            )
        check_like(op, f"weights[{layer}]", weight, input, shape)
        features = shape[0]
        if bias is not None or not biases_may_lack:
            check_like(op, f"biases[{layer}]", bias, input, (features,))


def layer_seed(seed: Tensor | None, layer: int) -> Tensor | None:
    """Return the seed of one layer: the offset of a network's seed stands for the layer."""
    if seed is None or layer == 0:
        return seed
    # From its elements: a program cannot hold a new constant.
    return torch.stack([seed[0], seed[1] + layer])


def _differentiable(
    layers: Layers,
    tensors: Sequence[Tensor | None],
    saved: Tensor,
    mask: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Return the gradients, themselves differentiable."""
    count = len(layers.weights)
    # The call drew the seed and kept it at the end, and the statistics at the beginning.
    seed = saved[-16 // saved.itemsize :].view(torch.int64) if any(layers.dropout_p) else None
    channels = [layers.weights[layer].shape[0] for layer in layers.norms]
    dtype = reference.accumulate_dtype(saved.dtype)
    beginning = saved[: 2 * sum(channels) * dtype.itemsize // saved.itemsize].view(dtype)
    parts = beginning.split([2 * count for count in channels])
    statistics = [part.unflatten(0, (2, -1)) for part in parts]

    def formula(*tensors: Any) -> Tensor:
        hidden, weights, biases = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        affine, found = iter(tensors[1 + 2 * count :]), iter(statistics)
        for layer in range(count):
            options = (
                layers.activations[layer], layers.negative_slopes[layer], layers.dropout_p[layer],
                layer_seed(seed, layer),
            )  # fmt: skip
            norm = layers.norms.get(layer)
            if norm is None:
                hidden = reference.linear_act_formula(
                    hidden, weights[layer], biases[layer], *options
                )
            else:
                (mean, rstd), (training, _, eps) = next(found), norm[5:8]
                hidden = reference.batch_norm_act_formula(
                    F.linear(hidden, weights[layer], biases[layer]), mean, rstd.pow(-2) - eps,
                    next(affine), next(affine), training, eps, *options,
                )  # fmt: skip
        output: Tensor = hidden
        return output

    return differentiate_formula(formula, tensors, mask, grad_output)
