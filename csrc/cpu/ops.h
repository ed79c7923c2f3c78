// The ops of the CPU: their schemas stand in fused_mlp/ops/schemas.py.
#pragma once

#include <tuple>

#include "cpu/tensors.h"

namespace fused_mlp {

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input,
                                             std::optional<std::vector<int64_t>> dim,
                                             double correction, double eps);

// The output alone.
Tensor normalize_evaluate(const Tensor& input, std::optional<std::vector<int64_t>> dim,
                          double correction, double eps);

Tensor normalize_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                          const Tensor& std, std::optional<std::vector<int64_t>> dim,
                          double correction, double eps);

std::vector<Tensor> linear_act(const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias, int64_t activation,
                               double negative_slope, double dropout_p,
                               const std::optional<Tensor>& seed, bool keep_input);

std::vector<Tensor> linear_act_backward(const Tensor& grad_output, const Tensor& input,
                                        const Tensor& weight, const std::optional<Tensor>& kept,
                                        int64_t activation, double negative_slope, double dropout_p,
                                        const std::optional<Tensor>& seed,
                                        std::vector<bool> output_mask);

Tensor linear_batch_norm_act(const Tensor& input, const Tensor& weight,
                             const std::optional<Tensor>& bias, const Tensor& running_mean,
                             const Tensor& running_var, const std::optional<Tensor>& bn_weight,
                             const std::optional<Tensor>& bn_bias, double eps, int64_t activation,
                             double negative_slope, double dropout_p,
                             const std::optional<Tensor>& seed);

Tensor linear_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   double dropout_p, const std::optional<Tensor>& seed);

std::vector<Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& input,
                                         const Tensor& weight, const Tensor& output,
                                         double dropout_p, std::vector<bool> output_mask);

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& input, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool training, double momentum, double eps,
    int64_t activation, double negative_slope, double dropout_p, const std::optional<Tensor>& seed);

std::vector<Tensor> batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                            const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, const Tensor& mean,
                                            const Tensor& rstd, bool training, int64_t activation,
                                            double negative_slope, double dropout_p,
                                            const std::optional<Tensor>& seed,
                                            std::vector<bool> output_mask);

std::tuple<Tensor, Tensor, Tensor> batch_norm_leaky_relu(
    const Tensor& input, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, bool training, double momentum, double eps,
    double negative_slope);

std::vector<Tensor> batch_norm_leaky_relu_backward(const Tensor& grad_output, const Tensor& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias,
                                                   const Tensor& mean, const Tensor& rstd,
                                                   bool training, double negative_slope,
                                                   std::vector<bool> output_mask);

std::tuple<Tensor, Tensor> research_net(
    const Tensor& input, std::vector<Tensor> weights, std::vector<Tensor> biases,
    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, bool training, std::vector<double> dropout_p,
    const std::optional<Tensor>& seed, double momentum, double eps, double negative_slope);

StableIValue research_net_backward(const Tensor& grad_output, const Tensor& input,
                                   std::vector<Tensor> weights, std::vector<Tensor> biases,
                                   const std::optional<Tensor>& bn_weight,
                                   const std::optional<Tensor>& bn_bias, const Tensor& saved,
                                   bool training, std::vector<double> dropout_p,
                                   const std::optional<Tensor>& seed, double negative_slope,
                                   std::vector<bool> output_mask);

// A network handed over once (prepared.cpp).
Tensor research_net_prepare(std::vector<Tensor> weights, std::vector<Tensor> biases,
                            std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                            std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                            std::optional<Tensor> num_batches_tracked, bool training,
                            std::vector<double> dropout_p, double momentum, double eps,
                            double negative_slope);

std::tuple<Tensor, Tensor> research_net_prepared(const Tensor& input, const Tensor& prepared);

Tensor research_net_evaluate(const Tensor& input, const Tensor& prepared);

StableIValue research_net_prepared_backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& saved, const Tensor& prepared,
                                            std::optional<std::vector<bool>> output_mask);

// A chain of Linear layers with what stands behind them (mlp.cpp).
Tensor mlp_prepare(std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                   std::vector<int64_t> activations, std::vector<double> negative_slopes,
                   std::vector<double> dropout_p, std::vector<int64_t> normed_layers,
                   std::vector<std::optional<Tensor>> norm_tensors, std::vector<bool> norm_training,
                   std::vector<double> momentum, std::vector<double> eps);

std::tuple<Tensor, Tensor> mlp_prepared(const Tensor& input, const Tensor& mlp);

Tensor mlp_evaluate(const Tensor& input, const Tensor& mlp);

StableIValue mlp_prepared_backward(const Tensor& grad_output, const Tensor& input,
                                   const std::optional<Tensor>& output, const Tensor& saved,
                                   const Tensor& mlp, std::optional<std::vector<bool>> output_mask);

// A network as compiled graphs call it (compiled_research_net.cpp); the lists are emptied.
std::tuple<Tensor, Tensor> research_net_compiled(const Tensor& input,
                                                 std::vector<Tensor>& parameters,
                                                 std::vector<Tensor>& buffers,
                                                 const std::string& numbers);

StableIValue research_net_compiled_backward(const Tensor& grad_output, const Tensor& input,
                                            std::vector<Tensor>& weights, const Tensor& saved,
                                            int64_t output_mask);

Tensor research_net_compiled_evaluate(const Tensor& input, std::vector<Tensor>& tensors,
                                      const std::string& numbers);

// A chain as compiled graphs call it (compiled_mlp.cpp); the lists of tensors are emptied.
std::tuple<Tensor, Tensor> mlp_compiled(const Tensor& input, std::vector<Tensor>& parameters,
                                        std::vector<Tensor>& buffers, const std::string& layers);

StableIValue mlp_compiled_backward(const Tensor& grad_output, const Tensor& input,
                                   std::vector<Tensor>& weights,
                                   const std::optional<Tensor>& output, const Tensor& saved,
                                   int64_t output_mask);

Tensor mlp_compiled_evaluate(const Tensor& input, std::vector<Tensor>& tensors,
                             const std::string& layers);

// A training step of the network behind a handle of research_net_prepare or mlp_prepare, and the
// plan it runs: fused_mlp/training/plan.py makes and runs them.
Tensor train_step_plan(const Tensor& network, bool cross_entropy, bool mean,
                       const std::optional<Tensor>& class_weight, int64_t ignore_index,
                       double label_smoothing, bool adam, const Tensor& options,
                       std::vector<int64_t> places, std::vector<int64_t> groups,
                       std::vector<int64_t> state_counts, std::vector<Tensor> state,
                       std::vector<Tensor> kept_grads);

// The loss, or nothing where the plan or the arguments do not fit; nothing is written then.
std::optional<Tensor> train_step(const Tensor& plan, const Tensor& input, const Tensor& target,
                                 double momentum, std::optional<double> max_norm);

}  // namespace fused_mlp
