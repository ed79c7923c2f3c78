// The ops of this library, as the dispatcher calls them. See fused_mlp/ops/schemas.py for what
// they mean. Host pass only.
#pragma once

#include <tuple>

#include "tensor.h"

namespace fused_mlp::cuda {

using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& x,
                                             std::optional<std::vector<int64_t>> dim,
                                             double correction, double eps);
Tensor normalize_backward(const Tensor& grad_output, const Tensor& x, const Tensor& mean,
                          const Tensor& std, std::optional<std::vector<int64_t>> dim,
                          double correction, double eps);

Tensors linear_act(const Tensor& input, const Tensor& weight, OptionalTensor bias,
                   int64_t activation, double negative_slope, double dropout_p, OptionalTensor seed,
                   bool keep_input);
Tensors linear_act_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                            OptionalTensor kept, int64_t activation, double negative_slope,
                            double dropout_p, OptionalTensor seed, std::vector<bool> output_mask);
Tensor linear_batch_norm_act(const Tensor& input, const Tensor& weight, OptionalTensor bias,
                             const Tensor& running_mean, const Tensor& running_var,
                             OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                             int64_t activation, double negative_slope, double dropout_p,
                             OptionalTensor seed);
Tensor linear_relu(const Tensor& input, const Tensor& weight, OptionalTensor bias, double dropout_p,
                   OptionalTensor seed);
Tensors linear_relu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             const Tensor& output, double dropout_p, std::vector<bool> output_mask);

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& input, OptionalTensor running_mean,
                                                  OptionalTensor running_var,
                                                  OptionalTensor num_batches_tracked,
                                                  OptionalTensor weight, OptionalTensor bias,
                                                  bool training, double momentum, double eps,
                                                  int64_t activation, double negative_slope,
                                                  double dropout_p, OptionalTensor seed);
Tensors batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                OptionalTensor weight, OptionalTensor bias, const Tensor& mean,
                                const Tensor& rstd, bool training, int64_t activation,
                                double negative_slope, double dropout_p, OptionalTensor seed,
                                std::vector<bool> output_mask);
std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu(
    const Tensor& input, OptionalTensor running_mean, OptionalTensor running_var,
    OptionalTensor num_batches_tracked, OptionalTensor weight, OptionalTensor bias, bool training,
    double momentum, double eps, double negative_slope);
Tensors batch_norm_leaky_relu_backward(const Tensor& grad_output, const Tensor& input,
                                       OptionalTensor weight, OptionalTensor bias,
                                       const Tensor& mean, const Tensor& rstd, bool training,
                                       double negative_slope, std::vector<bool> output_mask);

std::tuple<Tensor, Tensor> research_net(const Tensor& input, Tensors weights, Tensors biases,
                                        OptionalTensor bn_weight, OptionalTensor bn_bias,
                                        OptionalTensor running_mean, OptionalTensor running_var,
                                        OptionalTensor num_batches_tracked, bool training,
                                        std::vector<double> dropout_p, OptionalTensor seed,
                                        double momentum, double eps, double negative_slope);
Tensors research_net_backward(const Tensor& grad_output, const Tensor& input, Tensors weights,
                              Tensors biases, OptionalTensor bn_weight, OptionalTensor bn_bias,
                              const Tensor& saved, bool training, std::vector<double> dropout_p,
                              OptionalTensor seed, double negative_slope,
                              std::vector<bool> output_mask);

// Plans and launches what `standardization` prepared, with a workspace where it is needed.
inline void run_forward(Standardization& s, const Context& context) {
  const DType dtype = dtype_of(s.x);
  const StandardizePlan plan = plan_standardize(dtype, s.columns, s.parameters, context.device());
  const Tensor scratch = workspace(plan.workspace_bytes, s.x);
  s.parameters.partials = scratch.data_ptr();
  standardize_forward(dtype, s.columns, plan, s.parameters, context.stream());
}

inline void run_backward(Standardization& s, const Context& context) {
  const DType dtype = dtype_of(s.x);
  const StandardizePlan plan = plan_standardize(dtype, s.columns, s.parameters, context.device());
  const Tensor scratch = workspace(plan.workspace_bytes, s.x);
  s.parameters.partials = scratch.data_ptr();
  standardize_backward(dtype, s.columns, plan, s.parameters, context.stream());
}

}  // namespace fused_mlp::cuda
