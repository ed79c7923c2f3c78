// The gradients of a chain of Linear layers: a block of rows walks down through all layers while it
// lies in the cache, or one layer runs after the other (linear_act.cpp, linear_act_wide.cpp).

#include <vector>

#include "cpu/kernels/activation.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/linear_act.h"
#include "cpu/kernels/mlp.h"
#include "cpu/kernels/weight_grad.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class T>
void walk(const LinearActBackward* chain, int layers, const ChainSize& size) {
  const int64_t rows = size.rows, chunks = product_chunk_count(rows, 2 * size.work);
  std::vector<WeightGrad<T>> grads;
  grads.reserve(static_cast<size_t>(layers));
  int64_t offsets[kMaxLayers + 1] = {0};
  size_t bytes = 0;
  for (int l = 0; l < layers; ++l) {
    const LinearAct& layer = chain[l].forward;
    grads.emplace_back(layer.in_features, layer.out_features, chain[l].grad_weight != nullptr);
    offsets[l + 1] = offsets[l] + grads.back().numel();
    bytes += Arena::bytes<T>(packed_numel<T>(layer.out_features, layer.in_features));
  }
  Arena shared(Scratch::kCall, bytes + Arena::bytes<T>(chunks * offsets[layers]));
  T* partial = shared.take<T>(chunks * offsets[layers]);
  const T* weights[kMaxLayers];
  for (int l = 0; l < layers; ++l) {
    const LinearAct& layer = chain[l].forward;
    T* weight = shared.take<T>(packed_numel<T>(layer.out_features, layer.in_features));
    if (l > 0 || chain[l].grad_input) {
      pack<T>(static_cast<const T*>(layer.weight), layer.weight_stride, layer.out_features,
              layer.in_features, weight);
    }
    weights[l] = weight;
  }
  // Partial sums of layer l: chunks of grads[l].numel() elements, one behind the other.
  const auto partial_of = [&](int l, int64_t chunk) {
    return partial + chunks * offsets[l] + chunk * grads[static_cast<size_t>(l)].numel();
  };
  const int64_t stride = padded<T>(size.widest);
  for_chunks(rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    const int64_t most = smaller(kBlockRows, end - begin);
    Arena own(Scratch::kTask, 3 * Arena::bytes<T>(most * stride) +
                                  Arena::bytes<uint8_t>(mask_room(most, size.widest)));
    T *grad = own.take<T>(most * stride), *next = own.take<T>(most * stride);
    T* input = own.take<T>(most * stride);
    uint8_t* mask = own.take<uint8_t>(mask_room(most, size.widest));
    for (int l = 0; l < layers; ++l) {
      grads[static_cast<size_t>(l)].clear(partial_of(l, chunk), begin < end);
    }
    for_blocks(begin, end, [&](const RowBlock& at) {
      for (int l = layers - 1; l >= 0; --l) {
        const LinearActBackward& op = chain[l];
        const LinearAct& layer = op.forward;
        const int64_t in = layer.in_features, out = layer.out_features;
        const bool last = l == layers - 1;
        const T* above = last ? rows_from<T>(op.grad_output, at.first, out) : grad;
        gate<T>(layer.act, at.first, at.rows, out, above, last ? out : padded<T>(out),
                rows_from<T>(op.kept, at.first, out), grad, padded<T>(out), mask);
        const WeightGrad<T>& sums = grads[static_cast<size_t>(l)];
        sums.add_bias(at.rows, grad, padded<T>(out), partial_of(l, chunk));
        if (op.grad_weight) {
          const T* before = static_cast<const T*>(layer.input) + at.first * layer.input_stride;
          int64_t row = layer.input_stride;
          if (sums.pads_input()) {
            copy_in(before, row, at.rows, in, input, padded<T>(in));
            before = input;
            row = padded<T>(in);
          }
          sums.add_weight(at.begins, at.rows, grad, padded<T>(out), before, row,
                          partial_of(l, chunk));
        }
        if (l == 0 && op.grad_input == nullptr) break;
        multiply<T>(at.rows, in, out, {grad, padded<T>(out), 1}, packed(weights[l], out), next,
                    padded<T>(in), Start::kZero);
        std::swap(grad, next);
      }
      if (chain[0].grad_input) {
        const int64_t in = chain[0].forward.in_features;
        copy_out(grad, padded<T>(in), at.rows, in,
                 static_cast<T*>(chain[0].grad_input) + at.first * in, in);
      }
    });
  });
  for (int l = 0; l < layers; ++l) {
    grads[static_cast<size_t>(l)].template merge<T>(partial_of(l, 0), chunks,
                                                    static_cast<T*>(chain[l].grad_weight),
                                                    static_cast<T*>(chain[l].grad_bias));
  }
}

template <class T>
void run_layers(const LinearActBackward* chain, int layers, const ChainSize& size) {
  const int64_t room = layers > 1 ? size.rows * size.widest : 0;
  Temporary<T> grad(room), next(room);
  const void* above = chain[layers - 1].grad_output;
  for (int l = layers - 1; l >= 0; --l) {
    LinearActBackward layer = chain[l];
    layer.grad_output = above;
    if (l > 0) layer.grad_input = grad.data();
    size.shares_features() ? linear_act_wide_backward(layer) : linear_act_backward(layer);
    above = layer.grad_input;
    grad.swap(next);
  }
}

}  // namespace

void walk_chain_backward(const LinearActBackward* chain, int layers) {
  const ChainSize size(chain, layers);
  dispatch_single_or_double(chain[0].forward.dtype,
                            [&](auto element) { walk<decltype(element)>(chain, layers, size); });
}

void mlp_backward(const LinearActBackward* chain, int layers) {
  const ChainSize size(chain, layers);
  if (size.walks() && !size.shares_features()) return walk_chain_backward(chain, layers);
  dispatch_single_or_double(chain[0].forward.dtype, [&](auto element) {
    run_layers<decltype(element)>(chain, layers, size);
  });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
