// batch_norm_act and batch_norm_leaky_relu on the CPU.

#include "cpu/ops.h"

namespace fused_mlp {
namespace {

BatchNormAct describe(const Tensor& input, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, bool training, double eps,
                      const ActDropout& act) {
  STD_TORCH_CHECK(input.is_cpu() && (input.dim() == 2 || input.dim() == 3),
                  "batch_norm_act: expected a 2D or 3D CPU input");
  BatchNormAct op = batch_norm_of(act);
  op.dtype = dtype_of(input);
  op.batches = input.size(0);
  op.channels = input.size(1);
  op.length = input.dim() == 3 ? input.size(2) : 1;
  op.weight = channels_of(weight, op.channels, "weight");
  op.bias = channels_of(bias, op.channels, "bias");
  op.training = training;
  op.eps = eps;
  return op;
}

// A pass of its own: rows of few channels are folded into longer ones, across which the mask's
// groups of 8 columns do not lie.
void drop(const Dropout& dropout, const Tensor& from, const Tensor& to) {
  if (!dropout.active()) return;
  const int64_t columns = from.size(from.dim() - 1);
  ActDropoutPass pass{};
  pass.dtype = dtype_of(from);
  pass.rows = columns > 0 ? from.numel() / columns : 0;
  pass.columns = columns;
  pass.act.dropout = dropout;
  pass.act.dropout.scaled = false;  // half precision would round twice
  pass.input = elements_of(from);
  pass.output = to.mutable_data_ptr();
  kernels().act_dropout(pass);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input,
                                           const std::optional<Tensor>& running_mean,
                                           const std::optional<Tensor>& running_var,
                                           const std::optional<Tensor>& num_batches_tracked,
                                           const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, bool training,
                                           double momentum, double eps, const ActDropout& act) {
  BatchNormAct op = describe(input, weight, bias, training, eps, act);
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "batch_norm_act: evaluation needs running_mean and running_var");
  op.running_mean = channels_of(running_mean, op.channels, "running_mean");
  op.running_var = channels_of(running_var, op.channels, "running_var");
  op.num_batches_tracked = training ? counter_of(num_batches_tracked) : nullptr;
  op.momentum = momentum;
  const Tensor source = as_contiguous(input);
  const Tensor output = new_empty_cpu(sizes_of(input), input.scalar_type());
  const Tensor mean = new_empty_cpu({op.channels}, accumulate_type(input));
  const Tensor rstd = new_empty_cpu({op.channels}, accumulate_type(input));
  op.input = elements_of(source);
  op.output = output.mutable_data_ptr();
  op.mean = mean.mutable_data_ptr();
  op.rstd = rstd.mutable_data_ptr();
  kernels().batch_norm_act(op);
  drop(act.dropout, output, output);
  return {output, mean, rstd};
}

std::vector<Tensor> backward(const Tensor& grad_output, const Tensor& input,
                             const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                             const Tensor& mean, const Tensor& rstd, bool training,
                             const ActDropout& act, const std::vector<bool>& output_mask) {
  BatchNormActBackward op{};
  op.forward = describe(input, weight, bias, training, 0, act);
  BatchNormAct& norm = op.forward;
  STD_TORCH_CHECK(output_mask.size() == 3,
                  "batch_norm_act_backward: output_mask must have 3 flags");
  STD_TORCH_CHECK(grad_output.is_cpu() && grad_output.numel() == input.numel() &&
                      grad_output.scalar_type() == input.scalar_type() &&
                      mean.numel() == norm.channels && rstd.numel() == norm.channels &&
                      mean.scalar_type() == accumulate_type(input) &&
                      rstd.scalar_type() == accumulate_type(input),
                  "batch_norm_act_backward: grad_output, mean or rstd do not fit input");
  const Tensor source = as_contiguous(input);
  Tensor grad = as_contiguous(grad_output);
  if (act.dropout.active()) {
    const Tensor whole = grad;
    grad = new_empty_cpu(sizes_of(input), input.scalar_type());
    drop(act.dropout, whole, grad);
  }
  const Tensor centre = as_contiguous(mean), reciprocal = as_contiguous(rstd);
  norm.input = elements_of(source);
  norm.mean = const_cast<void*>(elements_of(centre));
  norm.rstd = const_cast<void*>(elements_of(reciprocal));
  op.grad_output = elements_of(grad);
  std::vector<Tensor> gradients;
  if (output_mask[0]) {
    gradients.push_back(new_empty_cpu(sizes_of(input), input.scalar_type()));
    op.grad_input = gradients.back().mutable_data_ptr();
  }
  const auto vector_like = [&](const std::optional<Tensor>& parameter) -> ChannelVector {
    gradients.push_back(
        new_empty_cpu({norm.channels}, parameter ? parameter->scalar_type() : input.scalar_type()));
    return {gradients.back().mutable_data_ptr(), dtype_of(gradients.back())};
  };
  if (output_mask[1]) op.grad_weight = vector_like(weight);
  if (output_mask[2]) op.grad_bias = vector_like(bias);
  kernels().batch_norm_act_backward(op);
  return gradients;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& input, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool training, double momentum, double eps,
    int64_t activation, double negative_slope, double dropout_p,
    const std::optional<Tensor>& seed) {
  return forward(input, running_mean, running_var, num_batches_tracked, weight, bias, training,
                 momentum, eps,
                 {activation_of(activation, Activation::kLeakyReLU), negative_slope,
                  dropout_of(dropout_p, seed, 0)});
}

std::vector<Tensor> batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                            const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, const Tensor& mean,
                                            const Tensor& rstd, bool training, int64_t activation,
                                            double negative_slope, double dropout_p,
                                            const std::optional<Tensor>& seed,
                                            std::vector<bool> output_mask) {
  return backward(grad_output, input, weight, bias, mean, rstd, training,
                  {activation_of(activation, Activation::kLeakyReLU), negative_slope,
                   dropout_of(dropout_p, seed, 0)},
                  output_mask);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu(
    const Tensor& input, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool training, double momentum, double eps,
    double negative_slope) {
  return forward(input, running_mean, running_var, num_batches_tracked, weight, bias, training,
                 momentum, eps, {Activation::kLeakyReLU, negative_slope, {}});
}

std::vector<Tensor> batch_norm_leaky_relu_backward(const Tensor& grad_output, const Tensor& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias,
                                                   const Tensor& mean, const Tensor& rstd,
                                                   bool training, double negative_slope,
                                                   std::vector<bool> output_mask) {
  return backward(grad_output, input, weight, bias, mean, rstd, training,
                  {Activation::kLeakyReLU, negative_slope, {}}, output_mask);
}

}  // namespace fused_mlp
