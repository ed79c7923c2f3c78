// research_net for a module that calls it again and again: its tensors and options are handed over
// once, which spares 5 us a call, in a tensor whose memory is the `Prepared` itself and whose
// deleter frees it. Torch counts the references, so nothing leaks and nothing is used after it was
// freed.

#include <cstring>

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

constexpr size_t kSeedBytes = 2 * sizeof(int64_t);

// The seed stands behind everything else in `saved`.
int64_t* seed_in(const Tensor& saved) {
  char* data = static_cast<char*>(const_cast<void*>(saved.const_data_ptr()));
  const size_t itemsize = saved.scalar_type() == ScalarType::Double ? 8 : 4;
  return reinterpret_cast<int64_t*>(data + static_cast<size_t>(saved.numel()) * itemsize -
                                    kSeedBytes);
}

// The elements of `saved`, with room for a seed that begins at a multiple of 8 bytes.
int64_t saved_numel(const Network& network, Call& call) {
  if (!network.drops()) return kernels().research_net_saved_numel(call.net);
  const int64_t any_seed[2] = {};  // what is dropped takes room
  set_seed(network, any_seed, call);
  const int64_t numel = kernels().research_net_saved_numel(call.net);
  set_seed(network, nullptr, call);
  return call.accumulate == ScalarType::Double ? numel + 2 : (numel + 1) / 2 * 2 + 4;
}

// All parameters that there are, and not the input.
std::vector<bool> mask_of_parameters(const Network& network) {
  std::vector<bool> mask(2 * network.weights.size() + 3, true);
  mask.front() = false;
  mask.end()[-2] = network.bn_weight.has_value();
  mask.back() = network.bn_bias.has_value();
  return mask;
}

// As fused_mlp/dropout.py: draw_seed.
void draw_seed(int64_t* seed) {
  const Tensor drawn = new_empty_cpu({2}, ScalarType::Long);
  random_(drawn);
  std::memcpy(seed, drawn.const_data_ptr(), kSeedBytes);
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
  const Network& network = network_of(prepared);
  Call call = describe_forward(network, input);
  ResearchNet& net = call.net;
  STD_TORCH_CHECK(!net.training || net.rows > 1,
                  "fused_mlp: research_net: training needs more than one row");
  const Tensor output = new_output(call);
  const Tensor saved = new_empty_cpu({saved_numel(network, call)}, call.accumulate);
  net.saved = saved.mutable_data_ptr();
  if (network.drops()) {
    draw_seed(seed_in(saved));
    set_seed(network, seed_in(saved), call);
  }
  kernels().research_net(net);
  return {output, saved};
}

Tensor research_net_evaluate(const Tensor& input, const Tensor& prepared) {
  const Network& network = network_of(prepared);
  STD_TORCH_CHECK(!network.training && !network.drops(),
                  "fused_mlp: research_net_evaluate: expected a network in evaluation");
  Call call = describe_forward(network, input);
  const Tensor output = new_output(call);
  kernels().research_net(call.net);
  return output;
}

StableIValue research_net_prepared_backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& saved, const Tensor& prepared,
                                            std::optional<std::vector<bool>> output_mask) {
  const Network& network = network_of(prepared);
  Call call = describe_backward(network, input);
  const int64_t numel = saved_numel(network, call);
  if (network.drops() && saved.numel() == numel) set_seed(network, seed_in(saved), call);
  return backward(network, call, grad_output, saved, numel,
                  output_mask ? *output_mask : mask_of_parameters(network));
}

}  // namespace fused_mlp
