"""dropout(activation(input @ weight.T + bias)), by the kernels of linear_relu."""

from .activations import check
from .linear_relu import backward, forward


def linear_act(input, weight, bias, activation, negative_slope, dropout_p, seed, keep_input):
    """Return [output], and what the activation saw with ``keep_input``."""
    check("linear_act", activation)
    return forward(input, weight, bias, activation, negative_slope, dropout_p, seed, keep_input)


def linear_act_backward(
    grad_output, input, weight, kept, activation, negative_slope, dropout_p, seed, output_mask
):
    """Return the gradients of input, weight and bias that ``output_mask`` asks for."""
    check("linear_act_backward", activation)
    p = 0.0 if seed is None else dropout_p
    return backward(
        grad_output, input, weight, kept, activation, negative_slope, p, seed, output_mask
    )
