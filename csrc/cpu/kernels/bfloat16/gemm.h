// Products of bfloat16 matrices, summed in float32, by dot products of pairs: of vectors with
// AVX-512 BF16 (dots.h), of whole tiles with AMX (tiles.h).
//
// A pair is two neighbouring terms of a sum. A left operand whose terms lie side by side serves in
// place; the right operand holds the pairs of 32 columns side by side.
#pragma once

#include "cpu/kernels/bfloat16/tuning.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Two bfloat16 numbers, the first in the low half.
using Pair = uint32_t;

#if defined(__AMX_BF16__)
// Configures a thread's tiles for as long as it lives. Both together take 0.14 us.
class TileConfiguration {
 public:
  TileConfiguration() {
    alignas(64) static const Layout layout;
    _tile_loadconfig(&layout);
  }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;
  ~TileConfiguration() { _tile_release(); }

 private:
  // As the processor reads it: all eight registers are 16 rows of 64 bytes.
  struct Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};
#else
struct TileConfiguration {
  TileConfiguration() {}
};
#endif

// Columns of a packed panel: two vectors.
constexpr int64_t kPairPanel = 2 * kLanes<float>;
// Elements of a vector of pairs.
constexpr int64_t kVectorElements = 2 * kLanes<float>;

FUSED_MLP_INLINE int64_t pairs_of(int64_t terms) { return ceil_div(terms, 2); }
// What a product takes of both operands: zeros stand behind the last pair.
FUSED_MLP_INLINE int64_t padded_pairs(int64_t terms) {
  return round_up(pairs_of(terms), kPairGroup);
}

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
FUSED_MLP_INLINE PairRight packed_pairs(const Pair* data, int64_t pairs) {
  return {data, kPairPanel, pairs * kPairPanel};
}
FUSED_MLP_INLINE PairRight plain_pairs(const Pair* data, int64_t stride) {
  return {data, stride, kPairPanel};
}
FUSED_MLP_INLINE int64_t packed_pairs_numel(int64_t terms, int64_t columns) {
  return padded_pairs(terms) * round_up(columns, kPairPanel);
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

// c[rows, columns] = start + a[rows, 2 pairs] @ b, in float32, with a whole number of groups of
// pairs; reads and writes whole groups of rows, writes whole vectors.
void multiply_pairs(int64_t rows, int64_t columns, int64_t pairs, PairLeft a, PairRight b, float* c,
                    int64_t c_stride, Start start, const float* bias = nullptr);

// The transpose of columns[pairs, rows], the pairs of the rows of a matrix, as a left operand.
// `room` is where tiles find it: whole groups of rows, `transposed_stride` elements each.
FUSED_MLP_INLINE constexpr int64_t transposed_stride(int64_t pairs) {
  return 2 * pairs + kVectorElements;
}
PairLeft transposed_left(const Pair* columns, int64_t stride, int64_t pairs, int64_t rows,
                         BFloat16* room);

// Packs the transpose of weight[columns, terms]: the right operand of input @ weight.T.
void pack_pairs_transposed(const BFloat16* weight, int64_t stride, int64_t terms, int64_t columns,
                           Pair* out);
// Packs matrix[terms, columns]: the right operand of grad @ weight.
void pack_pairs(const BFloat16* matrix, int64_t stride, int64_t terms, int64_t columns, Pair* out);

// to[r / 2, c] = the pair of rows r and r + 1 of matrix[rows, columns], zeros below the last row
// and up to whole vectors of columns.
void interleave_rows(const BFloat16* matrix, int64_t leading, int64_t rows, int64_t columns,
                     Pair* to, int64_t stride);

// Zeros behind the last pair of so many terms, up to what a product takes.
void clear_padding(int64_t terms, int64_t columns, int64_t stride, Pair* block);

}  // namespace fused_mlp::FUSED_MLP_ISA
