// research_net for a module that calls it again and again: its tensors and options are handed over
// once, which spares 5 us a call.

#include "cpu/handle.h"
#include "cpu/network.h"
#include "cpu/ops.h"

namespace fused_mlp {
namespace {

const Network& network_of(const Tensor& prepared) {
  return held_in<Network>(prepared, "research_net_prepare");
}

// All parameters that there are, and not the input.
std::vector<bool> mask_of_parameters(const Network& network) {
  std::vector<bool> mask(2 * network.weights.size() + 3, true);
  mask.front() = false;
  mask.end()[-2] = network.bn_weight.has_value();
  mask.back() = network.bn_bias.has_value();
  return mask;
}

}  // namespace

Tensor research_net_prepare(std::vector<Tensor> weights, std::vector<Tensor> biases,
                            std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                            std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                            std::optional<Tensor> num_batches_tracked, bool training,
                            std::vector<double> dropout_p, double momentum, double eps,
                            double negative_slope) {
  return hold(Network{std::move(weights), std::move(biases), std::move(bn_weight),
                      std::move(bn_bias), std::move(running_mean), std::move(running_var),
                      std::move(num_batches_tracked), training, std::move(dropout_p), momentum, eps,
                      negative_slope});
}

std::tuple<Tensor, Tensor> research_net_prepared(const Tensor& input, const Tensor& prepared) {
  return run_and_draw(network_of(prepared), input);
}

Tensor research_net_evaluate(const Tensor& input, const Tensor& prepared) {
  return evaluate(network_of(prepared), input);
}

StableIValue research_net_prepared_backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& saved, const Tensor& prepared,
                                            std::optional<std::vector<bool>> output_mask) {
  const Network& network = network_of(prepared);
  Call call = describe_backward(network, input);
  return backward_of_drawn(network, call, grad_output, saved, 0,
                           output_mask ? *output_mask : mask_of_parameters(network));
}

}  // namespace fused_mlp
