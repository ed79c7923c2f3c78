// Register tiles of dot products of pairs (AVX-512 BF16): one lane of vdpbf16ps multiplies a pair
// and adds both products. The left operand is read a pair at a time and broadcast.
#pragma once

#include "cpu/kernels/bfloat16/gemm.h"

namespace fused_mlp::FUSED_MLP_ISA {

FUSED_MLP_INLINE Vec<float> add_products(Vec<float> sum, __m512i left, __m512i right) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}

// Sums of kRows x kVectors vectors over `pairs` pairs; `ends` gives what they start from and takes
// what they come to.
template <int kRows, int kVectors, class Ends>
inline void pair_tile(int64_t pairs, PairLeft a, const Pair* b, int64_t b_stride,
                      const Ends& ends) {
  Vec<float> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = ends.start(i, j);
  }
  // As in gemm.h: a pointer for every three rows.
  constexpr int kPointers = (kRows + 2) / 3;
  const BFloat16* a_k[kPointers];
  for (int i = 0; i < kPointers; ++i) a_k[i] = a.data + 3 * i * a.row;
  for (int64_t k = 0; k < pairs; ++k, b += b_stride) {
    __m512i right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_si512(b + j * kLanes<float>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a_k[i / 3] + i % 3 * a.row, sizeof(pair));
      const __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = add_products(sum[i][j], left, right[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPointers; ++i) {
      a_k[i] += a.column;
      keep_walking(a_k[i]);
    }
  }
  ends.template finish<kRows, kVectors>(sum);
}

template <int kRows, class Ends>
FUSED_MLP_INLINE void pair_tile_of(int rows, int vectors, int64_t pairs, PairLeft a, const Pair* b,
                                   int64_t b_stride, const Ends& ends) {
  if (rows == kRows) {
    if (vectors == 1) {
      pair_tile<kRows, 1>(pairs, a, b, b_stride, ends);
    } else {
      pair_tile<kRows, 2>(pairs, a, b, b_stride, ends);
    }
  } else if constexpr (kRows > 1) {
    pair_tile_of<kRows - 1>(rows, vectors, pairs, a, b, b_stride, ends);
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
