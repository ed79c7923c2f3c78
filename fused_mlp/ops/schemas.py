"""The operator schemas: the one place that says which ops exist and what they take.

Two namespaces. ``fused_mlp_kernels`` holds the raw forward and backward kernels, one
implementation a backend and device, without autograd. ``fused_mlp`` holds the public,
differentiable ops that choose between an autograd Function and the raw kernel. The schemas are
defined from Python so that every op exists without any compiled library.
"""

from __future__ import annotations

from torch.library import Library

KERNELS = "fused_mlp_kernels"
PUBLIC = "fused_mlp"

KERNEL_SCHEMAS = {
    "normalize": (
        "(Tensor input, int[]? dim, float correction, float eps)"
        " -> (Tensor output, Tensor mean, Tensor std)"
    ),
    "normalize_backward": (
        "(Tensor grad_output, Tensor input, Tensor mean, Tensor std, int[]? dim, float correction,"
        " float eps) -> Tensor"
    ),
    "linear_relu": (
        "(Tensor input, Tensor weight, Tensor? bias, float dropout_p, Tensor? seed) -> Tensor"
    ),
    "linear_relu_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor output, float dropout_p,"
        " bool[] output_mask) -> Tensor[]"
    ),
    # `activation` is a number of activations.py; with `keep_input` what the activation saw follows
    # the output. Backward takes as `kept` that, the output or nothing, as activations.kept says.
    "linear_act": (
        "(Tensor input, Tensor weight, Tensor? bias, int activation, float negative_slope,"
        " float dropout_p, Tensor? seed, bool keep_input) -> Tensor[]"
    ),
    "linear_act_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor? kept, int activation,"
        " float negative_slope, float dropout_p, Tensor? seed, bool[] output_mask) -> Tensor[]"
    ),
    "batch_norm_leaky_relu": (
        "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
        " Tensor(c!)? num_batches_tracked, Tensor? weight, Tensor? bias, bool training,"
        " float momentum, float eps, float negative_slope)"
        " -> (Tensor output, Tensor mean, Tensor rstd)"
    ),
    "batch_norm_leaky_relu_backward": (
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " bool training, float negative_slope, bool[] output_mask) -> Tensor[]"
    ),
    "batch_norm_act": (
        "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
        " Tensor(c!)? num_batches_tracked, Tensor? weight, Tensor? bias, bool training,"
        " float momentum, float eps, int activation, float negative_slope, float dropout_p,"
        " Tensor? seed) -> (Tensor output, Tensor mean, Tensor rstd)"
    ),
    "batch_norm_act_backward": (
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " bool training, int activation, float negative_slope, float dropout_p, Tensor? seed,"
        " bool[] output_mask) -> Tensor[]"
    ),
    "linear_batch_norm_act": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var,"
        " Tensor? bn_weight, Tensor? bn_bias, float eps, int activation, float negative_slope,"
        " float dropout_p, Tensor? seed) -> Tensor"
    ),
    "research_net": (
        "(Tensor input, Tensor[] weights, Tensor[] biases, Tensor? bn_weight, Tensor? bn_bias,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
        " bool training, float[] dropout_p, Tensor? seed, float momentum, float eps,"
        " float negative_slope) -> (Tensor output, Tensor saved)"
    ),
    "research_net_backward": (
        "(Tensor grad_output, Tensor input, Tensor[] weights, Tensor[] biases, Tensor? bn_weight,"
        " Tensor? bn_bias, Tensor saved, bool training, float[] dropout_p, Tensor? seed,"
        " float negative_slope, bool[] output_mask) -> Tensor[]"
    ),
}

# A network handed over once, for modules that call it again and again. The CPU library alone has
# these: elsewhere a kernel's launch costs more than its arguments.
PREPARED_SCHEMAS = {
    "research_net_prepare": (
        "(Tensor[] weights, Tensor[] biases, Tensor? bn_weight, Tensor? bn_bias,"
        " Tensor? running_mean, Tensor? running_var, Tensor? num_batches_tracked, bool training,"
        " float[] dropout_p, float momentum, float eps, float negative_slope) -> Tensor"
    ),
    # Draws the dropout's seed itself, and keeps it at the end of `saved`.
    "research_net_prepared": "(Tensor input, Tensor(a!) prepared) -> (Tensor output, Tensor saved)",
    "research_net_evaluate": "(Tensor input, Tensor prepared) -> Tensor",
    # Without a mask it gives the gradients of all parameters, and not the input's.
    "research_net_prepared_backward": (
        "(Tensor grad_output, Tensor input, Tensor saved, Tensor prepared, bool[]? output_mask)"
        " -> Tensor[]"
    ),
    # Any number of Linear layers, each with a batch norm, an activation and dropout behind it or
    # without. `norm_tensors` are weight, bias, running mean, running variance and batch counter of
    # the batch norm of each of `normed_layers`. The seed of all is drawn and kept as above; layer l
    # takes its offset plus l. `saved` begins with mean and rstd of every batch norm.
    "mlp_prepare": (
        "(Tensor[] weights, Tensor?[] biases, int[] activations, float[] negative_slopes,"
        " float[] dropout_p, int[] normed_layers, Tensor?[] norm_tensors, bool[] norm_training,"
        " float[] momentum, float[] eps) -> Tensor"
    ),
    "mlp_prepared": "(Tensor input, Tensor(a!) mlp) -> (Tensor output, Tensor saved)",
    "mlp_evaluate": "(Tensor input, Tensor mlp) -> Tensor",
    # `output` where the last activation's derivative comes from it. Without a mask all parameters'
    # gradients are given; a mask has flags of input, weights, biases, and weight and bias of every
    # batch norm.
    "mlp_prepared_backward": (
        "(Tensor grad_output, Tensor input, Tensor? output, Tensor saved, Tensor mlp,"
        " bool[]? output_mask) -> Tensor[]"
    ),
}

# What graphs of torch.compile hold of a network that the CPU library runs: few arguments, and the
# dropout's seed drawn inside, as by `research_net_prepared`. `parameters` are weights, biases and,
# if there are, the batch norm's weight and bias, all of one dtype; `buffers` running mean, running
# variance and the batch counter; `numbers` momentum, eps, slope and the dropout probabilities,
# separated by blanks. Of all this backward takes the weights alone: the rest stands in `saved`. A
# bit of `output_mask` is for the input, one for each weight, each bias, and the batch norm's weight
# and bias. In evaluation `tensors` are parameters, running mean and running variance, `numbers` eps
# and slope.
COMPILED_SCHEMAS = {
    "research_net_compiled": (
        "(Tensor input, Tensor[] parameters, Tensor(a!)[] buffers, str numbers)"
        " -> (Tensor output, Tensor saved)"
    ),
    "research_net_compiled_backward": (
        "(Tensor grad_output, Tensor input, Tensor[] weights, Tensor saved, int output_mask)"
        " -> Tensor[]"
    ),
    "research_net_compiled_evaluate": "(Tensor input, Tensor[] tensors, str numbers) -> Tensor",
    # The same for Linear layers in a row. `layers` is the number of the call in its graph, then of
    # each layer its own number (compiled_mlp.py) and the options that this says it has: the slope
    # of LeakyReLU, the dropout's probability, and momentum and eps of its batch norm. `parameters`
    # are weights, biases, and weight and bias of the batch norms, `buffers` their running mean and
    # variance and, where one trains, its batch counter; each as far as there are any. In evaluation
    # `tensors` are both. Backward takes `output` where the last activation's derivative comes from
    # it.
    "mlp_compiled": (
        "(Tensor input, Tensor[] parameters, Tensor(a!)[] buffers, str layers)"
        " -> (Tensor output, Tensor saved)"
    ),
    "mlp_compiled_backward": (
        "(Tensor grad_output, Tensor input, Tensor[] weights, Tensor? output, Tensor saved,"
        " int output_mask) -> Tensor[]"
    ),
    "mlp_compiled_evaluate": "(Tensor input, Tensor[] tensors, str layers) -> Tensor",
}

# Forward without what backward wants to know: two small tensors fewer are a microsecond, a third of
# a call with 1000 elements. The CPU library alone has it.
EVALUATION_SCHEMAS = {
    "normalize_evaluate": "(Tensor input, int[]? dim, float correction, float eps) -> Tensor",
}

# Sums over the processes of a group that the name stands for: what a compiled graph can hold.
GROUP_SCHEMAS = {
    "sum_over_group": "(Tensor tensor, str group_name) -> Tensor",
}

PUBLIC_SCHEMAS = {
    "normalize": (
        "(Tensor input, int[]? dim=None, *, float correction=1., float eps=0.) -> Tensor"
    ),
    "linear_relu": (
        "(Tensor input, Tensor weight, Tensor? bias=None, float dropout_p=0.,"
        " Tensor? seed=None) -> Tensor"
    ),
    "linear_act": (
        "(Tensor input, Tensor weight, Tensor? bias=None, str activation='relu', *,"
        " float negative_slope=0.01, str approximate='none', float dropout_p=0.,"
        " Tensor? seed=None) -> Tensor"
    ),
    "batch_norm_leaky_relu": (
        "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None,"
        " Tensor? bias=None, bool training=False, float momentum=0.1, float eps=1e-05,"
        " float negative_slope=0.01, *, Tensor(c!)? num_batches_tracked=None) -> Tensor"
    ),
    "batch_norm_act": (
        "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None,"
        " Tensor? bias=None, bool training=False, float momentum=0.1, float eps=1e-05,"
        " str activation='none', *, float negative_slope=0.01, float dropout_p=0.,"
        " Tensor? seed=None, Tensor(c!)? num_batches_tracked=None) -> Tensor"
    ),
    "linear_batch_norm_act": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var,"
        " Tensor? bn_weight=None, Tensor? bn_bias=None, float eps=1e-05, str activation='none', *,"
        " float negative_slope=0.01, float dropout_p=0., Tensor? seed=None) -> Tensor"
    ),
    "research_net": (
        "(Tensor input, Tensor[] weights, Tensor[] biases, Tensor? bn_weight, Tensor? bn_bias,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float[] dropout_p,"
        " Tensor? seed=None, float momentum=0.1, float eps=1e-05, float negative_slope=0.01,"
        " *, Tensor(c!)? num_batches_tracked=None, str? compiled_for=None) -> Tensor"
    ),
    # Linear layers in a row, for tracers: activations by number; of the batch norms behind
    # `normed_layers` weight and bias, then running mean, running variance and batch counter.
    "mlp": (
        "(Tensor input, Tensor[] weights, Tensor?[] biases, int[] activations,"
        " float[] negative_slopes, float[] dropout_p, int[] normed_layers,"
        " Tensor?[] norm_parameters, Tensor(a!)?[] norm_buffers, bool[] norm_training,"
        " float[] momentum, float[] eps, *, str? compiled_for=None) -> Tensor"
    ),
}

# Raw kernels of the CPU alone: a training step, and the plan it runs. The plan is a handle: it
# holds the tensors, which the step reads and writes without naming them, so no tracer may see
# these ops.
TRAINING_SCHEMAS = {
    # `network` is what research_net_prepare or mlp_prepare returned.
    "train_step_plan": (
        "(Tensor network, bool cross_entropy, bool mean, Tensor? class_weight, int ignore_index,"
        " float label_smoothing, bool adam, Tensor options, int[] places, int[] groups,"
        " int[] state_counts, Tensor[] state, Tensor[] kept_grads) -> Tensor"
    ),
    "train_step": (
        "(Tensor plan, Tensor input, Tensor target, float momentum, float? max_norm) -> Tensor?"
    ),
}

# The ops over a group of processes, by its name. For compiled graphs, which cannot hold a group.
PUBLIC_GROUP_SCHEMAS = {
    "normalize_over_group": (
        "(Tensor input, int[]? dim, float correction, float eps, str group_name) -> Tensor"
    ),
    "batch_norm_leaky_relu_over_group": (
        "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight,"
        " Tensor? bias, float momentum, float eps, float negative_slope, str group_name,"
        " *, Tensor(c!)? num_batches_tracked=None) -> Tensor"
    ),
}

# Library objects deregister what they registered when they are collected: keep them for good.
kernels_library = Library(KERNELS, "DEF")
public_library = Library(PUBLIC, "DEF")

for _name, _schema in (
    KERNEL_SCHEMAS
    | PREPARED_SCHEMAS
    | COMPILED_SCHEMAS
    | EVALUATION_SCHEMAS
    | TRAINING_SCHEMAS
    | GROUP_SCHEMAS
).items():
    kernels_library.define(_name + _schema)
for _name, _schema in (PUBLIC_SCHEMAS | PUBLIC_GROUP_SCHEMAS).items():
    public_library.define(_name + _schema)
