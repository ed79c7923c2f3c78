// A network as the ops take it, and one call of it as the kernels take it.
#pragma once

#include <tuple>

#include "cpu/tensors.h"

namespace fused_mlp {

// What stays the same from call to call.
struct Network {
  std::vector<Tensor> weights, biases;
  std::optional<Tensor> bn_weight, bn_bias;
  std::optional<Tensor> running_mean, running_var, num_batches_tracked;
  bool training = false;
  std::vector<double> dropout_p;
  double momentum = 0, eps = 0, negative_slope = 0;

  bool drops() const;
};

// One call: what the kernels read. Sizes, dtypes and addresses are read and checked here, at every
// call, since a tensor's owner may change them.
struct Call : Copies {
  ResearchNet net{};
  ScalarType dtype, accumulate;
};

// Raise where the tensors do not fit together; nothing is written. Without a seed nothing is
// dropped. `describe_weights` leaves biases and the batch norm's weight and bias to its caller.
Call describe_weights(const Network& network, const Tensor& input);
Call describe_forward(const Network& network, const Tensor& input);
Call describe_backward(const Network& network, const Tensor& input);

// Two numbers that decide the dropout masks; they must outlive the call.
void set_seed(const Network& network, const int64_t* seed, Call& call);

// A new output of the call.
Tensor new_output(Call& call);

// The gradients that `output_mask` asks for, of input, weights…, biases…, bn_weight, bn_bias.
// `saved` must have `saved_numel` elements.
StableIValue backward(const Network& network, Call& call, const Tensor& grad_output,
                      const Tensor& saved, int64_t saved_numel,
                      const std::vector<bool>& output_mask);

// The same in one, where the call draws the dropout's seed itself and keeps it in `saved`: output
// and `saved`, the output alone in evaluation, and the gradients. Behind what kernels and dropout
// keep, `saved` ends in `more` elements for the caller, zero at first.
std::tuple<Tensor, Tensor> run_and_draw(const Network& network, const Tensor& input,
                                        int64_t more = 0);
Tensor evaluate(const Network& network, const Tensor& input);
StableIValue backward_of_drawn(const Network& network, Call& call, const Tensor& grad_output,
                               const Tensor& saved, int64_t more,
                               const std::vector<bool>& output_mask);

}  // namespace fused_mlp
