// Products of pairs by the tile registers of AMX: 16 rows of 16 sums each, to which an instruction
// adds the products of 16 x 32 and 32 x 16 terms, 16 times what AVX-512 multiplies in float32.
#pragma once

#include "cpu/kernels/bfloat16/gemm.h"

namespace fused_mlp::FUSED_MLP_ISA {

// 16 rows of a left operand, 32 terms a step; where there is a tail, the last step reads that.
struct TileRows {
  const BFloat16* data;
  int64_t stride;
  const BFloat16* tail = nullptr;
  int64_t tail_stride = 0;
};

// c = start + left @ right: 16 kHigh rows, 16 kWide columns, 16 pairs a step.
template <int kHigh, int kWide>
inline void multiply_tiles(int64_t steps, const TileRows* left, const Pair* right,
                           int64_t right_stride, float* c, int64_t c_stride, Start start,
                           const float* bias) {
  // The compiler does not know that tiles are read from memory: all must have been written.
  asm volatile("" ::: "memory");
  float* below = c + 16 * c_stride;
  const int64_t c_bytes = 4 * c_stride, right_bytes = 4 * right_stride;
  if (start == Start::kZero) {
    _tile_zero(0);
    if constexpr (kWide > 1) _tile_zero(1);
    if constexpr (kHigh > 1) _tile_zero(2);
    if constexpr (kHigh > 1 && kWide > 1) _tile_zero(3);
  } else {
    // A stride of zero gives every row the bias.
    const bool sums = start == Start::kAccumulate;
    const float* upper_from = sums ? c : bias;
    const float* lower_from = sums ? below : bias;
    const int64_t from_bytes = sums ? c_bytes : 0;
    _tile_loadd(0, upper_from, from_bytes);
    if constexpr (kWide > 1) _tile_loadd(1, upper_from + 16, from_bytes);
    if constexpr (kHigh > 1) _tile_loadd(2, lower_from, from_bytes);
    if constexpr (kHigh > 1 && kWide > 1) _tile_loadd(3, lower_from + 16, from_bytes);
  }
  const auto add = [&](const BFloat16* upper, int64_t upper_stride, const BFloat16* lower,
                       int64_t lower_stride) {
    _tile_loadd(4, upper, 2 * upper_stride);
    _tile_loadd(6, right, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide > 1) {
      _tile_loadd(7, right + 16, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kHigh > 1) {
      _tile_loadd(5, lower, 2 * lower_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kWide > 1) _tile_dpbf16ps(3, 5, 7);
    }
    right += kPairGroup * right_stride;
  };
  const TileRows &upper = left[0], &lower = left[kHigh - 1];
  const int64_t whole = steps - (upper.tail != nullptr);
  for (int64_t k = 0; k < whole * kVectorElements; k += kVectorElements) {
    add(upper.data + k, upper.stride, lower.data + k, lower.stride);
  }
  if (whole < steps) add(upper.tail, upper.tail_stride, lower.tail, lower.tail_stride);
  _tile_stored(0, c, c_bytes);
  if constexpr (kWide > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kHigh > 1) _tile_stored(2, below, c_bytes);
  if constexpr (kHigh > 1 && kWide > 1) _tile_stored(3, below + 16, c_bytes);
}

// The same for a height and a width that are known when it runs.
inline void multiply_tiles(bool high, bool wide, int64_t steps, const TileRows* left,
                           const Pair* right, int64_t right_stride, float* c, int64_t c_stride,
                           Start start, const float* bias = nullptr) {
  const auto run = high   ? wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>
                   : wide ? multiply_tiles<1, 2>
                          : multiply_tiles<1, 1>;
  run(steps, left, right, right_stride, c, c_stride, start, bias);
}

}  // namespace fused_mlp::FUSED_MLP_ISA
