// research_net for compiled graphs. They hand over all tensors at every call, 0.1 us each, and
// every list, flag and number more takes as long: so there are few of them here. What backward
// wants to know beside input and weights, forward copies to the end of `saved`: a vector that a
// graph keeps for backward costs 1 us a step. Copying small weights as well gained nothing.

#include <cstring>
#include <iterator>
#include <utility>

#include "cpu/network.h"
#include "cpu/ops.h"
#include "cpu/text.h"

namespace fused_mlp {
namespace {

// The network of `tensors`: weights…, biases…, and where there are more, the batch norm's weight
// and bias. They are moved there: counting a reference more and less takes 0.01 us.
Network network_of(std::vector<Tensor>& tensors, size_t layers, bool training) {
  const bool affine = tensors.size() == 2 * layers + 2;
  STD_TORCH_CHECK(affine || tensors.size() == 2 * layers, "fused_mlp: research_net: expected ",
                  layers, " weights, as many biases and the batch norm's two or none");
  Network network;
  const auto first = std::make_move_iterator(tensors.begin());
  const auto biases = first + static_cast<ptrdiff_t>(layers);
  network.weights.assign(first, biases);
  network.biases.assign(biases, biases + static_cast<ptrdiff_t>(layers));
  if (affine) {
    network.bn_weight = std::move(tensors[2 * layers]);
    network.bn_bias = std::move(tensors[2 * layers + 1]);
  }
  network.training = training;
  return network;
}

// The end of `saved`: the first layer's bias, since backward may compute that layer again, and the
// batch norm's weight and bias, each in the room of as many elements of `saved` as it has; then
// `numbers`. The other biases make no difference to any gradient.
struct Kept {
  std::vector<double> numbers;  // is there a weight of the batch norm; slope, dropout probabilities
  int64_t features, channels;   // of the first layer and of the batch norm
  int64_t itemsize;             // of `saved`

  bool affine() const { return numbers[0] != 0; }
  int64_t numel() const {
    return features + (affine() ? 2 * channels : 0) +
           static_cast<int64_t>(numbers.size() * sizeof(double)) / itemsize;
  }
  char* begin(const Tensor& saved) const {
    return static_cast<char*>(const_cast<void*>(elements_of(saved))) +
           (saved.numel() - numel()) * itemsize;
  }
};

void keep(const Kept& kept, const Network& network, const Tensor& saved) {
  char* at = kept.begin(saved);
  const auto copy = [&](const Tensor& vector) {
    const Tensor elements = as_contiguous(vector);
    const int64_t numel = elements.numel();
    std::memcpy(at, elements_of(elements),
                static_cast<size_t>(numel * size_of(vector.scalar_type())));
    at += numel * kept.itemsize;
  };
  copy(network.biases[0]);
  if (kept.affine()) {
    copy(*network.bn_weight);
    copy(*network.bn_bias);
  }
  std::memcpy(at, kept.numbers.data(), kept.numbers.size() * sizeof(double));
}

// The numbers of a network of so many layers.
std::vector<double> numbers_in(const Tensor& saved, size_t layers) {
  std::vector<double> numbers(layers);
  const size_t bytes = layers * sizeof(double);
  const ScalarType dtype = saved.scalar_type();
  const auto all = static_cast<size_t>(saved.numel() * size_of(dtype));
  STD_TORCH_CHECK(layers >= 2 && (dtype == ScalarType::Double || dtype == ScalarType::Float) &&
                      saved.is_cpu() && saved.is_contiguous() && all >= bytes,
                  "fused_mlp: research_net_compiled_backward: expected what forward saved");
  std::memcpy(numbers.data(), static_cast<const char*>(elements_of(saved)) + all - bytes, bytes);
  return numbers;
}

}  // namespace

std::tuple<Tensor, Tensor> research_net_compiled(const Tensor& input,
                                                 std::vector<Tensor>& parameters,
                                                 std::vector<Tensor>& buffers,
                                                 const std::string& numbers) {
  const std::vector<double>& options = parsed<std::vector<double>, numbers_of>(numbers);
  STD_TORCH_CHECK(options.size() >= 3, "fused_mlp: research_net: expected at least 3 numbers");
  STD_TORCH_CHECK(buffers.size() == 3,
                  "fused_mlp: research_net: expected running mean and variance and the counter");
  Network network = network_of(parameters, options.size() - 1, true);
  const bool affine = network.bn_weight.has_value();
  STD_TORCH_CHECK(!affine || (network.bn_weight->scalar_type() == input.scalar_type() &&
                              network.bn_bias->scalar_type() == input.scalar_type()),
                  "fused_mlp: research_net: the batch norm must have the input's dtype");
  network.running_mean = std::move(buffers[0]);
  network.running_var = std::move(buffers[1]);
  network.num_batches_tracked = std::move(buffers[2]);
  network.momentum = options[0];
  network.eps = options[1];
  network.negative_slope = options[2];
  network.dropout_p.assign(options.begin() + 3, options.end());
  Kept kept{{affine ? 1.0 : 0.0, options[2]},
            network.biases.front().numel(),
            network.biases.end()[-2].numel(),
            size_of(accumulate_type(input))};
  kept.numbers.insert(kept.numbers.end(), options.begin() + 3, options.end());
  std::tuple<Tensor, Tensor> results = run_and_draw(network, input, kept.numel());
  keep(kept, network, std::get<1>(results));
  return results;
}

StableIValue research_net_compiled_backward(const Tensor& grad_output, const Tensor& input,
                                            std::vector<Tensor>& weights, const Tensor& saved,
                                            int64_t output_mask) {
  Network network;
  network.weights = std::move(weights);
  network.training = true;
  const size_t layers = network.weights.size();
  std::vector<double> numbers = numbers_in(saved, layers);
  network.negative_slope = numbers[1];
  network.dropout_p.assign(numbers.begin() + 2, numbers.end());
  Call call = describe_weights(network, input);
  ResearchNet& net = call.net;
  const Kept kept{std::move(numbers), net.widths[1], net.widths[layers - 1],
                  size_of(saved.scalar_type())};
  char* at = kept.begin(saved);
  net.biases[0] = at;
  if (kept.affine()) {
    at += kept.features * kept.itemsize;
    net.bn_weight.data = at;
    net.bn_bias.data = at + kept.channels * kept.itemsize;
  }
  std::vector<bool> mask(2 * layers + 3);
  for (size_t i = 0; i < mask.size() && i < 64; ++i) mask[i] = output_mask >> i & 1;
  return backward_of_drawn(network, call, grad_output, saved, kept.numel(), mask);
}

Tensor research_net_compiled_evaluate(const Tensor& input, std::vector<Tensor>& tensors,
                                      const std::string& numbers) {
  const std::vector<double>& options = parsed<std::vector<double>, numbers_of>(numbers);
  STD_TORCH_CHECK(tensors.size() >= 6 && options.size() == 2,
                  "fused_mlp: research_net: expected at least 6 tensors and 2 numbers");
  size_t layers = 0;  // the weights have two dimensions
  while (layers < tensors.size() && tensors[layers].dim() == 2) ++layers;
  Tensor running_var = std::move(tensors.back()), running_mean = std::move(tensors.end()[-2]);
  tensors.erase(tensors.end() - 2, tensors.end());
  Network network = network_of(tensors, layers, false);
  network.running_mean = std::move(running_mean);
  network.running_var = std::move(running_var);
  network.eps = options[0];
  network.negative_slope = options[1];
  network.dropout_p.assign(layers < 2 ? 0 : layers - 2, 0.0);
  return evaluate(network, input);
}

}  // namespace fused_mlp
