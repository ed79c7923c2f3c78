// A chain of Linear layers as the ops take it, and one call of it as the kernels take it.
#pragma once

#include <tuple>

#include "cpu/tensors.h"

namespace fused_mlp {

// A batch norm behind the product of a layer.
struct Norm {
  size_t layer;
  std::optional<Tensor> weight, bias, running_mean, running_var, num_batches_tracked;
  bool training;
  double momentum, eps;
};

// What stays the same from call to call.
struct Mlp {
  std::vector<Tensor> weights;
  std::vector<std::optional<Tensor>> biases;
  std::vector<Activation> activations;
  std::vector<double> negative_slopes, dropout_p;
  std::vector<Norm> norms;  // in the order of their layers

  bool drops() const;
  bool trains() const;  // some batch norm takes the statistics of its batch
};

// A batch norm as a step of its own, with the activation and the dropout of its layer.
struct NormStep {
  size_t layer;
  BatchNormAct op;
  Dropout dropout;
};

// Where a derivative comes from, as fused_mlp/activations.py: kept.
enum class Kept { kNothing, kOutput, kInput };
Kept kept(const ActDropout& act);

// One call. As in network.h, tensors are looked at anew at every call.
struct Chain : Copies {
  std::vector<LinearAct> layers;
  std::vector<NormStep> norms;
  ScalarType dtype;

  // What the last layer puts out, and the activation that puts it out, unless a batch norm does.
  void*& output();
  Kept kept_of_last() const;

  void set_seed(const int64_t* seed);

  // The elements that backward needs, but for input, parameters and output.
  int64_t saved_numel();
  // Points the layers to them.
  void place(void* saved);

 private:
  template <class Visit>
  void for_saved(const Visit& visit);
};

// The gradients to be written, null where nobody wants them.
struct ChainGradients {
  std::vector<LinearActBackward> layers;
  std::vector<BatchNormActBackward> norms;

  // Of a chain that was placed.
  explicit ChainGradients(const Chain& chain);

  // The first step that anything is wanted of: 2 l for the product of layer l, 2 l + 1 for its
  // batch norm.
  size_t first(const Chain& chain) const;
};

// Forward and backward have the batch norms as steps; evaluation folds them into their layers.
enum class Pass { kForward, kBackward, kEvaluation };

// Raises where the tensors do not fit together; nothing is written. Without a seed nothing is
// dropped. A backward pass takes neither biases nor running statistics.
Chain describe(const Mlp& mlp, const Tensor& input, const int64_t* seed, Pass pass);

// What is dropped decides what is kept, so a call is described with a seed before it has one.
inline constexpr int64_t kAnySeed[2] = {};

// Forward: where the batch norms are steps, the layers from one to the next run together.
void run(const Chain& chain);
// Writes the gradients, from that of the output on.
void run_backward(const Chain& chain, const void* grad_output, ChainGradients& gradients);

// The same with tensors for all that is written (chain_call.cpp), where the call draws the
// dropout's seed itself and keeps it in `saved`: output and `saved`, the output alone in
// evaluation, and the gradients. Behind what kernels and dropout keep, at a multiple of 8 bytes,
// `saved` ends in `more` elements for the caller. `chain` was described with kAnySeed.
std::tuple<Tensor, Tensor> run_and_draw(const Mlp& mlp, Chain& chain, const Tensor& input,
                                        int64_t more = 0);
Tensor evaluate(const Mlp& mlp, const Tensor& input);
// `output_mask` has flags of input, weights, biases, and weight and bias of every batch norm;
// without one, all parameters that there are get gradients.
StableIValue backward_of_drawn(const Mlp& mlp, Chain& chain, const Tensor& grad_output,
                               const Tensor& input, const std::optional<Tensor>& output,
                               const Tensor& saved, int64_t more,
                               const std::optional<std::vector<bool>>& output_mask);

}  // namespace fused_mlp
