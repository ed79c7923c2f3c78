// research_net for compiled graphs. They hand over all tensors at every call, 0.1 us each, and
// every list, flag and number more takes as long: so there are few of them here.

#include "cpu/network.h"
#include "cpu/ops.h"

namespace fused_mlp {
namespace {

// The network of `tensors`: weights…, biases…, and where there are more, the batch norm's weight
// and bias.
Network network_of(const std::vector<Tensor>& tensors, size_t layers, bool training) {
  const bool affine = tensors.size() == 2 * layers + 2;
  STD_TORCH_CHECK(affine || tensors.size() == 2 * layers, "fused_mlp: research_net: expected ",
                  layers, " weights, as many biases and the batch norm's two or none");
  Network network;
  const auto biases = tensors.begin() + static_cast<ptrdiff_t>(layers);
  network.weights.assign(tensors.begin(), biases);
  network.biases.assign(biases, biases + static_cast<ptrdiff_t>(layers));
  if (affine) {
    network.bn_weight = tensors[2 * layers];
    network.bn_bias = tensors[2 * layers + 1];
  }
  network.training = training;
  return network;
}

// The network in training; `options` are momentum, eps, slope and a dropout probability for each
// layer but two.
Network network_of(const std::vector<Tensor>& parameters, const std::vector<double>& options) {
  STD_TORCH_CHECK(options.size() >= 3, "fused_mlp: research_net: expected at least 3 options");
  Network network = network_of(parameters, options.size() - 1, true);
  network.momentum = options[0];
  network.eps = options[1];
  network.negative_slope = options[2];
  network.dropout_p.assign(options.begin() + 3, options.end());
  return network;
}

}  // namespace

std::tuple<Tensor, Tensor> research_net_compiled(const Tensor& input,
                                                 const std::vector<Tensor>& parameters,
                                                 const std::vector<Tensor>& buffers,
                                                 const std::vector<double>& options) {
  Network network = network_of(parameters, options);
  STD_TORCH_CHECK(buffers.size() == 3,
                  "fused_mlp: research_net: expected running mean and variance and the counter");
  network.running_mean = buffers[0];
  network.running_var = buffers[1];
  network.num_batches_tracked = buffers[2];
  return run_and_draw(network, input);
}

StableIValue research_net_compiled_backward(const Tensor& grad_output, const Tensor& input,
                                            const std::vector<Tensor>& parameters,
                                            const Tensor& saved, const std::vector<double>& options,
                                            int64_t output_mask) {
  const Network network = network_of(parameters, options);
  std::vector<bool> mask(2 * network.weights.size() + 3);
  for (size_t i = 0; i < mask.size() && i < 64; ++i) mask[i] = output_mask >> i & 1;
  return backward_of_drawn(network, grad_output, input, saved, mask);
}

Tensor research_net_compiled_evaluate(const Tensor& input, const std::vector<Tensor>& tensors,
                                      double eps, double negative_slope) {
  STD_TORCH_CHECK(tensors.size() >= 6, "fused_mlp: research_net: expected at least 6 tensors");
  size_t layers = 0;  // the weights have two dimensions
  while (layers < tensors.size() && tensors[layers].dim() == 2) ++layers;
  Network network = network_of({tensors.begin(), tensors.end() - 2}, layers, false);
  network.running_mean = tensors.end()[-2];
  network.running_var = tensors.end()[-1];
  network.eps = eps;
  network.negative_slope = negative_slope;
  network.dropout_p.assign(layers < 2 ? 0 : layers - 2, 0.0);
  return evaluate(network, input);
}

}  // namespace fused_mlp
