// The dropout mask of a block of rows, one bit an element (see csrc/common/philox.h).
#pragma once

#include "common/philox.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vec.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Bytes of the mask of one row: a bit a column, the first column in the lowest bit.
FUSED_MLP_INLINE int64_t mask_bytes(int64_t columns) {
  return ceil_div(columns, philox::kColumnsPerGroup);
}

// Writes the mask of rows first_row … first_row + rows - 1, of `columns` columns from first_column
// (a multiple of 8) on: mask_bytes(columns) bytes a row, and up to 64 bytes of rubbish behind them.
// A set bit keeps its element.
void draw_mask(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t first_column,
               int64_t columns, uint8_t* mask);

// The lanes of columns column … column + kLanes<T> - 1 (a multiple of kLanes<T>) as a vector mask.
template <class T>
FUSED_MLP_INLINE Vec<Bits<T>> mask_lanes(const uint8_t* row, int64_t column) {
  Bits<T> word;
  if constexpr (kLanes<T> == 16) {
    uint16_t two;
    std::memcpy(&two, row + column / 8, sizeof(two));
    word = two;
  } else {
    word = row[column / 8] >> (column % 8);
  }
  Vec<Bits<T>> bit;
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = Bits<T>{1} << i;
  return (bit & word) != Vec<Bits<T>>{};
}

// block *= mask ? scale : 0, a product as in torch's dropout: NaN and infinity dropped give NaN.
template <class T>
inline void apply_mask(const uint8_t* mask, T scale, int64_t rows, int64_t columns, T* block,
                       int64_t stride) {
  const Vec<T> kept = splat(scale);
  for (int64_t row = 0; row < rows; ++row, mask += mask_bytes(columns), block += stride) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> factor = select<T>(mask_lanes<T>(mask, c), kept, Vec<T>{});
      store_raw(block + c, load_raw(block + c) * factor);
    }
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
