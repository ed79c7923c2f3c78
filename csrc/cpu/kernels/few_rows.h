// A layer of a handful of rows: each weight is read once, in vectors of features, which are
// squares of the weight transposed in registers. Sums run in the order of panels.h.
#pragma once

#include <algorithm>

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/transpose.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Up to this many rows are not worth a panel, which costs what a whole vector of rows does.
constexpr int64_t kFewRows = 4;

// z[v][row] += weight @ row for kVectors vectors of features, of which `features` exist.
template <class S, int kRows, int kVectors>
FUSED_MLP_INLINE void add_few_rows(const S* weight, int64_t in, int64_t features,
                                   const Compute<S>* const (&rows)[kRows],
                                   Vec<Compute<S>> (&z)[kVectors][kRows]) {
  using T = Compute<S>;
  constexpr int64_t kWidth = kLanes<T>;
  static_assert(kTerms % kWidth == 0);
  for (int64_t k = 0; k < in;) {
    const int64_t end = smaller(in, k + kTerms);
    Vec<T> square[kWidth], sum[kVectors][kRows] = {};
    for (; k + kWidth <= end && features >= kVectors * kWidth; k += kWidth) {
      for (int v = 0; v < kVectors; ++v) {
        load_square_transposed(weight + v * kWidth * in + k, in, square);
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) {
          for (int row = 0; row < kRows; ++row) {
            sum[v][row] += splat<T>(rows[row][k + j]) * square[j];
          }
        }
      }
    }
    for (; k < end; k += kWidth) {
      const int64_t columns = smaller(kWidth, end - k);
      for (int v = 0; v < kVectors; ++v) {
        load_corner_transposed(weight + v * kWidth * in + k, in, features - v * kWidth,
                               static_cast<int>(columns), square);
        for (int64_t j = 0; j < columns; ++j) {
          for (int row = 0; row < kRows; ++row) {
            sum[v][row] += splat<T>(rows[row][k + j]) * square[j];
          }
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int row = 0; row < kRows; ++row) z[v][row] += sum[v][row];
    }
  }
}

// Layers of up to kRows rows: finish(row, feature, width, z) takes a vector of a row's sums.
template <class S, int kRows, class Finish>
void few_rows_layer(const S* weight, const Compute<S>* bias, int64_t in, int64_t features,
                    int64_t count, const Compute<S>* before, int64_t stride, const Finish& finish) {
  using T = Compute<S>;
  constexpr int64_t kWidth = kLanes<T>;
  const T* rows[kRows];
  for (int row = 0; row < kRows; ++row) rows[row] = before + smaller(row, count - 1) * stride;
  const auto run = [&](int64_t f, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec<T> z[kVectors][kRows];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = f + v * kWidth;
      const Vec<T> start =
          load_up_to(bias + first, static_cast<int>(smaller(kWidth, features - first)));
      for (int row = 0; row < kRows; ++row) z[v][row] = start;
    }
    add_few_rows<S, kRows, kVectors>(weight + f * in, in, features - f, rows, z);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = f + v * kWidth;
      const int width = static_cast<int>(smaller(kWidth, features - first));
      for (int row = 0; row < smaller(kRows, count); ++row) finish(row, first, width, z[v][row]);
    }
  };
  // Two vectors, since one sum waits for itself; the lines of more would share cache sets.
  constexpr int kMany = kRows <= 2 ? 2 : 1;
  int64_t f = 0;
  for (; f + kMany * kWidth <= features; f += kMany * kWidth) {
    run(f, std::integral_constant<int, kMany>{});
  }
  for (; f < features; f += kWidth) run(f, std::integral_constant<int, 1>{});
}

// Adds kOutputs neighbouring outputs' shares to the gradients of the input, in `sums`, and writes
// the gradients of their weights.
template <class T, int kRows, int kOutputs>
FUSED_MLP_INLINE void add_outputs(const T* weight, T* grad_weight, int64_t in, const T* grad,
                                  int64_t grad_stride, const T* input, T* sums, int64_t stride) {
  Vec<T> g[kRows][kOutputs];
  for (int row = 0; row < kRows; ++row) {
    for (int o = 0; o < kOutputs; ++o) g[row][o] = splat<T>(grad[row * grad_stride + o]);
  }
  for_vectors<T>(in, [&](int64_t column, int width) {
    Vec<T> x[kRows];
    for (int row = 0; row < kRows; ++row) x[row] = load_raw(input + row * stride + column);
    if (sums) {
      for (int row = 0; row < kRows; ++row) {
        Vec<T> sum = load_raw(sums + row * stride + column);
        for (int o = 0; o < kOutputs; ++o) {
          sum += g[row][o] * load_up_to(weight + o * in + column, width);
        }
        store_raw(sums + row * stride + column, sum);
      }
    }
    if (grad_weight == nullptr) return;
    for (int o = 0; o < kOutputs; ++o) {
      Vec<T> product = g[0][o] * x[0];
      for (int row = 1; row < kRows; ++row) product += g[row][o] * x[row];
      store_up_to(grad_weight + o * in + column, product, width);
    }
  });
}

// The gradients of a layer's input and of some outputs' weights for kRows rows: each weight is read
// once and each of its gradients written once. `input` and `sums`, these outputs' share of the
// gradient of the input, are blocks of rows of `stride`; `sums` and grad_weight may be null.
template <class T, int kRows>
void few_rows_gradients(const T* weight, T* grad_weight, int64_t in, int64_t outputs, const T* grad,
                        int64_t grad_stride, const T* input, T* sums, int64_t stride) {
  if (sums) std::fill_n(sums, kRows * stride, T{0});
  const auto add = [&](int64_t o, auto count) {
    add_outputs<T, kRows, decltype(count)::value>(weight + o * in,
                                                  grad_weight ? grad_weight + o * in : nullptr, in,
                                                  grad + o, grad_stride, input, sums, stride);
  };
  // Four rows of the weight side by side: 1024 x 1024 column by column took twice as long.
  int64_t o = 0;
  for (; o + 4 <= outputs; o += 4) add(o, std::integral_constant<int, 4>{});
  for (; o < outputs; ++o) add(o, std::integral_constant<int, 1>{});
}

}  // namespace fused_mlp::FUSED_MLP_ISA
