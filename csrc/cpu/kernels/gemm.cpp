#include "cpu/kernels/gemm.h"

#include "cpu/kernels/transpose.h"

namespace fused_mlp::FUSED_MLP_ISA {

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left<T> a, Right<T> b, T* c,
              int64_t c_stride, Start start, const T* bias, bool rectify, int64_t most) {
  // Tiles of nearly the same height: 64 rows are 11 tiles of 5 or 6, not 10 of 6 and one of 4.
  const int64_t tiles = ceil_div(rows, most);
  for (int64_t column = 0; column < columns; column += kPanel<T>) {
    const int vectors = columns - column > kLanes<T> ? 2 : 1;
    const T* panel = b.data + (column / kPanel<T>)*b.panel;
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int height = static_cast<int>(rows / tiles + (t < rows % tiles));
      tile_of<T, kTileRows>(height, vectors, depth, {a.data + row * a.row, a.row, a.column}, panel,
                            b.stride, c + row * c_stride + column, c_stride, start,
                            bias + (start == Start::kRowBias ? row : column), rectify);
      row += height;
    }
  }
}

template <class T, class S>
void pack_transposed(const S* weight, int64_t stride, int64_t rows, int64_t columns, const T* scale,
                     T* out) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t first = 0; first < round_up(columns, kPanel<T>); first += kWidth) {
    T* panel = out + first / kPanel<T> * kPanel<T> * rows + first % kPanel<T>;
    const int64_t width = larger(0, smaller(kWidth, columns - first));
    const Vec<T> factor =
        scale && width > 0 ? load_up_to(scale + first, static_cast<int>(width)) : splat(T(1));
    for_vectors<T>(rows, [&](int64_t k, int depth) {
      Vec<T> square[kWidth];
      load_transposed(weight + first * stride + k, stride, width, depth, square);
      for (int i = 0; i < depth; ++i) store_raw(panel + (k + i) * kPanel<T>, square[i] * factor);
    });
  }
}

template <class T, class S>
void pack(const S* matrix, int64_t stride, int64_t rows, int64_t columns, T* out) {
  for (int64_t first = 0; first < columns; first += kPanel<T>) {
    const int64_t width = smaller(kPanel<T>, columns - first);
    for (int64_t k = 0; k < rows; ++k) {
      const S* source = matrix + k * stride + first;
      for (int64_t j = width; j < kPanel<T>; ++j) out[j] = 0;
      for_vectors<T>(
          width, [&](int64_t j, int lanes) { store_raw(out + j, load_up_to(source + j, lanes)); });
      out += kPanel<T>;
    }
  }
}

template void multiply<float>(int64_t, int64_t, int64_t, Left<float>, Right<float>, float*, int64_t,
                              Start, const float*, bool, int64_t);
template void multiply<double>(int64_t, int64_t, int64_t, Left<double>, Right<double>, double*,
                               int64_t, Start, const double*, bool, int64_t);

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
