#include "cpu/kernels/gemm.h"

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/transpose.h"

namespace fused_mlp::FUSED_MLP_ISA {

namespace {

template <class T, bool kFar>
void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, Left<T> a, Right<T> b, T* c,
                    int64_t c_stride, Start start, const T* bias, bool rectify, Ahead ahead) {
  const auto vectors_from = [=](int64_t column) {
    return static_cast<int>(smaller(kTileVectors, ceil_div(columns - column, kLanes<T>)));
  };
  // Tiles of nearly the same height: 64 rows are 11 tiles of 5 or 6, not 10 of 6 and one of 4.
  const auto tiles_of = [=](int vectors) {
    const int most = tile_rows(vectors);
    return ceil_div(rows, kFar && kInPlaceTile < most ? kInPlaceTile : most);
  };
  constexpr int64_t kLine = 64;
  const char* next = static_cast<const char*>(ahead.data);
  const char* const last = next + ahead.bytes;
  const int64_t all_tiles = larger(1, tiles_of(vectors_from(0)) * ceil_div(columns, kPanel<T>));
  const int64_t span = round_up(ceil_div(ahead.bytes, all_tiles), kLine);
  for (int64_t column = 0; column < columns; column += kPanel<T>) {
    const int vectors = vectors_from(column);
    const int64_t tiles = tiles_of(vectors);
    const T* panel = b.data + (column / kPanel<T>)*b.panel;
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int height = static_cast<int>(rows / tiles + (t < rows % tiles));
      for (const char* stop = next + smaller(span, last - next); next < stop; next += kLine) {
        __builtin_prefetch(next, 0, 2);
      }
      tile_of<T, kFar ? kInPlaceTile : kTileRows, kFar>(
          height, vectors, depth, {a.data + row * a.row, a.row, a.column}, panel, b.stride,
          c + row * c_stride + column, c_stride, start,
          bias + (start == Start::kRowBias ? row : column), rectify);
      row += height;
    }
  }
}

// Calls body(first, panel) for the panels of a packed matrix, each of which starts at column
// `first`.
template <class T, class Body>
void for_panels(int64_t rows, int64_t columns, T* out, const Body& body) {
  const int64_t work = larger(1, rows * kPanel<T> * kPassCost);
  parallel_for(ceil_div(columns, kPanel<T>), larger(1, kThreadWork / work),
               [&](int64_t begin, int64_t end) {
                 for (int64_t panel = begin; panel < end; ++panel) {
                   body(panel * kPanel<T>, out + panel * kPanel<T> * rows);
                 }
               });
}

}  // namespace

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left<T> a, Right<T> b, T* c,
              int64_t c_stride, Start start, const T* bias, bool rectify, Operands operands,
              Ahead ahead) {
  const auto run = operands == Operands::kFar ? multiply_tiles<T, true> : multiply_tiles<T, false>;
  run(rows, columns, depth, a, b, c, c_stride, start, bias, rectify, ahead);
}

template <class T, class S>
void pack_transposed(const S* weight, int64_t stride, int64_t rows, int64_t columns, const T* scale,
                     T* out) {
  constexpr int kWidth = kLanes<T>;
  for_panels(rows, columns, out, [&](int64_t start, T* panel) {
    for (int64_t first = start; first < start + kPanel<T>; first += kWidth, panel += kWidth) {
      const int64_t width = larger(0, smaller(kWidth, columns - first));
      const Vec<T> factor =
          scale && width > 0 ? load_up_to(scale + first, static_cast<int>(width)) : splat(T(1));
      for_vectors<T>(rows, [&](int64_t k, int depth) {
        Vec<T> square[kWidth];
        load_transposed(weight + first * stride + k, stride, width, depth, square);
        for (int i = 0; i < depth; ++i) store_raw(panel + (k + i) * kPanel<T>, square[i] * factor);
      });
    }
  });
}

template <class T, class S>
void pack(const S* matrix, int64_t stride, int64_t rows, int64_t columns, T* out) {
  for_panels(rows, columns, out, [&](int64_t first, T* panel) {
    const int64_t width = smaller(kPanel<T>, columns - first);
    for (int64_t k = 0; k < rows; ++k, panel += kPanel<T>) {
      const S* source = matrix + k * stride + first;
      for (int64_t j = width; j < kPanel<T>; ++j) panel[j] = 0;
      for_vectors<T>(width, [&](int64_t j, int lanes) {
        store_raw(panel + j, load_up_to(source + j, lanes));
      });
    }
  });
}

template void multiply<float>(int64_t, int64_t, int64_t, Left<float>, Right<float>, float*, int64_t,
                              Start, const float*, bool, Operands, Ahead);
template void multiply<double>(int64_t, int64_t, int64_t, Left<double>, Right<double>, double*,
                               int64_t, Start, const double*, bool, Operands, Ahead);

#define FUSED_MLP_INSTANTIATE(S)                                                    \
  template void pack_transposed<Compute<S>, S>(const S*, int64_t, int64_t, int64_t, \
                                               const Compute<S>*, Compute<S>*);     \
  template void pack<Compute<S>, S>(const S*, int64_t, int64_t, int64_t, Compute<S>*);
FUSED_MLP_INSTANTIATE(float)
FUSED_MLP_INSTANTIATE(double)
FUSED_MLP_INSTANTIATE(BFloat16)
FUSED_MLP_INSTANTIATE(Float16)
#undef FUSED_MLP_INSTANTIATE

}  // namespace fused_mlp::FUSED_MLP_ISA
