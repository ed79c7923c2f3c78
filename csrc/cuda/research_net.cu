// research_net: the whole network in one op, for widths that shared memory holds.
#if !defined(__CUDA_ARCH__)
#include <limits>

#include "common/philox.h"
#include "network.h"
#include "ops.h"
#include "settings.h"

namespace fused_mlp::cuda {
namespace {

constexpr const char* kTooWide =
    "fused_mlp: research_net: these widths do not fit in the GPU's shared memory; run the network "
    "op by op";

NetShape shape_of(const Tensor& input, const Tensors& weights, const Device& device) {
  STD_TORCH_CHECK(weights.size() >= 2 && weights.size() <= kMaxLayers,
                  "fused_mlp: research_net takes 2 to ", kMaxLayers, " layers");
  NetShape shape = {};
  shape.rows = input.size(0);
  shape.layers = static_cast<int32_t>(weights.size());
  shape.widths[0] = static_cast<int32_t>(input.size(1));
  for (size_t i = 0; i < weights.size(); ++i)
    shape.widths[i + 1] = static_cast<int32_t>(weights[i].size(0));
  shape.math = choose_math(dtype_of(input), device, allow_tf32());
  return shape;
}

// The same matrix with stride 1 along its rows.
Tensor unit_stride(const Tensor& matrix) {
  return matrix.size(1) == 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

int64_t row_stride(const Tensor& matrix) {
  return matrix.size(0) == 1 ? matrix.size(1) : matrix.stride(0);
}

// Everything a network's kernels read, kept alive until they are launched.
struct Network {
  NetShape shape = {};
  NetParameters parameters = {};
  Tensors kept;

  Network(const Tensor& input, const Tensors& weights, const Tensors& biases,
          const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, bool training,
          const std::vector<double>& dropout_p, const OptionalTensor& seed, double slope,
          const Context& context) {
    shape = shape_of(input, weights, context.device());
    NetParameters& p = parameters;
    const Tensor x = keep(unit_stride(input));
    p.x = x.data_ptr();
    p.x_stride = row_stride(x);
    for (size_t i = 0; i < weights.size(); ++i) {
      p.weight[i] = keep(as_contiguous(weights[i])).data_ptr();
      p.bias[i] = keep(as_contiguous(biases[i])).data_ptr();
      p.parameters += weights[i].numel() + biases[i].numel();
    }
    p.gradient_stride = gradient_stride(p.parameters);
    if (bn_weight) p.bn_weight = keep(as_contiguous(*bn_weight)).data_ptr();
    if (bn_bias) p.bn_bias = keep(as_contiguous(*bn_bias)).data_ptr();
    for (size_t i = 0; i < dropout_p.size(); ++i) {
      const double probability = seed ? dropout_p[i] : 0;
      p.dropout_threshold[i] = philox::threshold(probability);
      p.dropout_scale[i] = probability < 1 ? 1 / (1 - probability) : 0;
    }
    if (seed) p.seed = static_cast<const int64_t*>(keep(as_contiguous(*seed)).data_ptr());
    p.flags = (training ? 0 : kNetGivenStatistics) | wide_flag(bn_weight, input, kNetWideWeight) |
              wide_flag(bn_bias, input, kNetWideBias);
    p.slope = slope;
  }

  const Tensor& keep(const Tensor& tensor) {
    kept.push_back(tensor);
    return kept.back();
  }
};

}  // namespace

std::tuple<Tensor, Tensor> research_net(const Tensor& input, Tensors weights, Tensors biases,
                                        OptionalTensor bn_weight, OptionalTensor bn_bias,
                                        OptionalTensor running_mean, OptionalTensor running_var,
                                        OptionalTensor num_batches_tracked, bool training,
                                        std::vector<double> dropout_p, OptionalTensor seed,
                                        double momentum, double eps, double negative_slope) {
  const Context context(input);
  const DType dtype = dtype_of(input);
  Network network(input, weights, biases, bn_weight, bn_bias, training, dropout_p, seed,
                  negative_slope, context);
  NetParameters& p = network.parameters;
  const int64_t channels = weights[weights.size() - 2].size(0);
  Tensor output = new_tensor({input.size(0), weights.back().size(0)}, input.scalar_type(), input);
  Tensor saved = new_tensor({2 * channels}, accumulator_type(dtype), input);
  if (input.size(0) == 0) {
    torch::stable::fill_(saved, std::numeric_limits<double>::quiet_NaN());
    return {output, saved};
  }
  const NetPlan plan = plan_research_net(network.shape, false, context.device());
  STD_TORCH_CHECK(plan.fits, kTooWide);
  Running means(running_mean), vars(running_var);
  p.y = output.data_ptr();
  p.saved = saved.data_ptr();
  p.running_mean = mutable_data(means.dense);
  p.running_var = mutable_data(vars.dense);
  p.batches_tracked = training ? static_cast<int64_t*>(mutable_data(num_batches_tracked)) : nullptr;
  p.flags |= wide_flag(running_mean, input, kNetWideRunningMean) |
             wide_flag(running_var, input, kNetWideRunningVar);
  p.momentum = momentum;
  p.eps = eps;
  const Tensor partials =
      workspace(training ? 2 * plan.measure_blocks * channels * accumulator_size(dtype) : 0, input);
  p.partials = partials.data_ptr();
  research_net_forward(network.shape, plan, p, dtype, context.stream());
  if (training) {
    means.write_back();
    vars.write_back();
  }
  return {output, saved};
}

Tensors research_net_backward(const Tensor& grad_output, const Tensor& input, Tensors weights,
                              Tensors biases, OptionalTensor bn_weight, OptionalTensor bn_bias,
                              const Tensor& saved, bool training, std::vector<double> dropout_p,
                              OptionalTensor seed, double negative_slope,
                              std::vector<bool> output_mask) {
  const Context context(input);
  const DType dtype = dtype_of(input);
  const size_t layers = weights.size();
  // Gradients in the order of output_mask: input, weights…, biases…, bn_weight, bn_bias.
  std::vector<OptionalTensor> gradients(2 * layers + 3);
  if (output_mask[0]) gradients[0] = new_tensor(sizes_of(input), input.scalar_type(), input);
  for (size_t i = 0; i < layers; ++i) {
    if (output_mask[1 + i])
      gradients[1 + i] = new_tensor(sizes_of(weights[i]), input.scalar_type(), input);
    if (output_mask[1 + layers + i])
      gradients[1 + layers + i] = new_tensor(sizes_of(biases[i]), input.scalar_type(), input);
  }
  if (output_mask[2 * layers + 1])
    gradients[2 * layers + 1] = torch::stable::empty_like(*bn_weight);
  if (output_mask[2 * layers + 2]) gradients[2 * layers + 2] = torch::stable::empty_like(*bn_bias);
  Tensors results;
  for (const OptionalTensor& gradient : gradients)
    if (gradient) results.push_back(*gradient);
  if (input.size(0) == 0) {
    for (Tensor& gradient : results) torch::stable::zero_(gradient);
    return results;
  }
  Network network(input, weights, biases, bn_weight, bn_bias, training, dropout_p, seed,
                  negative_slope, context);
  NetParameters& p = network.parameters;
  const NetPlan plan = plan_research_net(network.shape, true, context.device());
  STD_TORCH_CHECK(plan.fits, kTooWide);
  const Tensor g = network.keep(unit_stride(grad_output));
  p.g = g.data_ptr();
  p.g_stride = row_stride(g);
  p.y = mutable_data(gradients[0]);
  p.saved = network.keep(as_contiguous(saved)).data_ptr();
  p.grad_bn_weight = mutable_data(gradients[2 * layers + 1]);
  p.grad_bn_bias = mutable_data(gradients[2 * layers + 2]);
  NetReduceParameters reduce = {};
  for (size_t i = 0; i < layers; ++i) {
    const int s = reduce.segments;
    reduce.target[s] = mutable_data(gradients[1 + i]);
    reduce.begin[s + 1] = reduce.begin[s] + weights[i].numel();
    reduce.target[s + 1] = mutable_data(gradients[1 + layers + i]);
    reduce.begin[s + 2] = reduce.begin[s + 1] + biases[i].numel();
    reduce.segments += 2;
  }
  const bool measures = training || p.grad_bn_weight || p.grad_bn_bias;
  const int64_t channels = weights[layers - 2].size(0), accumulator = accumulator_size(dtype);
  const Tensor partials =
      workspace(measures ? 2 * plan.measure_blocks * channels * accumulator : 0, input);
  const Tensor sums = workspace(plan.apply_blocks * p.gradient_stride * accumulator, input);
  p.partials = partials.data_ptr();
  p.gradients = sums.data_ptr();
  research_net_backward(network.shape, plan, p, reduce, dtype, measures, context.stream());
  return results;
}

}  // namespace fused_mlp::cuda

extern "C" {

// Whether research_net takes a network of these widths (input, hidden…, output) forward and
// backward on the current device, with or without tf32. Never throws.
__attribute__((visibility("default"))) int fused_mlp_research_net_fits(const int64_t* widths,
                                                                       int count,
                                                                       int element_size) {
  using namespace fused_mlp::cuda;
  const int layers = count - 1;
  if (layers < 2 || layers > kMaxLayers) return 0;
  const DType dtype = element_size == 8   ? DType::kFloat64
                      : element_size == 4 ? DType::kFloat32
                                          : DType::kBFloat16;
  NetShape shape = {};
  shape.rows = 1 << 20;
  shape.layers = layers;
  for (int i = 0; i <= layers; ++i) {
    if (widths[i] < 1 || widths[i] > INT32_MAX) return 0;
    shape.widths[i] = static_cast<int32_t>(widths[i]);
  }
  try {
    int index = 0;
    if (!simulated() && cudaGetDevice(&index) != cudaSuccess) return 0;
    const Device& current = device(index);
    for (const bool tf32 : {false, true}) {
      shape.math = choose_math(dtype, current, tf32);
      for (const bool backward : {false, true})
        if (!plan_research_net(shape, backward, current).fits) return 0;
    }
    return 1;
  } catch (...) {
    return 0;
  }
}
}
#endif
