// The steps of a chain, one behind the other, and their gradients from the last to the first.

#include <algorithm>

#include "cpu/chain.h"
#include "cpu/parallel.h"

namespace fused_mlp {
namespace {

// A dropout's pass of its own, in place or not.
void drop(const NormStep& norm, const void* from, void* to) {
  if (!norm.dropout.active()) return;
  ActDropoutPass pass{};
  pass.dtype = norm.op.dtype;
  pass.rows = norm.op.batches;
  pass.columns = norm.op.channels;
  pass.act.dropout = norm.dropout;
  pass.input = from;
  pass.output = to;
  kernels().act_dropout(pass);
}

}  // namespace

// The layers from one batch norm to the next run together.
void run(const Chain& chain) {
  size_t begin = 0;
  const auto run_to = [&](size_t end) {
    if (begin < end) kernels().mlp(chain.layers.data() + begin, static_cast<int>(end - begin));
    begin = end;
  };
  for (const NormStep& norm : chain.norms) {
    run_to(norm.layer + 1);
    kernels().batch_norm_act(norm.op);
    drop(norm, norm.op.output, norm.op.output);
  }
  run_to(chain.layers.size());
}

ChainGradients::ChainGradients(const Chain& chain)
    : layers(chain.layers.size()), norms(chain.norms.size()) {
  for (size_t l = 0; l < layers.size(); ++l) {
    LinearActBackward& op = layers[l];
    op.forward = chain.layers[l];
    op.kept = kept(op.forward.act) == Kept::kInput    ? op.forward.seen
              : kept(op.forward.act) == Kept::kOutput ? op.forward.output
                                                      : nullptr;
  }
  for (size_t k = 0; k < norms.size(); ++k) norms[k].forward = chain.norms[k].op;
}

size_t ChainGradients::first(const Chain& chain) const {
  if (layers.front().grad_input) return 0;
  size_t step = 2 * layers.size();
  for (size_t l = layers.size(); l-- > 0;) {
    if (layers[l].grad_weight || layers[l].grad_bias) step = 2 * l;
  }
  for (size_t k = 0; k < norms.size(); ++k) {
    const bool wanted = norms[k].grad_weight.data || norms[k].grad_bias.data;
    if (wanted) step = std::min(step, 2 * chain.norms[k].layer + 1);
  }
  return step;
}

// `current` holds what came last, once something did.
void run_backward(const Chain& chain, const void* grad_output, ChainGradients& gradients) {
  const size_t first = gradients.first(chain);
  int64_t widest = 0;
  for (const LinearAct& layer : chain.layers) widest = std::max(widest, layer.out_features);
  const int64_t bytes =
      chain.norms.empty() ? 0 : chain.layers.front().rows * widest * size_of(chain.dtype);
  Temporary<char> current(bytes), next(bytes);
  const void* above = grad_output;
  size_t end = chain.layers.size();
  for (size_t k = chain.norms.size() + 1; k-- > 0;) {
    // Layers behind batch norm k - 1, and before that of k, whose own layer is the last of them.
    const size_t norm_layer = k > 0 ? chain.norms[k - 1].layer : 0,
                 behind = k > 0 ? norm_layer + 1 : 0;
    const size_t begin = std::max(behind, (first + 1) / 2);
    const bool norm_wanted = k > 0 && first <= 2 * norm_layer + 1;
    if (begin < end) {
      LinearActBackward* layers = gradients.layers.data();
      layers[end - 1].grad_output = above;
      if (norm_wanted) layers[begin].grad_input = next.data();
      kernels().mlp_backward(layers + begin, static_cast<int>(end - begin));
      if (norm_wanted) above = next.data();
      current.swap(next);
    }
    if (!norm_wanted) return;
    const NormStep& norm = chain.norms[k - 1];
    BatchNormActBackward& op = gradients.norms[k - 1];
    if (norm.dropout.active()) {
      drop(norm, above, current.data());
      above = current.data();
    }
    op.grad_output = above;
    op.grad_input = first <= 2 * norm_layer ? next.data() : nullptr;
    kernels().batch_norm_act_backward(op);
    above = next.data();
    current.swap(next);
    end = behind;
  }
}

}  // namespace fused_mlp
