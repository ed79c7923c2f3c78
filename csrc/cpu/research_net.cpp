// research_net on the CPU. fused_mlp/on_chip.py says which widths come here (`fits`) and how many
// elements `saved` has (`saved_numel`); the kernels lay them out (kernels/network.h).

#include "cpu/network.h"
#include "cpu/ops.h"

namespace fused_mlp {

std::tuple<Tensor, Tensor> research_net(
    const Tensor& input, std::vector<Tensor> weights, std::vector<Tensor> biases,
    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> num_batches_tracked, bool training, std::vector<double> dropout_p,
    const std::optional<Tensor>& seed, double momentum, double eps, double negative_slope) {
  const Network network{std::move(weights),
                        std::move(biases),
                        bn_weight,
                        bn_bias,
                        std::move(running_mean),
                        std::move(running_var),
                        std::move(num_batches_tracked),
                        training,
                        std::move(dropout_p),
                        momentum,
                        eps,
                        negative_slope};
  Call call = describe_forward(network, input);
  set_seed(network, seed_of(seed), call);
  const Tensor output = new_output(call);
  const Tensor saved =
      new_empty_cpu({kernels().research_net_saved_numel(call.net)}, call.accumulate);
  call.net.saved = saved.mutable_data_ptr();
  kernels().research_net(call.net);
  return {output, saved};
}

StableIValue research_net_backward(const Tensor& grad_output, const Tensor& input,
                                   std::vector<Tensor> weights, std::vector<Tensor> biases,
                                   const std::optional<Tensor>& bn_weight,
                                   const std::optional<Tensor>& bn_bias, const Tensor& saved,
                                   bool training, std::vector<double> dropout_p,
                                   const std::optional<Tensor>& seed, double negative_slope,
                                   std::vector<bool> output_mask) {
  const Network network{std::move(weights),
                        std::move(biases),
                        bn_weight,
                        bn_bias,
                        {},
                        {},
                        {},
                        training,
                        std::move(dropout_p),
                        0,
                        0,
                        negative_slope};
  Call call = describe_backward(network, input);
  set_seed(network, seed_of(seed), call);
  return backward(network, call, grad_output, saved, kernels().research_net_saved_numel(call.net),
                  output_mask);
}

}  // namespace fused_mlp
