// The parts of a whole network that its forward and backward share: sizes, packed weights, and the
// walk of a block of rows through the hidden layers.
#pragma once

#include <cstring>

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/chunks.h"
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Up to this many input columns the first layer is computed again in backward and only its mask is
// kept: 10 columns cost a tenth of what reading back 64 activations does. fused_mlp/on_chip.py
// counts the elements of `saved` by the same rule.
constexpr int64_t kRecomputeWidth = 32;

// In training a network of that many multiply-adds a row and up to that many rows runs layer by
// layer too: threads then share the features where rows are few, weights' gradients are merged
// nowhere, and activations still lie in the cache. (128,[256,256],10) takes 0.54 of the time at 32
// rows, 0.89 at 64, 1.02 at 256 and 1.06 at 1024 on two threads, and is the only one that keeps
// more than four busy up to there; (64,[128,128],10), 26 thousand, gains nothing.
constexpr int64_t kLayeredRows = 1024;
constexpr int64_t kLayeredWork = 32768;

// Sizes of a network and where its pieces lie in `saved` (elements of T):
//   mean[h], rstd[h], and in training: z[rows, h], then for each hidden layer its output, or the
//   bits of its dropout mask if it is the first layer of a narrow input, or nothing. A network
//   that runs layer by layer keeps all outputs.
template <class T>
struct Shape {
  const ResearchNet& op;
  int hidden;        // Linear+ReLU+Dropout layers
  int64_t channels;  // of the batch norm
  int64_t out;       // features of the result
  int64_t work;      // multiply-adds of a row, forward
  int64_t widest;    // padded
  bool wide;         // runs layer by layer
  int64_t saved_numel;
  int64_t offsets[kMaxLayers];

  explicit Shape(const ResearchNet& net)
      : op(net),
        hidden(net.layers - 2),
        channels(net.widths[net.layers - 1]),
        out(net.widths[net.layers]),
        work(0),
        widest(0),
        wide(false) {
    for (int l = 0; l <= net.layers && is_single_or_double(net.dtype); ++l) {
      wide = wide || net.widths[l] > kCacheWidth;
    }
    int64_t offset = 2 * channels + net.rows * channels;
    for (int layer = 0; layer < net.layers; ++layer) {
      work += net.widths[layer] * net.widths[layer + 1];
      widest = larger(widest, padded<T>(net.widths[layer + 1]));
      if (layer >= hidden) continue;
      offsets[layer] = offset;
      const int64_t width = net.widths[layer + 1];
      if (!recomputed(layer)) {
        offset += net.rows * width;
      } else if (net.dropout[layer].active()) {
        offset += ceil_div(net.rows * mask_bytes(width), static_cast<int64_t>(sizeof(T)));
      }
    }
    widest = larger(widest, padded<T>(net.widths[0]));
    // Nothing is computed again behind so wide an input, so `saved` is the same either way.
    wide = wide || (net.training && is_single_or_double(net.dtype) && net.rows <= kLayeredRows &&
                    work >= kLayeredWork && net.widths[0] > kRecomputeWidth);
    saved_numel = net.training ? offset : 2 * channels;
  }

  bool recomputed(int layer) const {
    return !op.training || (layer == 0 && op.widths[0] <= kRecomputeWidth && !wide);
  }
  T* mean() const { return static_cast<T*>(op.saved); }
  T* rstd() const { return mean() + channels; }
  T* z(int64_t row) const { return mean() + 2 * channels + row * channels; }
  T* activation(int layer, int64_t row) const {
    return mean() + offsets[layer] + row * op.widths[layer + 1];
  }
  uint8_t* mask(int layer, int64_t row) const {
    return reinterpret_cast<uint8_t*>(mean() + offsets[layer]) +
           row * mask_bytes(op.widths[layer + 1]);
  }

  // Clears what lies between the first layer's mask and the next element, so that equal calls keep
  // equal bytes.
  void end_mask() const {
    if (hidden == 0 || !op.training || !recomputed(0) || !op.dropout[0].active()) return;
    const int64_t bytes = op.rows * mask_bytes(op.widths[1]);
    std::memset(mask(0, op.rows), 0,
                static_cast<size_t>(round_up(bytes, static_cast<int64_t>(sizeof(T))) - bytes));
  }
};

// The weights of input @ weight.T for every layer, packed, and the biases, padded.
template <class T>
struct Forward {
  const T* weights[kMaxLayers];
  const T* biases[kMaxLayers];

  static size_t bytes(const ResearchNet& op) {
    size_t total = 0;
    for (int l = 0; l < op.layers; ++l) {
      total += Arena::bytes<T>(packed_numel<T>(op.widths[l], op.widths[l + 1]));
      total += Arena::bytes<T>(round_up(op.widths[l + 1], kPanel<T>));
    }
    return total;
  }

  // Layers first … last - 1; `folded`, if given, goes into layer layers - 2 (see research_net.cpp).
  template <class S>
  void pack(const ResearchNet& op, int first, int last, const Affine<T>* folded, Arena& arena) {
    for (int l = first; l < last; ++l) {
      const int64_t in = op.widths[l], out = op.widths[l + 1];
      T* weight = arena.take<T>(packed_numel<T>(in, out));
      T* bias = arena.take<T>(round_up(out, kPanel<T>));
      const Affine<T>* affine = l == op.layers - 2 ? folded : nullptr;
      pack_transposed<T>(static_cast<const S*>(op.weights[l]), in, in, out,
                         affine ? affine->scale : nullptr, weight);
      copy_channels<T>({const_cast<void*>(op.biases[l]), op.dtype}, out, round_up(out, kPanel<T>),
                       T(0), bias);
      for (int64_t c = 0; affine && c < out; ++c) {
        bias[c] = (bias[c] - affine->mean[c]) * affine->scale[c] + affine->shift[c];
      }
      weights[l] = weight;
      biases[l] = bias;
    }
  }

  void multiply_layer(const ResearchNet& op, int l, int64_t rows, Left<T> left, T* to,
                      int64_t stride, bool rectify, Ahead ahead = {}) const {
    multiply<T>(rows, op.widths[l + 1], op.widths[l], left, packed(weights[l], op.widths[l]), to,
                stride, Start::kBias, biases[l], rectify, Operands::kNear, ahead);
  }
};

// The block of rows behind `at`.
template <class S>
FUSED_MLP_INLINE Ahead rows_ahead(const void* matrix, int64_t stride, const RowBlock& at) {
  return Ahead::of(static_cast<const S*>(matrix) + at.end() * stride, at.next * stride);
}

// The blocks a task works in: the input and the output of every hidden layer.
template <class S>
struct Block {
  using T = Compute<S>;
  T* input;
  T* hidden[kMaxLayers];
  uint8_t* mask;

  static size_t bytes(const ResearchNet& op, int64_t rows) {
    size_t total = Arena::bytes<T>(rows * padded<T>(op.widths[0]));
    int64_t widest = 0;
    for (int l = 0; l < op.layers - 2; ++l) {
      total += Arena::bytes<T>(rows * padded<T>(op.widths[l + 1]));
      widest = larger(widest, op.widths[l + 1]);
    }
    return total + Arena::bytes<uint8_t>(rows * mask_bytes(widest) + 64);
  }

  Block(const ResearchNet& op, int64_t rows, Arena& arena) {
    input = arena.take<T>(rows * padded<T>(op.widths[0]));
    int64_t widest = 0;
    for (int l = 0; l < op.layers - 2; ++l) {
      hidden[l] = arena.take<T>(rows * padded<T>(op.widths[l + 1]));
      widest = larger(widest, op.widths[l + 1]);
    }
    mask = arena.take<uint8_t>(rows * mask_bytes(widest) + 64);
  }

  // The rows of the input as a left operand, copied only if they must be converted.
  Left<T> input_rows(const ResearchNet& op, int64_t first, int64_t rows) {
    const S* from = static_cast<const S*>(op.input) + first * op.input_stride;
    if constexpr (std::is_same_v<S, T>) {
      return {from, op.input_stride, 1};
    } else {
      return copied_input(op, first, rows);
    }
  }
  Left<T> copied_input(const ResearchNet& op, int64_t first, int64_t rows) {
    copy_in(static_cast<const S*>(op.input) + first * op.input_stride, op.input_stride, rows,
            op.widths[0], input, padded<T>(op.widths[0]));
    return {input, padded<T>(op.widths[0]), 1};
  }

  // What layer l reads.
  Left<T> before(const ResearchNet& op, int l, Left<T> first) const {
    return l == 0 ? first : Left<T>{hidden[l - 1], padded<T>(op.widths[l]), 1};
  }
};

// The whole network with constant statistics (research_net_evaluate.cpp).
template <class S>
void evaluate(const ResearchNet& op);

// Layers wider than the cache holds: research_net_wide.cpp, research_net_wide_backward.cpp.
void research_net_wide_train(const ResearchNet& op);
void research_net_wide_backward(const ResearchNetBackward& op);

}  // namespace fused_mlp::FUSED_MLP_ISA
