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
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
      square[j] = (Vec<float>)_mm512_unpacklo_pd(low01, low23);
      square[j + 1] = (Vec<float>)_mm512_unpackhi_pd(low01, low23);
      square[j + 2] = (Vec<float>)_mm512_unpacklo_pd(high01, high23);
      square[j + 3] = (Vec<float>)_mm512_unpackhi_pd(high01, high23);
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
