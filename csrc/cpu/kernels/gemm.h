// Matrix products of blocks that stay in a core's cache.
//
// One register tile serves every product of the network: the left operand is read one scalar at a
// time and broadcast, so any two strides do (a matrix or its transpose, in place, without packing);
// the right operand is read in vectors, so its rows are packed into zero-padded panels.
#pragma once

#include "cpu/kernels/vec.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Vectors of a row of a register tile, at most, and rows of one of up to two vectors: its sums fill
// the register file but for the vectors of the right operand and one broadcast (14 * 2 + 3 of 32,
// 6 * 2 + 3 of 16).
#if defined(__AVX512F__)
constexpr int kTileVectors = 3, kTileRows = 14;
#elif defined(__aarch64__)
constexpr int kTileVectors = 2, kTileRows = 14;
#else
constexpr int kTileVectors = 2, kTileRows = 6;
#endif

// Three vectors (8 * 3 + 4 of 32) take 11 loads for 24 multiply-adds, where two take 16 for 28. A
// core alone multiplies as fast either way; with its other hardware thread at work, as on a shared
// host, three are up to 1.2 times as fast.
constexpr int tile_rows(int vectors) { return vectors > 2 ? 8 : kTileRows; }

// Rows of a tile whose left operand is read where it lies, beyond the cache: rows a power of two
// apart fall into the same set of an L1 cache, whose 8 to 12 ways must hold a line of each.
constexpr int kInPlaceTile = kTileRows < 8 ? kTileRows : 8;

// Columns of a packed panel.
template <class T>
constexpr int kPanel = kTileVectors * kLanes<T>;

// The left operand: element (i, k) is at data[i * row + k * column].
template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};

// The right operand: element (k, j) is at data[(j / kPanel) * panel + k * stride + j % kPanel].
template <class T>
struct Right {
  const T* data;
  int64_t stride, panel;
};

// Memory that is needed next. A product asks for a few lines of it a tile, so that they are in the
// cache when it ends.
struct Ahead {
  const void* data = nullptr;
  int64_t bytes = 0;

  template <class S>
  static Ahead of(const S* from, int64_t count) {
    return {from, count * static_cast<int64_t>(sizeof(S))};
  }
};

// Terms of a right operand from beyond the L1 cache that are asked for ahead: 4 to 6 % less time.
constexpr int64_t kTermsAhead = 8;

// What a product starts from: zero, a bias a column, a bias a row, or what the result holds.
enum class Start { kZero, kBias, kRowBias, kAccumulate };

// Terms of a sum that are added up from zero in a register, before their sum goes to what came
// before, the bias first. In one chain the rounding error of n terms grows as their square root
// does: 200 inputs erred by three times as much as in eager code, which sums a single row in many
// parts. In runs of 64 a network errs less than eager's at any number of rows, and a product 1024
// terms deep takes 2 % longer; runs of 32 would cost 4 % there.
constexpr int64_t kTerms = 64;

// The leading dimension of a block of `columns`: whole pairs of vectors, then one more vector so
// that rows of a power-of-two length do not all fall into the same cache sets.
template <class T>
FUSED_MLP_INLINE int64_t padded(int64_t columns) {
  return round_up(columns, 2 * kLanes<T>) + 64 / static_cast<int64_t>(sizeof(T));
}

// Elements of a matrix of `rows` x `columns` packed into panels.
template <class T>
FUSED_MLP_INLINE int64_t packed_numel(int64_t rows, int64_t columns) {
  return rows * round_up(columns, kPanel<T>);
}

template <class T>
FUSED_MLP_INLINE Right<T> packed(const T* data, int64_t rows) {
  return {data, kPanel<T>, rows * kPanel<T>};
}

// A block in plain rows of leading dimension `stride`.
template <class T>
FUSED_MLP_INLINE Right<T> plain(const T* data, int64_t stride) {
  return {data, stride, kPanel<T>};
}

// Keeps GCC from turning a pointer that walks into one base and as many offsets as rows, which
// do not fit the registers.
template <class T>
FUSED_MLP_INLINE void keep_walking(T*& pointer) {
  asm("" : "+r"(pointer));
}

// sum += what a product starts from.
template <class T, int kRows, int kVectors>
FUSED_MLP_INLINE void add_start(Start start, const T* bias, const T* c, int64_t c_stride,
                                Vec<T> (&sum)[kRows][kVectors]) {
  if (start == Start::kAccumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, c += c_stride) {
      keep_walking(c);
      for (int j = 0; j < kVectors; ++j) sum[i][j] += load_raw(c + j * kLanes<T>);
    }
  } else if (start == Start::kRowBias) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sum[i][j] += splat<T>(bias[i]);
    }
  } else if (start == Start::kBias) {
    for (int j = 0; j < kVectors; ++j) {
      const Vec<T> first = load_raw(bias + j * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i][j] += first;
    }
  }
}

template <class T, int kRows, int kVectors, bool kFar>
inline void tile(int64_t depth, Left<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                 Start start, const T* bias, bool rectify) {
  constexpr int kWidth = kLanes<T>;
  // A pointer for every three rows; an index and a scale reach the others.
  constexpr int kPointers = (kRows + 2) / 3;
  const T* a_k[kPointers];
  for (int i = 0; i < kPointers; ++i) a_k[i] = a.data + 3 * i * a.row;
  for (int64_t left = depth;;) {
    const int64_t terms = smaller(left, kTerms);
    Vec<T> sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < terms; ++k, b += b_stride) {
      Vec<T> right[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        right[j] = load_raw(b + j * kWidth);
        if constexpr (kFar) __builtin_prefetch(b + kTermsAhead * b_stride + j * kWidth);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> element = splat<T>(a_k[i / 3][i % 3 * a.row]);
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) sum[i][j] += element * right[j];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kPointers; ++i) {
        a_k[i] += a.column;
        keep_walking(a_k[i]);
      }
    }
    add_start<T, kRows, kVectors>(start, bias, c, c_stride, sum);
    start = Start::kAccumulate;
    left -= terms;
    // Sums stay in registers only where every loop over them is unrolled.
    if (rectify && left == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) sum[i][j] = relu<T>(sum[i][j]);
      }
    }
    T* row = c;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, row += c_stride) {
      keep_walking(row);
      for (int j = 0; j < kVectors; ++j) store_raw(row + j * kWidth, sum[i][j]);
    }
    if (left == 0) return;
  }
}

template <class T, int kRows, bool kFar>
FUSED_MLP_INLINE void tile_of(int rows, int vectors, int64_t depth, Left<T> a, const T* b,
                              int64_t b_stride, T* c, int64_t c_stride, Start start, const T* bias,
                              bool rectify) {
  if (rows == kRows) {
    if (vectors == 1) {
      tile<T, kRows, 1, kFar>(depth, a, b, b_stride, c, c_stride, start, bias, rectify);
    } else if (vectors == 2) {
      tile<T, kRows, 2, kFar>(depth, a, b, b_stride, c, c_stride, start, bias, rectify);
    } else if constexpr (kRows <= tile_rows(kTileVectors)) {
      tile<T, kRows, kTileVectors, kFar>(depth, a, b, b_stride, c, c_stride, start, bias, rectify);
    }
  } else if constexpr (kRows > 1) {
    tile_of<T, kRows - 1, kFar>(rows, vectors, depth, a, b, b_stride, c, c_stride, start, bias,
                                rectify);
  }
}

// Where the operands of a product lie: in the caches, the right one's panels in the first of them;
// or both beyond, the left one read in place.
enum class Operands { kNear, kFar };

// c[rows, columns] = start + a[rows, depth] @ b[depth, columns], then max(., 0) if `rectify`.
// Writes whole vectors: c needs `padded` rows, and a bias a column whole panels. Defined in
// gemm.cpp.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left<T> a, Right<T> b, T* c,
              int64_t c_stride, Start start, const T* bias = nullptr, bool rectify = false,
              Operands operands = Operands::kNear, Ahead ahead = {});

// Packs, on all threads, the transpose of weight[columns, rows] (leading dimension `stride`), its
// row j times scale[j] if there is a scale: the right operand of input @ weight.T.
template <class T, class S>
void pack_transposed(const S* weight, int64_t stride, int64_t rows, int64_t columns, const T* scale,
                     T* out);

// Packs matrix[rows, columns] as it is: the right operand of grad @ weight.
template <class T, class S>
void pack(const S* matrix, int64_t stride, int64_t rows, int64_t columns, T* out);

}  // namespace fused_mlp::FUSED_MLP_ISA
