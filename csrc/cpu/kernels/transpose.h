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

#if defined(__AVX2__)
// Elements of a 128-bit piece of a vector.
template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

// Pieces `stride` apart side by side, put together by loads: no shuffle crosses pieces then. Bits
// are moved, so that loads of float32 serve every type.
template <class T>
FUSED_MLP_INLINE Vec<T> load_pieces(const T* p, int64_t stride) {
  const auto piece = [&](int64_t i) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * stride));
  };
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(piece(0));
  v = _mm512_mask_broadcast_f32x4(v, 0x00F0, piece(1));
  v = _mm512_mask_broadcast_f32x4(v, 0x0F00, piece(2));
  return (Vec<T>)_mm512_mask_broadcast_f32x4(v, 0xF000, piece(3));
#else
  return (Vec<T>)_mm256_insertf128_ps(_mm256_castps128_ps256(piece(0)), piece(1), 1);
#endif
}

// Interleaves the lower (or upper) halves of the pieces of a and b. Not by _mm512_unpacklo_ps and
// its kin: gcc 12 warns of the undefined value in their definition.
template <bool kUpper, class T, int... kLane>
FUSED_MLP_INLINE Vec<T> interleave_pieces(Vec<T> a, Vec<T> b,
                                          std::integer_sequence<int, kLane...>) {
  constexpr int kFrom = kUpper ? kPiece<T> / 2 : 0;
  const Vec<Bits<T>> order = {
      (kLane / kPiece<T> * kPiece<T> + kFrom + kLane % kPiece<T> / 2 + (kLane % 2) * kLanes<T>)...};
  return __builtin_shuffle(a, b, order);
}
template <class T>
FUSED_MLP_INLINE void interleave_pieces(Vec<T> a, Vec<T> b, Vec<T>& lower, Vec<T>& upper) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  lower = interleave_pieces<false, T>(a, b, Lanes{});
  upper = interleave_pieces<true, T>(a, b, Lanes{});
}

// Transposes the squares that the pieces of kPiece vectors make.
FUSED_MLP_INLINE void transpose_pieces(const Vec<double> (&rows)[2], Vec<double>* to) {
  interleave_pieces<double>(rows[0], rows[1], to[0], to[1]);
}
FUSED_MLP_INLINE void transpose_pieces(const Vec<float> (&rows)[4], Vec<float>* to) {
  Vec<float> low01, high01, low23, high23;
  interleave_pieces<float>(rows[0], rows[1], low01, high01);
  interleave_pieces<float>(rows[2], rows[3], low23, high23);
  Vec<double> pairs[4];
  interleave_pieces<double>((Vec<double>)low01, (Vec<double>)low23, pairs[0], pairs[1]);
  interleave_pieces<double>((Vec<double>)high01, (Vec<double>)high23, pairs[2], pairs[3]);
  for (int j = 0; j < 4; ++j) to[j] = (Vec<float>)pairs[j];
}
#endif

// The same of a whole square. By pieces it takes 16 shuffles of 8 x 8 numbers in place of 48, 32 of
// 16 x 16 in place of 64.
template <class S>
FUSED_MLP_INLINE void load_square_transposed(const S* from, int64_t stride,
                                             Vec<Compute<S>> (&square)[kLanes<Compute<S>>]) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<S, Compute<S>>) {
    for (int j = 0; j < kLanes<S>; j += kPiece<S>) {
      Vec<S> rows[kPiece<S>];
      for (int i = 0; i < kPiece<S>; ++i) {
        rows[i] = load_pieces(from + i * stride + j, kPiece<S> * stride);
      }
      transpose_pieces(rows, square + j);
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
