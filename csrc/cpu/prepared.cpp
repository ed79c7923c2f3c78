// research_net for a module that calls it again and again: its tensors and options are handed over
// once, which spares 5 us a call, in a tensor whose memory is the `Prepared` itself and whose
// deleter frees it. Torch counts the references, so nothing leaks and nothing is used after it was
// freed.

#include "cpu/network.h"
#include "cpu/ops.h"

namespace fused_mlp {
namespace {

struct Prepared {
  // Its own address, so that a copy of the bytes, or any other tensor, is not taken for it.
  const Prepared* self;
  Network network;
};

const Network& network_of(const Tensor& prepared) {
  const bool plausible = prepared.is_cpu() && prepared.scalar_type() == ScalarType::Byte &&
                         prepared.numel() == static_cast<int64_t>(sizeof(Prepared));
  const Prepared* content =
      plausible ? static_cast<const Prepared*>(prepared.const_data_ptr()) : nullptr;
  STD_TORCH_CHECK(content != nullptr && content->self == content,
                  "fused_mlp: expected what research_net_prepare returned, not a copy of it");
  return content->network;
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
  auto* prepared =
      new Prepared{nullptr,
                   {std::move(weights), std::move(biases), std::move(bn_weight), std::move(bn_bias),
                    std::move(running_mean), std::move(running_var), std::move(num_batches_tracked),
                    training, std::move(dropout_p), momentum, eps, negative_slope}};
  prepared->self = prepared;
  const int64_t size = sizeof(Prepared), stride = 1;
  return torch::stable::from_blob(
      prepared, {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Byte, [](void* data) { delete static_cast<Prepared*>(data); });
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
