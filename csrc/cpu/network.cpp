#include "cpu/network.h"

#include <algorithm>

namespace fused_mlp {
namespace {

Call describe(const Network& network, const Tensor& input) {
  const std::vector<Tensor>& biases = network.biases;
  STD_TORCH_CHECK(biases.size() == network.weights.size(),
                  "fused_mlp: research_net: expected as many biases as weights");
  Call call = describe_weights(network, input);
  ResearchNet& net = call.net;
  for (size_t l = 0; l < biases.size(); ++l) {
    STD_TORCH_CHECK(biases[l].is_cpu() && biases[l].numel() == net.widths[l + 1] &&
                        dtype_of(biases[l]) == net.dtype,
                    "fused_mlp: research_net: biases[", l, "] does not fit its weight");
    net.biases[l] = call.contiguous_data(biases[l]);
  }
  const int64_t channels = net.widths[net.layers - 1];
  if (network.bn_weight) net.bn_weight = channels_of(network.bn_weight, channels, "bn_weight");
  if (network.bn_bias) net.bn_bias = channels_of(network.bn_bias, channels, "bn_bias");
  return call;
}

// The elements of `saved`, with room for a seed that begins at a multiple of 8 bytes.
int64_t saved_numel(const Network& network, Call& call) {
  if (!network.drops()) return kernels().research_net_saved_numel(call.net);
  const int64_t any_seed[2] = {};  // what is dropped takes room
  set_seed(network, any_seed, call);
  const int64_t numel = kernels().research_net_saved_numel(call.net);
  set_seed(network, nullptr, call);
  return with_seed(numel, call.accumulate);
}

// The elements of `saved` where `more` stand at its end, which is at a multiple of 8 bytes then.
int64_t with_more(int64_t numel, int64_t more) {
  return more == 0 ? numel : (numel + more + 1) / 2 * 2;
}

}  // namespace

bool Network::drops() const {
  return std::any_of(dropout_p.begin(), dropout_p.end(), [](double p) { return p > 0; });
}

Call describe_weights(const Network& network, const Tensor& input) {
  Call call;
  ResearchNet& net = call.net;
  const std::vector<Tensor>& weights = network.weights;
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers >= 2 && layers <= kMaxLayers && network.dropout_p.size() == layers - 2,
                  "fused_mlp: research_net: expected 2 to ", kMaxLayers,
                  " weights and 2 fewer dropout probabilities");
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 2,
                  "fused_mlp: research_net: expected a 2D CPU input");
  call.dtype = input.scalar_type();
  call.accumulate = accumulate_type(input);
  net.dtype = dtype_of(input);
  net.rows = input.size(0);
  net.layers = static_cast<int>(layers);
  net.widths[0] = input.size(1);
  const bool rows_contiguous =
      (input.size(1) <= 1 || input.stride(1) == 1) && input.stride(0) >= input.size(1);
  net.input = rows_contiguous ? elements_of(input) : call.contiguous_data(input);
  net.input_stride = rows_contiguous ? input.stride(0) : input.size(1);
  for (size_t l = 0; l < layers; ++l) {
    const Tensor& weight = weights[l];
    STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == net.widths[l] &&
                        dtype_of(weight) == net.dtype,
                    "fused_mlp: research_net: weights[", l, "] does not fit what comes before it");
    net.widths[l + 1] = weight.size(0);
    net.weights[l] = call.contiguous_data(weight);
  }
  for (double p : network.dropout_p) {
    STD_TORCH_CHECK(p >= 0 && p <= 1,
                    "fused_mlp: research_net: dropout_p must be between 0 and 1, but got ", p);
  }
  net.bn_weight.dtype = net.bn_bias.dtype = net.dtype;  // of their gradients, where there are none
  net.training = network.training;
  net.momentum = network.momentum;
  net.eps = network.eps;
  net.negative_slope = network.negative_slope;
  return call;
}

Call describe_forward(const Network& network, const Tensor& input) {
  Call call = describe(network, input);
  ResearchNet& net = call.net;
  const int64_t channels = net.widths[net.layers - 1];
  STD_TORCH_CHECK(net.training || (network.running_mean && network.running_var),
                  "fused_mlp: research_net: evaluation needs running_mean and running_var");
  net.running_mean = channels_of(network.running_mean, channels, "running_mean");
  net.running_var = channels_of(network.running_var, channels, "running_var");
  net.num_batches_tracked = net.training ? counter_of(network.num_batches_tracked) : nullptr;
  return call;
}

Call describe_backward(const Network& network, const Tensor& input) {
  return describe(network, input);
}

void set_seed(const Network& network, const int64_t* seed, Call& call) {
  for (size_t l = 0; l < network.dropout_p.size(); ++l) {
    call.net.dropout[l] = {network.dropout_p[l], seed, static_cast<uint32_t>(l)};
  }
}

Tensor new_output(Call& call) {
  Tensor output = new_empty_cpu({call.net.rows, call.net.widths[call.net.layers]}, call.dtype);
  call.net.output = output.mutable_data_ptr();
  return output;
}

StableIValue backward(const Network& network, Call& call, const Tensor& grad_output,
                      const Tensor& saved, int64_t saved_numel,
                      const std::vector<bool>& output_mask) {
  ResearchNetBackward op{};
  const ResearchNet& net = call.net;
  const size_t layers = network.weights.size();
  const int64_t channels = net.widths[net.layers - 1];
  STD_TORCH_CHECK(output_mask.size() == 2 * layers + 3,
                  "fused_mlp: research_net_backward: output_mask must have ", 2 * layers + 3,
                  " flags");
  STD_TORCH_CHECK(grad_output.is_cpu() && grad_output.dim() == 2 &&
                      grad_output.size(0) == net.rows &&
                      grad_output.size(1) == net.widths[net.layers] &&
                      grad_output.scalar_type() == call.dtype && saved.is_cpu() &&
                      saved.scalar_type() == call.accumulate && saved.is_contiguous() &&
                      saved.numel() == saved_numel,
                  "fused_mlp: research_net_backward: grad_output or saved do not fit input");
  op.grad_output = call.contiguous_data(grad_output);
  op.forward = net;
  op.forward.saved = const_cast<void*>(elements_of(saved));
  NewTensors gradients(output_mask.size());
  const auto wanted = [&](size_t i, IntHeaderOnlyArrayRef sizes, ScalarType dtype) -> void* {
    return output_mask[i] ? gradients.add(sizes, dtype) : nullptr;
  };
  op.grad_input = wanted(0, {net.rows, net.widths[0]}, call.dtype);
  for (size_t l = 0; l < layers; ++l) {
    op.grad_weights[l] = wanted(1 + l, {net.widths[l + 1], net.widths[l]}, call.dtype);
  }
  for (size_t l = 0; l < layers; ++l) {
    op.grad_biases[l] = wanted(1 + layers + l, {net.widths[l + 1]}, call.dtype);
  }
  const auto vector_like = [&](size_t i, const ChannelVector& parameter) -> ChannelVector {
    return {wanted(i, {channels}, scalar_type_of(parameter.dtype)), parameter.dtype};
  };
  op.grad_bn_weight = vector_like(1 + 2 * layers, net.bn_weight);
  op.grad_bn_bias = vector_like(2 + 2 * layers, net.bn_bias);
  kernels().research_net_backward(op);
  return gradients.release();
}

std::tuple<Tensor, Tensor> run_and_draw(const Network& network, const Tensor& input, int64_t more) {
  Call call = describe_forward(network, input);
  ResearchNet& net = call.net;
  STD_TORCH_CHECK(!net.training || net.rows > 1,
                  "fused_mlp: research_net: training needs more than one row");
  const Tensor output = new_output(call);
  const int64_t numel = saved_numel(network, call);
  const Tensor saved = new_empty_cpu({with_more(numel, more)}, call.accumulate);
  net.saved = saved.mutable_data_ptr();
  clear_behind(saved, numel);
  if (network.drops()) {
    draw_seed(seed_in(saved, numel));
    set_seed(network, seed_in(saved, numel), call);
  }
  kernels().research_net(net);
  return {output, saved};
}

Tensor evaluate(const Network& network, const Tensor& input) {
  STD_TORCH_CHECK(!network.training && !network.drops(),
                  "fused_mlp: research_net: expected a network in evaluation");
  Call call = describe_forward(network, input);
  const Tensor output = new_output(call);
  kernels().research_net(call.net);
  return output;
}

StableIValue backward_of_drawn(const Network& network, Call& call, const Tensor& grad_output,
                               const Tensor& saved, int64_t more,
                               const std::vector<bool>& output_mask) {
  const int64_t numel = saved_numel(network, call), total = with_more(numel, more);
  if (network.drops() && saved.numel() == total) set_seed(network, seed_in(saved, numel), call);
  return backward(network, call, grad_output, saved, total, output_mask);
}

}  // namespace fused_mlp
