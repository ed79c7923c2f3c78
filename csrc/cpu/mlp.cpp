// A chain of Linear layers with what stands behind them, for a module that calls it again and
// again: three calls of linear_act take 15 us for one row, most of it on the way to the kernels.

#include "cpu/chain.h"
#include "cpu/handle.h"
#include "cpu/ops.h"

namespace fused_mlp {
namespace {

const Mlp& mlp_of(const Tensor& mlp) { return held_in<Mlp>(mlp, "mlp_prepare"); }

// What is dropped decides what is kept, so a call is described with a seed before it has one.
constexpr int64_t kAnySeed[2] = {};

// The elements of `saved`; a seed stands at the end where something drops.
int64_t saved_numel(const Mlp& mlp, Chain& chain) {
  return mlp.drops() ? with_seed(chain.saved_numel(), chain.dtype) : chain.saved_numel();
}

int64_t* seed_in(const Tensor& saved) {
  char* data = static_cast<char*>(const_cast<void*>(saved.const_data_ptr()));
  return reinterpret_cast<int64_t*>(data + saved.numel() * size_of(saved.scalar_type()) -
                                    static_cast<int64_t>(kSeedBytes));
}

Tensor new_output(Chain& chain, const Tensor& input) {
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = chain.layers.back().out_features;
  const Tensor output = new_empty_cpu(sizes, chain.dtype);
  chain.output() = output.mutable_data_ptr();
  return output;
}

}  // namespace

Tensor mlp_prepare(std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                   std::vector<int64_t> activations, std::vector<double> negative_slopes,
                   std::vector<double> dropout_p, std::vector<int64_t> normed_layers,
                   std::vector<std::optional<Tensor>> norm_tensors, std::vector<bool> norm_training,
                   std::vector<double> momentum, std::vector<double> eps) {
  const size_t layers = weights.size(), norms = normed_layers.size();
  STD_TORCH_CHECK(layers >= 1 && layers <= kMaxLayers && biases.size() == layers &&
                      activations.size() == layers && negative_slopes.size() == layers &&
                      dropout_p.size() == layers,
                  "fused_mlp: mlp_prepare: expected 1 to ", kMaxLayers,
                  " weights, and for each a bias or none, an activation, a slope and a dropout "
                  "probability");
  STD_TORCH_CHECK(norm_tensors.size() == 5 * norms && norm_training.size() == norms &&
                      momentum.size() == norms && eps.size() == norms,
                  "fused_mlp: mlp_prepare: expected five tensors, a mode, a momentum and an eps "
                  "for each batch norm");
  for (double p : dropout_p) {
    STD_TORCH_CHECK(p >= 0 && p <= 1,
                    "fused_mlp: mlp_prepare: dropout_p must be between 0 and 1, but got ", p);
  }
  Mlp mlp{std::move(weights),         std::move(biases),    {},
          std::move(negative_slopes), std::move(dropout_p), {}};
  for (int64_t number : activations) mlp.activations.push_back(activation_of(number));
  for (size_t k = 0; k < norms; ++k) {
    const int64_t layer = normed_layers[k], after = k > 0 ? normed_layers[k - 1] : -1;
    STD_TORCH_CHECK(layer > after && layer < static_cast<int64_t>(layers),
                    "fused_mlp: mlp_prepare: there is no layer ", layer,
                    " for a batch norm, or it has one");
    activation_of(activations[static_cast<size_t>(layer)], Activation::kLeakyReLU);
    const auto tensor = [&](size_t i) { return std::move(norm_tensors[5 * k + i]); };
    mlp.norms.push_back({static_cast<size_t>(layer), tensor(0), tensor(1), tensor(2), tensor(3),
                         tensor(4), norm_training[k], momentum[k], eps[k]});
  }
  return hold(std::move(mlp));
}

std::tuple<Tensor, Tensor> mlp_prepared(const Tensor& input, const Tensor& handle) {
  const Mlp& mlp = mlp_of(handle);
  Chain chain = describe(mlp, input, kAnySeed, false);
  const Tensor output = new_output(chain, input);
  const Tensor saved = new_empty_cpu({saved_numel(mlp, chain)}, chain.dtype);
  chain.place(saved.mutable_data_ptr());
  if (mlp.drops()) {
    draw_seed(seed_in(saved));
    chain.set_seed(seed_in(saved));
  }
  run(chain);
  return {output, saved};
}

Tensor mlp_evaluate(const Tensor& input, const Tensor& handle) {
  const Mlp& mlp = mlp_of(handle);
  STD_TORCH_CHECK(!mlp.trains(), "fused_mlp: mlp_evaluate: expected batch norms in evaluation");
  int64_t seed[2];
  Chain chain = describe(mlp, input, seed, true);
  const Tensor output = new_output(chain, input);
  if (mlp.drops()) draw_seed(seed);
  run(chain);
  return output;
}

StableIValue mlp_prepared_backward(const Tensor& grad_output, const Tensor& input,
                                   const std::optional<Tensor>& output, const Tensor& saved,
                                   const Tensor& handle,
                                   std::optional<std::vector<bool>> output_mask) {
  const Mlp& mlp = mlp_of(handle);
  Chain chain = describe(mlp, input, kAnySeed, false);
  const size_t layers = chain.layers.size(), norms = chain.norms.size();
  const LinearAct& last = chain.layers.back();
  const bool keeps_output = chain.kept_of_last() == Kept::kOutput;
  const auto fits = [&](const Tensor& tensor, int64_t numel) {
    return tensor.is_cpu() && tensor.numel() == numel && tensor.scalar_type() == chain.dtype;
  };
  STD_TORCH_CHECK(
      fits(grad_output, last.rows * last.out_features) && fits(saved, saved_numel(mlp, chain)) &&
          saved.is_contiguous() &&
          (!keeps_output || (output && fits(*output, grad_output.numel()))),
      "fused_mlp: mlp_prepared_backward: grad_output, output or saved do not fit input");
  const size_t flags = 1 + 2 * layers + 2 * norms;
  STD_TORCH_CHECK(!output_mask || output_mask->size() == flags,
                  "fused_mlp: mlp_prepared_backward: output_mask must have ", flags, " flags");
  chain.place(const_cast<void*>(elements_of(saved)));
  if (mlp.drops()) chain.set_seed(seed_in(saved));

  NewTensors results(flags);
  size_t flag = 0;
  const auto wanted = [&](bool usual, IntHeaderOnlyArrayRef sizes, ScalarType dtype) -> void* {
    const bool is_wanted = output_mask ? (*output_mask)[flag] : usual;
    ++flag;
    return is_wanted ? results.add(sizes, dtype) : nullptr;
  };
  ChainGradients gradients(chain);
  gradients.layers[0].grad_input = wanted(false, sizes_of(input), chain.dtype);
  for (size_t l = 0; l < layers; ++l) {
    LinearActBackward& op = gradients.layers[l];
    op.grad_weight = wanted(true, {op.forward.out_features, op.forward.in_features}, chain.dtype);
  }
  if (keeps_output) gradients.layers.back().kept = chain.contiguous_data(*output);
  for (size_t l = 0; l < layers; ++l) {
    gradients.layers[l].grad_bias =
        wanted(mlp.biases[l].has_value(), {chain.layers[l].out_features}, chain.dtype);
  }
  for (size_t k = 0; k < norms; ++k) {
    BatchNormActBackward& op = gradients.norms[k];
    const auto vector_like = [&](const ChannelVector& parameter) -> ChannelVector {
      const DType dtype = parameter.data ? parameter.dtype : op.forward.dtype;
      return {wanted(parameter.data != nullptr, {op.forward.channels}, scalar_type_of(dtype)),
              dtype};
    };
    op.grad_weight = vector_like(op.forward.weight);
    op.grad_bias = vector_like(op.forward.bias);
  }
  run_backward(chain, chain.contiguous_data(grad_output), gradients);
  return results.release();
}

}  // namespace fused_mlp
