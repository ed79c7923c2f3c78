// batch_norm_act: BatchNorm1d over (N, C) or (N, C, L), then ReLU, LeakyReLU or neither, then
// dropout; and batch_norm_leaky_relu, which is that of LeakyReLU.
#if !defined(__CUDA_ARCH__)
#include <limits>

#include "common/philox.h"
#include "ops.h"

namespace fused_mlp::cuda {
namespace {

// A group is a channel, dimension 1; all other dimensions are reduced.
std::vector<bool> all_but_channels(const Tensor& x) {
  std::vector<bool> reduced(x.dim(), true);
  reduced[1] = false;
  return reduced;
}

// What stands behind the batch norm. Without a seed nothing is dropped.
struct Ending {
  Activation activation;
  double negative_slope;
  double probability = 0;
  OptionalTensor seed = std::nullopt;

  Ending(Activation which, double slope) : activation(which), negative_slope(slope) {}
  Ending(int64_t number, double slope, double dropout_p, const OptionalTensor& with)
      : Ending(activation_of(number, Activation::kLeakyReLU), slope) {
    if (!with || dropout_p == 0) return;
    probability = dropout_p;
    seed = as_contiguous(*with);
  }

  void describe(const Tensor& x, StandardizeParameters& p) const {
    p.slope = activation == Activation::kNone ? 1 : negative_slope;
    if (activation == Activation::kReLU) p.flags |= kRectifies;
    p.dropout_scale = 1;
    if (!seed) return;
    p.seed = static_cast<const int64_t*>(seed->data_ptr());
    p.threshold = philox::threshold(probability);
    p.dropout_scale = probability < 1 ? 1 / (1 - probability) : 0;
    p.mask_length = x.dim() == 3 ? x.size(2) : 0;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var,
                                           const OptionalTensor& num_batches_tracked,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           bool training, double momentum, double eps,
                                           const Ending& ending) {
  const Context context(x);
  const ScalarType type = accumulator_type(dtype_of(x));
  Tensor mean = new_tensor({x.size(1)}, type, x), rstd = new_tensor({x.size(1)}, type, x);
  if (x.numel() == 0) {
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(rstd, std::numeric_limits<double>::quiet_NaN());
    return {torch::stable::empty_like(x), mean, rstd};
  }
  Running means(running_mean), vars(running_var);
  const OptionalTensor weights = contiguous_parameter(weight), biases = contiguous_parameter(bias);
  Standardization s =
      standardization(x, std::nullopt, all_but_channels(x), ending.seed.has_value());
  StandardizeParameters& p = s.parameters;
  p.mean = mean.data_ptr();
  p.deviation = rstd.data_ptr();
  p.weight = data(weights);
  p.bias = data(biases);
  p.running_mean = mutable_data(means.dense);
  p.running_var = mutable_data(vars.dense);
  p.batches_tracked = training ? static_cast<int64_t*>(mutable_data(num_batches_tracked)) : nullptr;
  p.flags = (training ? 0 : kGivenStatistics) | wide_flag(weight, x, kWideWeight) |
            wide_flag(bias, x, kWideBias) | wide_flag(running_mean, x, kWideRunningMean) |
            wide_flag(running_var, x, kWideRunningVar);
  p.momentum = momentum;
  p.eps = eps;
  ending.describe(x, p);
  run_forward(s, context);
  if (training) {
    means.write_back();
    vars.write_back();
  }
  return {s.result(), mean, rstd};
}

Tensors backward(const Tensor& grad_output, const Tensor& x, const OptionalTensor& weight,
                 const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, bool training,
                 const Ending& ending, const std::vector<bool>& output_mask) {
  const Context context(x);
  const OptionalTensor weights = contiguous_parameter(weight), biases = contiguous_parameter(bias);
  const Tensor means = as_contiguous(mean), rstds = as_contiguous(rstd);
  OptionalTensor grad_weight, grad_bias;
  if (output_mask[1]) grad_weight = torch::stable::empty_like(*weights);
  if (output_mask[2]) grad_bias = torch::stable::empty_like(*biases);
  Tensors results;
  if (x.numel() == 0) {
    if (output_mask[0]) results.push_back(torch::stable::empty_like(x));
    if (grad_weight) results.push_back(torch::stable::zero_(*grad_weight));
    if (grad_bias) results.push_back(torch::stable::zero_(*grad_bias));
    return results;
  }
  Standardization s = standardization(x, grad_output, all_but_channels(x), ending.seed.has_value());
  StandardizeParameters& p = s.parameters;
  if (!output_mask[0]) p.y = nullptr;
  p.mean = means.data_ptr();
  p.deviation = rstds.data_ptr();
  p.weight = data(weights);
  p.bias = data(biases);
  p.grad_weight = mutable_data(grad_weight);
  p.grad_bias = mutable_data(grad_bias);
  p.flags = (training ? 0 : kGivenStatistics) | wide_flag(weight, x, kWideWeight) |
            wide_flag(bias, x, kWideBias);
  ending.describe(x, p);
  run_backward(s, context);
  if (output_mask[0]) results.push_back(s.result());
  if (grad_weight) results.push_back(*grad_weight);
  if (grad_bias) results.push_back(*grad_bias);
  return results;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x, OptionalTensor running_mean,
                                                  OptionalTensor running_var,
                                                  OptionalTensor num_batches_tracked,
                                                  OptionalTensor weight, OptionalTensor bias,
                                                  bool training, double momentum, double eps,
                                                  int64_t activation, double negative_slope,
                                                  double dropout_p, OptionalTensor seed) {
  return forward(x, running_mean, running_var, num_batches_tracked, weight, bias, training,
                 momentum, eps, {activation, negative_slope, dropout_p, seed});
}

Tensors batch_norm_act_backward(const Tensor& grad_output, const Tensor& x, OptionalTensor weight,
                                OptionalTensor bias, const Tensor& mean, const Tensor& rstd,
                                bool training, int64_t activation, double negative_slope,
                                double dropout_p, OptionalTensor seed,
                                std::vector<bool> output_mask) {
  return backward(grad_output, x, weight, bias, mean, rstd, training,
                  {activation, negative_slope, dropout_p, seed}, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu(
    const Tensor& x, OptionalTensor running_mean, OptionalTensor running_var,
    OptionalTensor num_batches_tracked, OptionalTensor weight, OptionalTensor bias, bool training,
    double momentum, double eps, double negative_slope) {
  return forward(x, running_mean, running_var, num_batches_tracked, weight, bias, training,
                 momentum, eps, {Activation::kLeakyReLU, negative_slope});
}

Tensors batch_norm_leaky_relu_backward(const Tensor& grad_output, const Tensor& x,
                                       OptionalTensor weight, OptionalTensor bias,
                                       const Tensor& mean, const Tensor& rstd, bool training,
                                       double negative_slope, std::vector<bool> output_mask) {
  return backward(grad_output, x, weight, bias, mean, rstd, training,
                  {Activation::kLeakyReLU, negative_slope}, output_mask);
}

}  // namespace fused_mlp::cuda
#endif
