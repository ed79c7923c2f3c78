// What the forward and the backward of a network share that runs layer by layer.
#pragma once

#include "cpu/kernels/blocked_gemm.h"
#include "cpu/kernels/moments.h"
#include "cpu/kernels/network.h"

namespace fused_mlp::FUSED_MLP_ISA {

// One call: sizes, room for one layer's packed weight and bias, and where activations go.
template <class S>
struct Wide {
  using T = Compute<S>;
  const ResearchNet& op;
  Shape<T> shape;
  T* room;                // of a packed weight
  T* bias;                // of a padded bias
  T* hidden[kMaxLayers];  // the output of each hidden layer, [rows, widths[l + 1]]
  T* z;                   // what the batch norm sees, [rows, channels]
  Affine<T> affine;       // of the batch norm

  static constexpr int kArrays = 3;  // of `channels` elements: the affine's

  explicit Wide(const ResearchNet& net) : op(net), shape(net) {}

  int64_t widest() const {
    int64_t width = 0;
    for (int l = 0; l <= op.layers; ++l) width = larger(width, op.widths[l]);
    return width;
  }
  // Elements of the largest packed weight, in either direction.
  int64_t room_numel() const {
    int64_t numel = 0;
    for (int l = 0; gemm_row_parts(op.rows).count > 1 && l < op.layers; ++l) {
      numel = larger(numel, packed_numel<T>(op.widths[l], op.widths[l + 1]));
      numel = larger(numel, packed_numel<T>(op.widths[l + 1], op.widths[l]));
    }
    return numel;
  }
  size_t bytes() const {
    const int64_t channels = round_up(shape.channels, kPanel<T>);
    return Arena::bytes<T>(room_numel()) + Arena::bytes<T>(round_up(widest(), kPanel<T>)) +
           kArrays * Arena::bytes<T>(channels);
  }
  void take(Arena& arena) {
    const int64_t channels = round_up(shape.channels, kPanel<T>);
    room = arena.take<T>(room_numel());
    bias = arena.take<T>(round_up(widest(), kPanel<T>));
    affine.mean = arena.take<T>(channels);
    affine.scale = arena.take<T>(channels);
    affine.shift = arena.take<T>(channels);
  }
  void set_affine(const T* mean, const T* rstd) {
    make_affine<T>(mean, rstd, op.bn_weight, op.bn_bias, shape.channels,
                   round_up(shape.channels, kPanel<T>), affine);
  }

  // The weight of layer l as the right operand of input @ weight.T, or of grad @ weight.
  Panels<S> weight(int l, bool transposed) {
    const int64_t in = op.widths[l], out = op.widths[l + 1];
    Panels<S> panels(static_cast<const S*>(op.weights[l]), in, transposed ? in : out,
                     transposed ? out : in, transposed);
    if (panels.packed_size(op.rows) > 0) panels.pack_all(room);
    return panels;
  }

  // Calls product(load) with what reads the input of layer l.
  template <class Product>
  void with_input(int l, const Product& product) const {
    if (l == 0) {
      product(load_rows(static_cast<const S*>(op.input), op.input_stride));
    } else {
      product(load_rows(static_cast<const T*>(hidden[l - 1]), op.widths[l]));
    }
  }
  template <class Load, class Finish>
  void multiply_layer(int l, const Load& load, const Finish& finish) {
    const int64_t out = op.widths[l + 1];
    copy_channels<T>({const_cast<void*>(op.biases[l]), op.dtype}, out, round_up(out, kPanel<T>),
                     T(0), bias);
    blocked_gemm<S>(op.rows, weight(l, true), bias, load, finish);
  }

  // All hidden layers, then what the batch norm sees to finish_z.
  template <class Finish>
  void run_hidden(const Finish& finish_z) {
    for (int l = 0; l < shape.hidden; ++l) {
      const int64_t width = op.widths[l + 1];
      T* to = hidden[l];
      const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                              const T* block, int64_t stride) {
        finish_relu_dropout<T>(op.dropout[l], row, rows, column, columns, block, stride,
                               to + row * width + column, width);
      };
      with_input(l, [&](const auto& load) { multiply_layer(l, load, finish); });
    }
    const int last = op.layers - 2;
    with_input(last, [&](const auto& load) { multiply_layer(last, load, finish_z); });
  }

  // u of a vector of z, what LeakyReLU sees.
  FUSED_MLP_INLINE Vec<T> normalized(Vec<T> value, int64_t c) const {
    return (value - load_raw(affine.mean + c)) * load_raw(affine.scale + c) +
           load_raw(affine.shift + c);
  }

  // Reads blocks of the last layer's input: LeakyReLU of the normalized z.
  auto load_activated() const {
    const Vec<T> slope = splat(static_cast<T>(op.negative_slope));
    return [this, slope](int64_t row, int64_t rows, int64_t column, int64_t columns, T* to,
                         int64_t stride) {
      const T* from = z + row * shape.channels + column;
      for (int64_t r = 0; r < rows; ++r, from += shape.channels, to += stride) {
        for_vectors<T>(columns, [&](int64_t c, int width) {
          store_raw(to + c,
                    leaky_relu<T>(normalized(load_up_to(from + c, width), column + c), slope));
        });
      }
    };
  }
};

}  // namespace fused_mlp::FUSED_MLP_ISA
