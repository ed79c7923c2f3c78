// research_net on the CPU. fused_mlp/backends.py says which widths come here (`fits`) and how many
// elements `saved` has (`saved_numel`); the kernels lay them out (kernels/network.h).

#include "cpu/ops.h"

namespace fused_mlp {
namespace {

// One call: the struct the kernels read, and the contiguous copies it may point into.
struct Call {
  ResearchNet net{};
  Tensor input;
  std::vector<Tensor> weights, biases;
};

Call describe(const Tensor& input, const std::vector<Tensor>& weights,
              const std::vector<Tensor>& biases, const std::optional<Tensor>& bn_weight,
              const std::optional<Tensor>& bn_bias, bool training,
              const std::vector<double>& dropout_p, const std::optional<Tensor>& seed,
              double negative_slope) {
  Call call;
  ResearchNet& net = call.net;
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers >= 2 && layers <= kMaxLayers && biases.size() == layers &&
                      dropout_p.size() == layers - 2,
                  "research_net: expected 2 to ", kMaxLayers,
                  " weights, as many biases and 2 fewer dropout probabilities");
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 2, "research_net: expected a 2D CPU input");
  net.dtype = dtype_of(input);
  net.rows = input.size(0);
  net.layers = static_cast<int>(layers);
  net.widths[0] = input.size(1);
  const bool rows_contiguous =
      (input.size(1) <= 1 || input.stride(1) == 1) && input.stride(0) >= input.size(1);
  call.input = rows_contiguous ? input : as_contiguous(input);
  net.input = call.input.const_data_ptr();
  net.input_stride = rows_contiguous ? input.stride(0) : input.size(1);
  for (size_t l = 0; l < layers; ++l) {
    STD_TORCH_CHECK(
        weights[l].is_cpu() && biases[l].is_cpu() && weights[l].dim() == 2 &&
            weights[l].size(1) == net.widths[l] && biases[l].numel() == weights[l].size(0) &&
            weights[l].scalar_type() == input.scalar_type() &&
            biases[l].scalar_type() == input.scalar_type(),
        "research_net: weights[", l, "] or biases[", l, "] do not fit what comes before them");
    net.widths[l + 1] = weights[l].size(0);
    call.weights.push_back(as_contiguous(weights[l]));
    call.biases.push_back(as_contiguous(biases[l]));
    net.weights[l] = call.weights[l].const_data_ptr();
    net.biases[l] = call.biases[l].const_data_ptr();
    if (l < dropout_p.size()) {
      net.dropout[l] = dropout_of(dropout_p[l], seed, static_cast<uint32_t>(l));
    }
  }
  const int64_t channels = net.widths[layers - 1];
  net.bn_weight = channels_of(bn_weight, channels, "bn_weight");
  net.bn_bias = channels_of(bn_bias, channels, "bn_bias");
  net.training = training;
  net.negative_slope = negative_slope;
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> research_net(
    const Tensor& input, std::vector<Tensor> weights, std::vector<Tensor> biases,
    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, bool training, std::vector<double> dropout_p,
    const std::optional<Tensor>& seed, double momentum, double eps, double negative_slope) {
  Call call = describe(input, weights, biases, bn_weight, bn_bias, training, dropout_p, seed,
                       negative_slope);
  ResearchNet& net = call.net;
  const int64_t channels = net.widths[net.layers - 1];
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "research_net: evaluation needs running_mean and running_var");
  net.running_mean = channels_of(running_mean, channels, "running_mean");
  net.running_var = channels_of(running_var, channels, "running_var");
  net.num_batches_tracked = training ? counter_of(num_batches_tracked) : nullptr;
  net.momentum = momentum;
  net.eps = eps;
  const Tensor output = new_empty_cpu({net.rows, net.widths[net.layers]}, input.scalar_type());
  const Tensor saved =
      new_empty_cpu({kernels().research_net_saved_numel(net)}, accumulate_type(input));
  net.output = output.mutable_data_ptr();
  net.saved = saved.mutable_data_ptr();
  kernels().research_net(net);
  return {output, saved};
}

std::vector<Tensor> research_net_backward(const Tensor& grad_output, const Tensor& input,
                                          std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          const std::optional<Tensor>& bn_weight,
                                          const std::optional<Tensor>& bn_bias, const Tensor& saved,
                                          bool training, std::vector<double> dropout_p,
                                          const std::optional<Tensor>& seed, double negative_slope,
                                          std::vector<bool> output_mask) {
  Call call = describe(input, weights, biases, bn_weight, bn_bias, training, dropout_p, seed,
                       negative_slope);
  ResearchNetBackward op{};
  op.forward = call.net;
  const ResearchNet& net = call.net;
  const int64_t channels = net.widths[net.layers - 1];
  STD_TORCH_CHECK(output_mask.size() == 2 * weights.size() + 3,
                  "research_net_backward: output_mask must have ", 2 * weights.size() + 3,
                  " flags");
  STD_TORCH_CHECK(grad_output.is_cpu() && grad_output.dim() == 2 &&
                      grad_output.size(0) == net.rows &&
                      grad_output.size(1) == net.widths[net.layers] &&
                      grad_output.scalar_type() == input.scalar_type() && saved.is_cpu() &&
                      saved.scalar_type() == accumulate_type(input) && saved.is_contiguous() &&
                      saved.numel() == kernels().research_net_saved_numel(net),
                  "research_net_backward: grad_output or saved do not fit input");
  const Tensor grad = as_contiguous(grad_output);
  op.grad_output = grad.const_data_ptr();
  op.forward.saved = const_cast<void*>(saved.const_data_ptr());
  std::vector<Tensor> gradients;
  const auto wanted = [&](size_t i, const std::vector<int64_t>& sizes, ScalarType dtype) -> void* {
    if (!output_mask[i]) return nullptr;
    gradients.push_back(new_empty_cpu(sizes, dtype));
    return gradients.back().mutable_data_ptr();
  };
  const size_t layers = weights.size();
  op.grad_input = wanted(0, sizes_of(input), input.scalar_type());
  for (size_t l = 0; l < layers; ++l) {
    op.grad_weights[l] = wanted(1 + l, {net.widths[l + 1], net.widths[l]}, input.scalar_type());
  }
  for (size_t l = 0; l < layers; ++l) {
    op.grad_biases[l] = wanted(1 + layers + l, {net.widths[l + 1]}, input.scalar_type());
  }
  const auto vector_like = [&](size_t i, const std::optional<Tensor>& parameter) -> ChannelVector {
    void* data = wanted(i, {channels}, parameter ? parameter->scalar_type() : input.scalar_type());
    return {data, data ? dtype_of(gradients.back()) : net.dtype};
  };
  op.grad_bn_weight = vector_like(1 + 2 * layers, bn_weight);
  op.grad_bn_bias = vector_like(2 + 2 * layers, bn_bias);
  kernels().research_net_backward(op);
  return gradients;
}

}  // namespace fused_mlp
