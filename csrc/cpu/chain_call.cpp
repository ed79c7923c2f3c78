// One call of a chain with tensors for all that it writes: what mlp.cpp does for modules and
// compiled_mlp.cpp for graphs.

#include "cpu/chain.h"

namespace fused_mlp {
namespace {

// The elements of `saved` but for the caller's; a seed stands at their end where something drops.
int64_t kept_numel(const Mlp& mlp, Chain& chain) {
  return mlp.drops() ? with_seed(chain.saved_numel(), chain.dtype) : chain.saved_numel();
}

// All elements of `saved`. The caller's begin at a multiple of 8 bytes.
int64_t with_more(int64_t numel, int64_t more, ScalarType dtype) {
  const int64_t word = 8 / size_of(dtype);
  return more == 0 ? numel : (numel + word - 1) / word * word + more;
}

Tensor new_output(Chain& chain, const Tensor& input) {
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = chain.layers.back().out_features;
  const Tensor output = new_empty_cpu(sizes, chain.dtype);
  chain.output() = output.mutable_data_ptr();
  return output;
}

// Points `gradients` to new tensors for those that are wanted.
void place_results(const Mlp& mlp, const Chain& chain, const Tensor& input,
                   const std::optional<std::vector<bool>>& output_mask, NewTensors& results,
                   ChainGradients& gradients) {
  const size_t layers = chain.layers.size(), norms = chain.norms.size();
  size_t flag = 0;
  const auto wanted = [&](bool usual, IntHeaderOnlyArrayRef sizes, ScalarType dtype) -> void* {
    const bool is_wanted = output_mask ? (*output_mask)[flag] : usual;
    ++flag;
    return is_wanted ? results.add(sizes, dtype) : nullptr;
  };
  gradients.layers[0].grad_input = wanted(false, sizes_of(input), chain.dtype);
  for (size_t l = 0; l < layers; ++l) {
    LinearActBackward& op = gradients.layers[l];
    op.grad_weight = wanted(true, {op.forward.out_features, op.forward.in_features}, chain.dtype);
  }
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
}

}  // namespace

std::tuple<Tensor, Tensor> run_and_draw(const Mlp& mlp, Chain& chain, const Tensor& input,
                                        int64_t more) {
  const Tensor output = new_output(chain, input);
  const int64_t numel = kept_numel(mlp, chain);
  const Tensor saved = new_empty_cpu({with_more(numel, more, chain.dtype)}, chain.dtype);
  chain.place(saved.mutable_data_ptr());
  clear_behind(saved, numel);
  if (mlp.drops()) {
    int64_t* seed = seed_in(saved, numel);
    draw_seed(seed);
    chain.set_seed(seed);
  }
  run(chain);
  return {output, saved};
}

Tensor evaluate(const Mlp& mlp, const Tensor& input) {
  STD_TORCH_CHECK(!mlp.trains(), "fused_mlp: mlp_evaluate: expected batch norms in evaluation");
  int64_t seed[2];
  Chain chain = describe(mlp, input, seed, Pass::kEvaluation);
  const Tensor output = new_output(chain, input);
  if (mlp.drops()) draw_seed(seed);
  run(chain);
  return output;
}

StableIValue backward_of_drawn(const Mlp& mlp, Chain& chain, const Tensor& grad_output,
                               const Tensor& input, const std::optional<Tensor>& output,
                               const Tensor& saved, int64_t more,
                               const std::optional<std::vector<bool>>& output_mask) {
  const LinearAct& last = chain.layers.back();
  const bool keeps_output = chain.kept_of_last() == Kept::kOutput;
  const int64_t numel = kept_numel(mlp, chain);
  const auto fits = [&](const Tensor& tensor, int64_t expected) {
    return tensor.is_cpu() && tensor.numel() == expected && tensor.scalar_type() == chain.dtype;
  };
  STD_TORCH_CHECK(fits(grad_output, last.rows * last.out_features) &&
                      fits(saved, with_more(numel, more, chain.dtype)) && saved.is_contiguous() &&
                      (!keeps_output || (output && fits(*output, grad_output.numel()))),
                  "fused_mlp: mlp_backward: grad_output, output or saved do not fit input");
  const size_t flags = 1 + 2 * chain.layers.size() + 2 * chain.norms.size();
  STD_TORCH_CHECK(!output_mask || output_mask->size() == flags,
                  "fused_mlp: mlp_backward: output_mask must have ", flags, " flags");
  chain.place(const_cast<void*>(elements_of(saved)));
  if (mlp.drops()) chain.set_seed(seed_in(saved, numel));
  ChainGradients gradients(chain);
  NewTensors results(flags);
  place_results(mlp, chain, input, output_mask, results, gradients);
  if (keeps_output) gradients.layers.back().kept = chain.contiguous_data(*output);
  run_backward(chain, chain.contiguous_data(grad_output), gradients);
  return results.release();
}

}  // namespace fused_mlp
