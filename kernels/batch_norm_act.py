"""dropout(activation(batch_norm(input))), by the kernels of batch_norm_leaky_relu."""

from .activations import LEAKY_RELU, check
from .batch_norm_leaky_relu import backward, forward


def batch_norm_act(
    input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps,
    activation, negative_slope, dropout_p, seed,
):  # fmt: skip
    """Return (output, mean, rstd) and, in training, update the running statistics in place."""
    check("batch_norm_act", activation, LEAKY_RELU)
    return forward(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
        eps, activation, negative_slope, dropout_p, seed,
    )  # fmt: skip


def batch_norm_act_backward(
    grad_output, input, weight, bias, mean, rstd, training, activation, negative_slope, dropout_p,
    seed, output_mask,
):  # fmt: skip
    """Return the gradients of input, weight and bias that ``output_mask`` asks for."""
    check("batch_norm_act_backward", activation, LEAKY_RELU)
    return backward(
        grad_output, input, weight, bias, mean, rstd, training, activation, negative_slope,
        dropout_p, seed, output_mask,
    )  # fmt: skip
