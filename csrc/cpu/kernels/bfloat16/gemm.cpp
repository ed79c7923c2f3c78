#include "cpu/kernels/bfloat16/gemm.h"

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/transpose.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/bfloat16/tiles.h"
#else
#include "cpu/kernels/bfloat16/dots.h"
#endif

namespace fused_mlp::avx512 {

void draw_mask(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t first_column,
               int64_t columns, uint8_t* mask);

}  // namespace fused_mlp::avx512

namespace fused_mlp::FUSED_MLP_ISA {

// The masks are those of every instruction set.
void draw_mask(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t first_column,
               int64_t columns, uint8_t* mask) {
  avx512::draw_mask(dropout, first_row, rows, first_column, columns, mask);
}

#if defined(__AMX_BF16__)

void multiply_pairs(int64_t rows, int64_t columns, int64_t pairs, PairLeft a, PairRight b, float* c,
                    int64_t c_stride, Start start, const float* bias) {
  for (int64_t column = 0; column < columns; column += kPairPanel) {
    const bool wide = columns - column > kLanes<float>;
    const Pair* panel = b.data + (column / kPairPanel) * b.panel;
    for (int64_t row = 0; row < rows; row += kProductRows) {
      const BFloat16* data = a.data + row * a.row;
      const TileRows left[] = {{data, a.row}, {data + kRowGroup * a.row, a.row}};
      multiply_tiles(rows - row > kRowGroup, wide, pairs / kPairGroup, left, panel, b.stride,
                     c + row * c_stride + column, c_stride, start, bias + column);
    }
  }
}

PairLeft transposed_left(const Pair* columns, int64_t stride, int64_t pairs, int64_t rows,
                         BFloat16* room) {
  constexpr int kWidth = kLanes<float>;
  const int64_t room_stride = transposed_stride(pairs);
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t k = 0; k < pairs; k += kWidth) {
      Vec<float> square[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        std::memcpy(&square[i], columns + (k + i) * stride + row, sizeof(square[i]));
      }
      transpose<float>(square);
      for (int i = 0; i < kWidth; ++i) {
        std::memcpy(room + (row + i) * room_stride + 2 * k, &square[i], sizeof(square[i]));
      }
    }
  }
  return rows_left(room, room_stride);
}

#else

namespace {

struct FloatEnds {
  float* c;
  int64_t stride;
  Start from;
  const float* bias;

  FUSED_MLP_INLINE Vec<float> start(int i, int j) const {
    if (from == Start::kAccumulate) return load_raw(c + i * stride + j * kLanes<float>);
    return from == Start::kBias ? load_raw(bias + j * kLanes<float>) : Vec<float>{};
  }
  template <int kRows, int kVectors>
  FUSED_MLP_INLINE void finish(const Vec<float> (&sum)[kRows][kVectors]) const {
    float* row = c;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, row += stride) {
      keep_walking(row);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) store_raw(row + j * kLanes<float>, sum[i][j]);
    }
  }
};

}  // namespace

void multiply_pairs(int64_t rows, int64_t columns, int64_t pairs, PairLeft a, PairRight b, float* c,
                    int64_t c_stride, Start start, const float* bias) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t column = 0; column < columns; column += kPairPanel) {
    const int vectors = columns - column > kLanes<float> ? 2 : 1;
    const Pair* panel = b.data + (column / kPairPanel) * b.panel;
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int height = static_cast<int>(rows / tiles + (t < rows % tiles));
      const FloatEnds ends = {c + row * c_stride + column, c_stride, start, bias + column};
      pair_tile_of<kTileRows>(height, vectors, pairs, {a.data + row * a.row, a.row, a.column},
                              panel, b.stride, ends);
      row += height;
    }
  }
}

PairLeft transposed_left(const Pair* columns, int64_t stride, int64_t, int64_t, BFloat16*) {
  return {reinterpret_cast<const BFloat16*>(columns), 2, 2 * stride};
}

#endif

void pack_pairs_transposed(const BFloat16* weight, int64_t stride, int64_t terms, int64_t columns,
                           Pair* out) {
  constexpr int kWidth = kLanes<float>;
  const int64_t pairs = padded_pairs(terms);
  for (int64_t first = 0; first < round_up(columns, kPairPanel); first += kWidth) {
    Pair* panel = out + first / kPairPanel * kPairPanel * pairs + first % kPairPanel;
    for (int64_t k = 0; k < terms; k += kVectorElements) {
      Vec<float> square[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        square[j] = first + j < columns
                        ? (Vec<float>)load_elements(weight + (first + j) * stride + k, terms - k)
                        : Vec<float>{};
      }
      transpose<float>(square);
      const int64_t depth = smaller(kWidth, pairs - k / 2);
      for (int i = 0; i < depth; ++i) {
        std::memcpy(panel + (k / 2 + i) * kPairPanel, &square[i], sizeof(square[i]));
      }
    }
  }
}

void pack_pairs(const BFloat16* matrix, int64_t stride, int64_t terms, int64_t columns, Pair* out) {
  const int64_t pairs = padded_pairs(terms);
  for (int64_t first = 0; first < columns; first += kPairPanel, out += pairs * kPairPanel) {
    const int64_t width = smaller(kPairPanel, columns - first);
    interleave_rows(matrix + first, stride, terms, width, out, kPairPanel);
    clear_padding(terms, kPairPanel, kPairPanel, out);
    for (int64_t k = 0; width <= kLanes<float> && k < pairs; ++k) {
      std::memset(out + k * kPairPanel + kLanes<float>, 0, kLanes<float> * sizeof(Pair));
    }
  }
}

void clear_padding(int64_t terms, int64_t columns, int64_t stride, Pair* block) {
  for (int64_t k = pairs_of(terms); k < padded_pairs(terms); ++k) {
    std::memset(block + k * stride, 0, static_cast<size_t>(columns) * sizeof(Pair));
  }
}

void interleave_rows(const BFloat16* matrix, int64_t leading, int64_t rows, int64_t columns,
                     Pair* to, int64_t stride) {
  for (int64_t row = 0; row < rows; row += 2, matrix += 2 * leading, to += stride) {
    const bool both = row + 1 < rows;
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      const __m256i first = load_half(matrix + c, columns - c);
      const __m256i second =
          both ? load_half(matrix + leading + c, columns - c) : _mm256_setzero_si256();
      _mm512_storeu_si512(to + c, make_pairs(first, second));
    }
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
