// What the forward and the backward of a bfloat16 network share: it runs layer by layer in training
// and keeps what it needs in bfloat16.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/bfloat16/blocked.h"
#include "cpu/kernels/moments.h"

namespace fused_mlp::FUSED_MLP_ISA {

// One call. `saved` holds, in float32, mean[h] and rstd[h] of the batch norm; in training then, in
// bfloat16 and each from a whole float32 on, z[rows, h] and the output of each hidden layer.
// fused_mlp/on_chip.py counts its elements by the same rule.
struct PairNet {
  const ResearchNet& op;
  int hidden_layers;
  int64_t channels;  // of the batch norm
  int64_t out;       // features of the result
  int64_t widest;
  int64_t saved_numel;
  BFloat16* hidden[kMaxLayers];  // the output of each hidden layer, [rows, widths[l + 1]]
  BFloat16* z;                   // what the batch norm sees, [rows, channels]
  Affine<float> affine;          // of the batch norm
  Pair* room;                    // of a packed weight
  float* bias;                   // of a padded bias

  explicit PairNet(const ResearchNet& net)
      : op(net),
        hidden_layers(net.layers - 2),
        channels(net.widths[net.layers - 1]),
        out(net.widths[net.layers]),
        widest(0) {
    for (int l = 0; l <= net.layers; ++l) widest = larger(widest, net.widths[l]);
    int64_t offset = 2 * channels;
    const auto place = [&](int64_t width) {
      float* at = net.saved ? static_cast<float*>(net.saved) + offset : nullptr;
      offset += pairs_of(net.rows * width);
      return reinterpret_cast<BFloat16*>(at);
    };
    if (net.training) {
      z = place(channels);
      for (int l = 0; l < hidden_layers; ++l) hidden[l] = place(net.widths[l + 1]);
    }
    saved_numel = offset;
  }

  float* mean() const { return static_cast<float*>(op.saved); }
  float* rstd() const { return mean() + channels; }

  int64_t room_numel() const {
    int64_t numel = 0;
    for (int l = 0; pair_row_parts(op.rows).count > 1 && l < op.layers; ++l) {
      numel = larger(numel, packed_pairs_numel(op.widths[l], op.widths[l + 1]));
      numel = larger(numel, packed_pairs_numel(op.widths[l + 1], op.widths[l]));
    }
    return numel;
  }
  size_t bytes() const {
    return Arena::bytes<Pair>(room_numel()) + Arena::bytes<float>(round_up(widest, kPairPanel)) +
           3 * Arena::bytes<float>(round_up(channels, kPairPanel));
  }
  void take(Arena& arena) {
    const int64_t padded_channels = round_up(channels, kPairPanel);
    room = arena.take<Pair>(room_numel());
    bias = arena.take<float>(round_up(widest, kPairPanel));
    affine = {arena.take<float>(padded_channels), arena.take<float>(padded_channels),
              arena.take<float>(padded_channels)};
  }
  void set_affine(const float* mean, const float* rstd) {
    make_affine<float>(mean, rstd, op.bn_weight, op.bn_bias, channels,
                       round_up(channels, kPairPanel), affine);
  }

  // The weight of layer l as the right operand of input @ weight.T, or of grad @ weight.
  PairPanels weight(int l, bool transposed) {
    const int64_t in = op.widths[l], width = op.widths[l + 1];
    PairPanels panels(op.weights[l], in, transposed ? in : width, transposed ? width : in,
                      transposed);
    if (panels.packed_size(op.rows) > 0) panels.pack_all(room);
    return panels;
  }

  // The matrix that layer l < layers - 1 reads, and its leading dimension.
  const BFloat16* input(int l) const {
    return l == 0 ? static_cast<const BFloat16*>(op.input) : hidden[l - 1];
  }
  int64_t input_stride(int l) const { return l == 0 ? op.input_stride : op.widths[l]; }

  template <class Load, class Finish>
  void multiply_layer(int l, const Load& load, const Finish& finish) {
    const int64_t width = op.widths[l + 1];
    copy_channels<float>({const_cast<void*>(op.biases[l]), op.dtype}, width,
                         round_up(width, kPairPanel), 0.0f, bias);
    blocked_product(op.rows, weight(l, true), bias, load, finish);
  }

  // All hidden layers, then blocks of what the batch norm sees, rounded, to z and to see_z(row,
  // rows, column, columns, block, stride).
  template <class See>
  void run_hidden(const See& see_z) {
    for (int l = 0; l < hidden_layers; ++l) {
      const int64_t width = op.widths[l + 1];
      multiply_layer(l, load_pairs(input(l), input_stride(l)),
                     [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* block,
                         int64_t stride) {
                       store_relu_dropout(op.dropout[l], row, rows, column, columns, block, stride,
                                          hidden[l] + row * width + column, width);
                     });
    }
    const int last = op.layers - 2;
    multiply_layer(last, load_pairs(input(last), input_stride(last)),
                   [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* block,
                       int64_t stride) {
                     BFloat16* to = z + row * channels + column;
                     for_block(block, stride, rows, columns,
                               [&](Vec<float> sum, int64_t r, int64_t c, int width) {
                                 store_raw(block + r * stride + c, rounded(sum));
                                 store_sixteen(to + r * channels + c, sum, width);
                               });
                     see_z(row, rows, column, columns, block, stride);
                   });
  }

  // LeakyReLU of the normalized z: 16 elements of row r from column c on.
  FUSED_MLP_INLINE Vec<float> activated(int64_t r, int64_t c, int64_t count,
                                        Vec<float> slope) const {
    const Vec<float> value = load_sixteen(z + r * channels + c, count);
    const Vec<float> u = (value - load_raw(affine.mean + c)) * load_raw(affine.scale + c) +
                         load_raw(affine.shift + c);
    return leaky_relu<float>(u, slope);
  }
};

}  // namespace fused_mlp::FUSED_MLP_ISA
