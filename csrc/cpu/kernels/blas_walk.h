// Rows of a wide network layer by layer, by torch's BLAS: each product reads a weight whole, so
// rows need not walk together as panels.
#pragma once

#include "cpu/kernels/network.h"
#include "cpu/kernels/products.h"

namespace fused_mlp::FUSED_MLP_ISA {

// From how many rows on, and how many of them at a time. (1024,[1024,1024],1024) takes 7.1 ms at
// 256 rows and 5.7 as panels, at 1024 23.6 and 26.5.
constexpr int64_t kBlasWalk = 512, kBlasRows = 1024;

// The members are PanelWalk's.
template <class T>
struct BlasWalk {
  const ResearchNet& op;
  const T* const* biases;
  T* const* kept;
  const Affine<T>& affine;
  int64_t widest;

  // As PanelWalk::run.
  void run(int first_layer, int last_layer) const {
    const int64_t room = smaller(kBlasRows, op.rows) * widest;
    Temporary<T> before(room), after(room);
    for (int64_t row = 0; row < op.rows; row += kBlasRows) {
      const int64_t rows = smaller(kBlasRows, op.rows - row);
      const T* input = static_cast<const T*>(op.input) + row * op.input_stride;
      int64_t stride = op.input_stride;
      if (first_layer > 0) {
        stride = op.widths[first_layer];
        activate(row, rows, stride, before.data());
        input = before.data();
      }
      for (int l = first_layer; l < last_layer; ++l) {
        const int64_t width = op.widths[l + 1];
        T* output = l == op.layers - 1 ? static_cast<T*>(op.output) : kept[l];
        output = output ? output + row * width : after.data();
        layer(l).run(row, rows, input, stride, nullptr, output);
        input = output;
        stride = width;
        before.swap(after);
      }
    }
  }

 private:
  BlasLayer<T> layer(int l) const {
    const int64_t in = op.widths[l];
    BlasLayer<T> layer = {
        in, op.widths[l + 1], static_cast<const T*>(op.weights[l]), in, biases[l], nullptr, {}};
    if (l < op.layers - 2) {
      layer.act = {Activation::kReLU, 0, op.dropout[l]};
    } else if (l == op.layers - 2 && kept[l] == nullptr) {
      layer.norm = &affine;
      layer.act = leaky_relu();
    }
    return layer;
  }
  ActDropout leaky_relu() const { return {Activation::kLeakyReLU, op.negative_slope, {}}; }

  // What the last layer reads.
  void activate(int64_t row, int64_t rows, int64_t width, T* to) const {
    const T* z = kept[op.layers - 2] + row * width;
    for_row_blocks(rows, width * kPassCost, [&](int64_t first, int64_t some) {
      finish_act<T>(&affine, leaky_relu(), row + first, some, 0, width, z + first * width, width,
                    to + first * width, width, nullptr);
    });
  }
};

}  // namespace fused_mlp::FUSED_MLP_ISA
