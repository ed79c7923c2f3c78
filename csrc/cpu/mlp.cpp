// A chain of Linear layers with what stands behind them, for a module that calls it again and
// again: three calls of linear_act take 15 us for one row, most of it on the way to the kernels.

#include "cpu/chain.h"
#include "cpu/handle.h"
#include "cpu/ops.h"

namespace fused_mlp {
namespace {

const Mlp& mlp_of(const Tensor& mlp) { return held_in<Mlp>(mlp, "mlp_prepare"); }

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
  Chain chain = describe(mlp, input, kAnySeed, Pass::kForward);
  return run_and_draw(mlp, chain, input);
}

Tensor mlp_evaluate(const Tensor& input, const Tensor& handle) {
  return evaluate(mlp_of(handle), input);
}

StableIValue mlp_prepared_backward(const Tensor& grad_output, const Tensor& input,
                                   const std::optional<Tensor>& output, const Tensor& saved,
                                   const Tensor& handle,
                                   std::optional<std::vector<bool>> output_mask) {
  const Mlp& mlp = mlp_of(handle);
  Chain chain = describe(mlp, input, kAnySeed, Pass::kForward);
  return backward_of_drawn(mlp, chain, grad_output, input, output, saved, 0, output_mask);
}

}  // namespace fused_mlp
