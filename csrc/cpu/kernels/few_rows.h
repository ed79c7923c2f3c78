// A layer of a handful of rows: each weight is read once, in vectors of features, which are
// squares of the weight transposed in registers. Sums run in the order of panels.h.
#pragma once

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
  Vec<T> square[kWidth];
  int64_t k = 0;
  for (; k + kWidth <= in && features >= kVectors * kWidth; k += kWidth) {
    for (int v = 0; v < kVectors; ++v) {
      load_square_transposed(weight + v * kWidth * in + k, in, square);
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        for (int row = 0; row < kRows; ++row) z[v][row] += splat<T>(rows[row][k + j]) * square[j];
      }
    }
  }
  for (; k < in; k += kWidth) {
    const int64_t columns = smaller(kWidth, in - k);
    for (int v = 0; v < kVectors; ++v) {
      load_corner_transposed(weight + v * kWidth * in + k, in, features - v * kWidth,
                             static_cast<int>(columns), square);
      for (int64_t j = 0; j < columns; ++j) {
        for (int row = 0; row < kRows; ++row) z[v][row] += splat<T>(rows[row][k + j]) * square[j];
      }
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

}  // namespace fused_mlp::FUSED_MLP_ISA
