// The operands of a backward that runs layer by layer.
#pragma once

#include "cpu/kernels/moments.h"
#include "cpu/kernels/network.h"
#include "cpu/kernels/products.h"

namespace fused_mlp::FUSED_MLP_ISA {

// One call: sizes, room for one layer's packed weight, and where activations lie.
template <class T>
struct Wide {
  const ResearchNet& op;
  Shape<T> shape;
  T* room;                // of a packed weight
  T* hidden[kMaxLayers];  // the output of each hidden layer, [rows, widths[l + 1]]
  T* z;                   // what the batch norm sees, [rows, channels]
  Affine<T> affine;       // of the batch norm

  static constexpr int kArrays = 3;  // of `channels` elements: the affine's

  explicit Wide(const ResearchNet& net) : op(net), shape(net) {}

  // Elements of the largest packed weight.
  int64_t room_numel() const {
    int64_t numel = 0;
    for (int l = 0; l < op.layers; ++l) numel = larger(numel, packed_size(panels(l), op.rows));
    return numel;
  }
  size_t bytes() const {
    const int64_t channels = round_up(shape.channels, kPanel<T>);
    return Arena::bytes<T>(room_numel()) + kArrays * Arena::bytes<T>(channels);
  }
  void take(Arena& arena) {
    const int64_t channels = round_up(shape.channels, kPanel<T>);
    room = arena.take<T>(room_numel());
    affine.mean = arena.take<T>(channels);
    affine.scale = arena.take<T>(channels);
    affine.shift = arena.take<T>(channels);
  }
  void set_affine(const T* mean, const T* rstd) {
    make_affine<T>(mean, rstd, op.bn_weight, op.bn_bias, shape.channels,
                   round_up(shape.channels, kPanel<T>), affine);
  }

  // The weight of layer l as the right operand of grad @ weight.
  Panels<T> weight(int l) const {
    Panels<T> packed = panels(l);
    if (packed_size(packed, op.rows) > 0) packed.pack_all(room);
    return packed;
  }

  // Calls product(load) with what reads the input of layer l.
  template <class Product>
  void with_input(int l, const Product& product) const {
    if (l == 0) {
      product(LoadRows<T>{static_cast<const T*>(op.input), op.input_stride});
    } else {
      product(LoadRows<T>{hidden[l - 1], op.widths[l]});
    }
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

 private:
  Panels<T> panels(int l) const {
    const int64_t in = op.widths[l], out = op.widths[l + 1];
    return Panels<T>(static_cast<const T*>(op.weights[l]), in, out, in);
  }
};

}  // namespace fused_mlp::FUSED_MLP_ISA
