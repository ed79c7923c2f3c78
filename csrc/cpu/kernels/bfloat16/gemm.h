// Products of bfloat16 matrices by dot products of pairs, summed in float32 (AVX-512 BF16).
//
// One lane of vdpbf16ps multiplies two neighbouring terms of a sum, a pair, and adds both products.
// The left operand is read a pair at a time and broadcast, so a matrix whose terms lie side by side
// serves in place; the right operand holds the pairs of 32 columns side by side.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Two bfloat16 numbers, the first in the low half.
using Pair = uint32_t;

// Columns of a packed panel, as in float32.
constexpr int64_t kPairPanel = kPanel<float>;
// Elements of a vector of pairs.
constexpr int64_t kVectorElements = 2 * kLanes<float>;

FUSED_MLP_INLINE int64_t pairs_of(int64_t terms) { return ceil_div(terms, 2); }

// The left operand: the pair k of row i is at data[i * row + k * column], in elements.
struct PairLeft {
  const BFloat16* data;
  int64_t row, column;
};

// The right operand: pair k of column j is at data[(j / kPairPanel) * panel + k * stride +
// j % kPairPanel].
struct PairRight {
  const Pair* data;
  int64_t stride, panel;
};

FUSED_MLP_INLINE PairLeft rows_left(const BFloat16* data, int64_t stride) {
  return {data, stride, 2};
}
// Pairs of neighbouring rows, transposed: the terms are the rows.
FUSED_MLP_INLINE PairLeft columns_left(const Pair* data, int64_t stride) {
  return {reinterpret_cast<const BFloat16*>(data), 2, 2 * stride};
}
FUSED_MLP_INLINE PairRight packed_pairs(const Pair* data, int64_t pairs) {
  return {data, kPairPanel, pairs * kPairPanel};
}
FUSED_MLP_INLINE PairRight plain_pairs(const Pair* data, int64_t stride) {
  return {data, stride, kPairPanel};
}
FUSED_MLP_INLINE int64_t packed_pairs_numel(int64_t terms, int64_t columns) {
  return pairs_of(terms) * round_up(columns, kPairPanel);
}

FUSED_MLP_INLINE __mmask32 first_elements(int64_t count) {
  return static_cast<__mmask32>(count >= 32 ? ~0u : (1u << count) - 1);
}
FUSED_MLP_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFFu : (1u << count) - 1);
}

// The first `count` of 32 elements, zeros behind them.
FUSED_MLP_INLINE __m512i load_elements(const BFloat16* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_elements(count), p);
}
// 16 elements in the low and in the high halves of 32 bits.
FUSED_MLP_INLINE VecU32 low_halves(__m256i elements) {
  return __builtin_convertvector((VecU16)elements, VecU32);
}
FUSED_MLP_INLINE VecU32 high_halves(__m256i elements) { return low_halves(elements) << 16; }

FUSED_MLP_INLINE __m256i load_half(const BFloat16* p, int64_t count) {
  return _mm256_maskz_loadu_epi16(first_lanes(count), p);
}
FUSED_MLP_INLINE __m256i round_all(Vec<float> v) { return (__m256i)to_bfloat16(v); }

FUSED_MLP_INLINE Vec<float> load_sixteen(const BFloat16* p, int64_t count) {
  return (Vec<float>)high_halves(load_half(p, count));
}
FUSED_MLP_INLINE void store_sixteen(BFloat16* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), round_all(v));
}
// What a store and a load make of a vector.
FUSED_MLP_INLINE Vec<float> rounded(Vec<float> v) { return (Vec<float>)high_halves(round_all(v)); }

// Pairs of the elements of two rows of 16.
FUSED_MLP_INLINE __m512i make_pairs(__m256i first, __m256i second) {
  return (__m512i)(low_halves(first) | high_halves(second));
}
FUSED_MLP_INLINE __m512i make_pairs(Vec<float> first, Vec<float> second) {
  return make_pairs(round_all(first), round_all(second));
}

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

// c[rows, columns] = start + a[rows, 2 pairs] @ b, in float32; writes whole vectors.
void multiply_pairs(int64_t rows, int64_t columns, int64_t pairs, PairLeft a, PairRight b, float* c,
                    int64_t c_stride, Start start, const float* bias = nullptr);

// Packs the transpose of weight[columns, terms]: the right operand of input @ weight.T.
void pack_pairs_transposed(const BFloat16* weight, int64_t stride, int64_t terms, int64_t columns,
                           Pair* out);
// Packs matrix[terms, columns]: the right operand of grad @ weight.
void pack_pairs(const BFloat16* matrix, int64_t stride, int64_t terms, int64_t columns, Pair* out);

// to[r / 2, c] = the pair of rows r and r + 1 of matrix[rows, columns], zeros below the last row
// and up to whole vectors of columns.
void interleave_rows(const BFloat16* matrix, int64_t leading, int64_t rows, int64_t columns,
                     Pair* to, int64_t stride);

}  // namespace fused_mlp::FUSED_MLP_ISA
