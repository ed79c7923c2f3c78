// A chain of Linear layers as the ops take it, and one call of it as the kernels take it.
#pragma once

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

// Raise where the tensors do not fit together; nothing is written. Without a seed nothing is
// dropped. In `evaluated` the batch norms are folded into their layers, else they are steps.
Chain describe(const Mlp& mlp, const Tensor& input, const int64_t* seed, bool evaluated);

// Forward: where the batch norms are steps, the layers from one to the next run together.
void run(const Chain& chain);
// Writes the gradients, from that of the output on.
void run_backward(const Chain& chain, const void* grad_output, ChainGradients& gradients);

}  // namespace fused_mlp
