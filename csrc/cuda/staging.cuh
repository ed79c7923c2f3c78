// Copies between global memory and the matrices in shared memory that matmul.cuh multiplies.
#pragma once

#include "matmul.cuh"

namespace fused_mlp::cuda {

// A matrix in global memory.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  FUSED_MLP_DEVICE bool packs(int columns) const {
    constexpr int V = kPackWidth<T>;
    return columns % V == 0 && stride % V == 0 && aligned16(data);
  }
  FUSED_MLP_DEVICE Pack<T, kPackWidth<T>> pack(int row, int column) const {
    return load_pack<kPackWidth<T>>(data + row * stride + column);
  }
  FUSED_MLP_DEVICE T at(int row, int column) const { return data[row * stride + column]; }
};

// Fills a storage matrix with rows x columns numbers of a source in global memory. Rows from `rows`
// to all_rows and columns up to pad become zero. A source has numbers `at(row, column)`, and
// `pack(row, column)` of 16 bytes where `packs(columns)` says that it may be asked for them.
template <class M, class Source>
FUSED_MLP_DEVICE void stage(typename M::Storage* to, int ld, const Source& source, int rows,
                            int all_rows, int columns, int pad) {
  using T = typename M::T;
  constexpr int V = kPackWidth<T>;
  using S = typename M::Storage;
  constexpr int W = kPackWidth<S>;
  const int count = rows * columns;
  if (source.packs(columns)) {
    for (int k = V * threadIdx.x; k < count; k += V * blockDim.x) {
      const int row = k / columns, column = k - row * columns;
      const Pack<T, V> pack = source.pack(row, column);
#pragma unroll
      for (int j = 0; j < V; j += W) {
        Pack<S, W> stored;
#pragma unroll
        for (int r = 0; r < W; ++r) stored.at[r] = M::from(pack.at[j + r]);
        store_pack<W>(to + M::at(row, column + j, ld), stored);
      }
    }
  } else {
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
      const int row = k / columns, column = k - row * columns;
      to[M::at(row, column, ld)] = M::from(source.at(row, column));
    }
  }
  const typename M::Storage zero = M::store(typename M::A(0));
  if (pad > columns)
    for (int k = threadIdx.x; k < all_rows * (pad - columns); k += blockDim.x) {
      const int row = k / (pad - columns);
      to[M::at(row, columns + k - row * (pad - columns), ld)] = zero;
    }
  for (int k = rows * columns + threadIdx.x; k < all_rows * columns; k += blockDim.x) {
    const int row = k / columns;
    to[M::at(row, k - row * columns, ld)] = zero;
  }
}

template <class M>
FUSED_MLP_DEVICE void stage_matrix(typename M::Storage* to, int ld, const typename M::T* from,
                                   int64_t stride, int rows, int all_rows, int columns, int pad) {
  stage<M>(to, ld, Matrix<typename M::T>{from, stride}, rows, all_rows, columns, pad);
}

// As many sums in shared memory as 16 bytes hold of T. Where that takes two 16-byte reads, half of
// the threads do the second one first, so that eight neighbours never meet in a bank.
template <class T>
FUSED_MLP_DEVICE Pack<Acc<T>, kPackWidth<T>> load_sums(const Acc<T>* from) {
  constexpr int V = kPackWidth<T>, W = kPackWidth<Acc<T>>;
  if constexpr (V == W) {
    return load_pack<W>(from);
  } else {
    static_assert(V == 2 * W, "two reads");
    const bool swapped = threadIdx.x & 4;
    const auto first = load_pack<W>(from + (swapped ? W : 0));
    const auto second = load_pack<W>(from + (swapped ? 0 : W));
    Pack<Acc<T>, V> sums;
#pragma unroll
    for (int r = 0; r < W; ++r) {
      sums.at[r] = swapped ? second.at[r] : first.at[r];
      sums.at[W + r] = swapped ? first.at[r] : second.at[r];
    }
    return sums;
  }
}

// The same, rounded.
template <class T>
FUSED_MLP_DEVICE Pack<T, kPackWidth<T>> narrow_pack(const Acc<T>* from) {
  const auto sums = load_sums<T>(from);
  Pack<T, kPackWidth<T>> pack;
#pragma unroll
  for (int r = 0; r < kPackWidth<T>; ++r) pack.at[r] = narrow<T>(sums.at[r]);
  return pack;
}

// Copies packed numbers from shared to global memory, 16 bytes a thread where it is aligned.
template <class M>
FUSED_MLP_DEVICE void write_out(typename M::T* to, const typename M::A* from, int count) {
  using T = typename M::T;
  constexpr int V = kPackWidth<T>;
  int done = 0;
  if (aligned16(to)) {
    done = count / V * V;
    for (int k = V * threadIdx.x; k < done; k += V * blockDim.x) {
      store_global<V>(to + k, narrow_pack<T>(from + k));
    }
  }
  for (int k = done + threadIdx.x; k < count; k += blockDim.x) to[k] = narrow<T>(from[k]);
}

}  // namespace fused_mlp::cuda
