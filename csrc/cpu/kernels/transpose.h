// Transposing a square of vectors in registers, and matrices by such squares.
#pragma once

#include <utility>

#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Interleaves the lower (or upper) halves of a and b, lane by lane.
template <bool kUpper, class T, int... kLane>
FUSED_MLP_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  constexpr int kFrom = kUpper ? kLanes<T> / 2 : 0;
  const Vec<Bits<T>> order = {(kFrom + kLane / 2 + (kLane % 2) * kLanes<T>)...};
  return __builtin_shuffle(a, b, order);
}

// Transposes a square of kLanes vectors: log2(kLanes) rounds of interleaving rows half a square
// apart.
template <class T>
FUSED_MLP_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
    for (int i = 0; i < kLanes<T> / 2; ++i) {
      next[2 * i] = interleave<false, T>(rows[i], rows[i + kLanes<T> / 2], Lanes{});
      next[2 * i + 1] = interleave<true, T>(rows[i], rows[i + kLanes<T> / 2], Lanes{});
    }
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

// square[j][i] = from[i * stride + j], i < rows, j < columns; zeros elsewhere.
template <class S>
FUSED_MLP_INLINE void load_corner_transposed(const S* from, int64_t stride, int64_t rows,
                                             int columns,
                                             Vec<Compute<S>> (&square)[kLanes<Compute<S>>]) {
  using T = Compute<S>;
  for (int i = 0; i < kLanes<T>; ++i) {
    square[i] = i < rows ? load_up_to(from + i * stride, columns) : Vec<T>{};
  }
  transpose<T>(square);
}

#if defined(__AVX512F__)
// Interleaves two neighbouring lanes of each quarter of a and b from kFrom on. Not by
// _mm512_unpacklo_ps and its kin: gcc 12 warns of the undefined value in their definition.
template <int kFrom>
FUSED_MLP_INLINE Vec<double> pairs(Vec<float> a, Vec<float> b) {
  const Vec<Bits<float>> order = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  return (Vec<double>)__builtin_shuffle(a, b, order + kFrom);
}
#endif

// The same of a whole square.
template <class S>
FUSED_MLP_INLINE void load_square_transposed(const S* from, int64_t stride,
                                             Vec<Compute<S>> (&square)[kLanes<Compute<S>>]) {
#if defined(__AVX512F__)
  // Loads of quarters put together what needs no shuffle across quarters then: half as many.
  if constexpr (std::is_same_v<S, float>) {
    for (int j = 0; j < 16; j += 4) {
      __m512 r[4];
      for (int i = 0; i < 4; ++i) {
        const float* p = from + i * stride + j;
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
        v = _mm512_mask_broadcast_f32x4(v, 0x00F0, _mm_loadu_ps(p + 4 * stride));
        v = _mm512_mask_broadcast_f32x4(v, 0x0F00, _mm_loadu_ps(p + 8 * stride));
        r[i] = _mm512_mask_broadcast_f32x4(v, 0xF000, _mm_loadu_ps(p + 12 * stride));
      }
      const Vec<double> low01 = pairs<0>((Vec<float>)r[0], (Vec<float>)r[1]);
      const Vec<double> high01 = pairs<2>((Vec<float>)r[0], (Vec<float>)r[1]);
      const Vec<double> low23 = pairs<0>((Vec<float>)r[2], (Vec<float>)r[3]);
      const Vec<double> high23 = pairs<2>((Vec<float>)r[2], (Vec<float>)r[3]);
      const Vec<Bits<double>> low = {0, 8, 2, 10, 4, 12, 6, 14}, high = low + 1;
      square[j] = (Vec<float>)__builtin_shuffle(low01, low23, low);
      square[j + 1] = (Vec<float>)__builtin_shuffle(low01, low23, high);
      square[j + 2] = (Vec<float>)__builtin_shuffle(high01, high23, low);
      square[j + 3] = (Vec<float>)__builtin_shuffle(high01, high23, high);
    }
    return;
  }
#endif
  load_corner_transposed(from, stride, kLanes<Compute<S>>, kLanes<Compute<S>>, square);
}

// Either of them.
template <class S>
FUSED_MLP_INLINE void load_transposed(const S* from, int64_t stride, int64_t rows, int columns,
                                      Vec<Compute<S>> (&square)[kLanes<Compute<S>>]) {
  if (rows >= kLanes<Compute<S>> && columns == kLanes<Compute<S>>) {
    load_square_transposed(from, stride, square);
  } else {
    load_corner_transposed(from, stride, rows, columns, square);
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
