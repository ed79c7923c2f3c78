// Device code of gemm.cu.
#pragma once

#include "common/philox.h"
#include "gemm.h"
#include "staging.cuh"

namespace fused_mlp::cuda::gemm {

constexpr int kTile = 64;      // rows and columns of a block's result
constexpr int kThreads = 256;  // eight warps with one 16 x 32 block each

// How much of the summed dimension is in shared memory at a time.
template <class M>
constexpr int kDepth = sizeof(typename M::A) == 8 ? 32 : 64;

__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Bytes of one operand, of the result on its way out, and of all shared memory.
template <class M>
constexpr int kOperandBytes = larger(kTile * M::leading(kDepth<M>), kDepth<M>* M::leading(kTile)) *
                              static_cast<int>(sizeof(typename M::Storage));
constexpr int kResultLeading = kTile + 8;
template <class M>
constexpr int kResultBytes = kTile * kResultLeading * static_cast<int>(sizeof(typename M::A));
constexpr int kMaskBytes = kTile * kTile / 8;
template <class M>
constexpr int kSharedBytes = larger(2 * kOperandBytes<M>, kResultBytes<M>) + kMaskBytes;

template <class M>
struct Block {
  using T = typename M::T;
  using S = typename M::Storage;
  using A = typename M::A;

  const GemmParameters& p;
  char* shared;

  FUSED_MLP_DEVICE S* left() const { return reinterpret_cast<S*>(shared); }
  FUSED_MLP_DEVICE S* right() const { return reinterpret_cast<S*>(shared + kOperandBytes<M>); }
  FUSED_MLP_DEVICE A* result() const { return reinterpret_cast<A*>(shared); }
  FUSED_MLP_DEVICE uint8_t* mask() const {
    return reinterpret_cast<uint8_t*>(shared + kSharedBytes<M> - kMaskBytes);
  }

  FUSED_MLP_DEVICE GatedMatrix<T> gated(int64_t row, int column) const {
    return {{static_cast<const T*>(p.g) + row * p.g_stride + column, p.g_stride},
            {static_cast<const T*>(p.output) + row * p.out + column, p.out},
            static_cast<A>(p.scale)};
  }
  FUSED_MLP_DEVICE const T* x(int64_t row, int column) const {
    return static_cast<const T*>(p.x) + row * p.x_stride + column;
  }
  FUSED_MLP_DEVICE const T* weight(int64_t row, int column) const {
    return static_cast<const T*>(p.weight) + row * p.in + column;
  }
  FUSED_MLP_DEVICE static int left_of(int64_t count, int64_t from, int most) {
    return count - from < most ? static_cast<int>(count - from) : most;
  }

  // Adds the product of the operands in shared memory to the warp's sums.
  template <bool TA, bool TB>
  FUSED_MLP_DEVICE void multiply(A (&c)[16], int depth) const {
    const int warp = threadIdx.x / 32;
    M::template product<TA, TB>(c, left(), M::leading(TA ? kTile : kDepth<M>), right(),
                                M::leading(TB ? kTile : kDepth<M>), warp % 4 * kBlockRows, kTile,
                                warp / 4 * kBlockColumns, kTile, round_up(depth, M::kPad));
  }

  template <bool TA, bool TB, class Visit>
  FUSED_MLP_DEVICE void each(const A (&c)[16], Visit visit) const {
    const int warp = threadIdx.x / 32;
    M::template each<TA, TB>(c, warp % 4 * kBlockRows, warp / 4 * kBlockColumns, kTile, visit);
  }

  // Puts sums in shared memory so that they leave it in whole rows. Begins synchronised, as the
  // loops over the operands end, and ends so.
  template <bool TA, bool TB>
  FUSED_MLP_DEVICE void collect(const A (&c)[16]) const {
    each<TA, TB>(c, [&](int row, int column, auto values) {
      constexpr int W = sizeof(values) / sizeof(A);
      store_pack<W>(result() + row * kResultLeading + column, values);
    });
    __syncthreads();
  }

  template <class Out>
  FUSED_MLP_DEVICE void write(Out* to, int64_t stride, int rows, int columns) const {
    constexpr int V = kPackWidth<Out>;
    if (columns % V == 0 && stride % V == 0 && aligned16(to)) {
      const int packs = columns / V;
      for (int k = threadIdx.x; k < rows * packs; k += kThreads) {
        const int row = k / packs, column = (k - row * packs) * V;
        store_global<V>(to + row * stride + column,
                        narrow_pack<Out>(result() + row * kResultLeading + column));
      }
      return;
    }
    for (int k = threadIdx.x; k < rows * columns; k += kThreads) {
      const int row = k / columns, column = k - row * columns;
      to[row * stride + column] = narrow<Out>(result()[row * kResultLeading + column]);
    }
  }

  FUSED_MLP_DEVICE void layer() const {
    const int tiles = (p.out + kTile - 1) / kTile;
    const int64_t m0 = static_cast<int64_t>(blockIdx.x / tiles) * kTile;
    const int n0 = static_cast<int>(blockIdx.x % tiles) * kTile;
    const int rows = left_of(p.rows, m0, kTile), columns = left_of(p.out, n0, kTile);
    if (p.threshold) {
      const philox::Stream stream = philox::make_stream(p.seed[0], p.seed[1], 0);
      for (int k = threadIdx.x; k < kMaskBytes; k += kThreads) {
        const philox::Group bits = philox::draw(stream, m0 + k / 8, n0 / 8 + k % 8);
        uint32_t byte = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          byte |= static_cast<uint32_t>(philox::keep(bits, j, p.threshold)) << j;
        mask()[k] = static_cast<uint8_t>(byte);
      }
    }
    A c[16] = {};
    for (int k0 = 0; k0 < p.in; k0 += kDepth<M>) {
      const int depth = left_of(p.in, k0, kDepth<M>), ld = M::leading(kDepth<M>);
      stage_matrix<M>(left(), ld, x(m0, k0), p.x_stride, rows, kTile, depth,
                      round_up(depth, M::kPad));
      stage_matrix<M>(right(), ld, weight(n0, k0), p.in, columns, kTile, depth,
                      round_up(depth, M::kPad));
      __syncthreads();
      multiply<false, false>(c, depth);
      __syncthreads();
    }
    __syncthreads();
    const A scale = static_cast<A>(p.scale);
    each<false, false>(c, [&](int row, int column, auto values) {
      constexpr int W = sizeof(values) / sizeof(A);
#pragma unroll
      for (int r = 0; r < W; ++r) {
        A z = values.at[r];
        if (p.bias && column + r < columns)
          z += widen(static_cast<const T*>(p.bias)[n0 + column + r]);
        z = z < A(0) ? A(0) : z;  // NaN stays
        const bool keep =
            !p.threshold || (mask()[row * 8 + (column + r) / 8] >> ((column + r) % 8) & 1);
        values.at[r] = z * (keep ? scale : A(0));
      }
      store_pack<W>(result() + row * kResultLeading + column, values);
    });
    __syncthreads();
    write(static_cast<T*>(p.result) + m0 * p.out + n0, p.out, rows, columns);
  }

  FUSED_MLP_DEVICE void input_gradient() const {
    const int tiles = (p.in + kTile - 1) / kTile;
    const int64_t m0 = static_cast<int64_t>(blockIdx.x / tiles) * kTile;
    const int n0 = static_cast<int>(blockIdx.x % tiles) * kTile;
    const int rows = left_of(p.rows, m0, kTile), columns = left_of(p.in, n0, kTile);
    A c[16] = {};
    for (int k0 = 0; k0 < p.out; k0 += kDepth<M>) {
      const int depth = left_of(p.out, k0, kDepth<M>), padded = round_up(depth, M::kPad);
      stage<M>(left(), M::leading(kDepth<M>), gated(m0, k0), rows, kTile, depth, padded);
      stage_matrix<M>(right(), M::leading(kTile), weight(k0, n0), p.in, depth, padded, columns,
                      kTile);
      __syncthreads();
      multiply<false, true>(c, depth);
      __syncthreads();
    }
    collect<false, true>(c);
    write(static_cast<T*>(p.result) + m0 * p.in + n0, p.in, rows, columns);
  }

  FUSED_MLP_DEVICE void weight_gradient() const {
    const int tiles = (p.in + kTile - 1) / kTile, tiles_out = (p.out + kTile - 1) / kTile;
    const int64_t split = blockIdx.x / (tiles * tiles_out);
    const int tile = static_cast<int>(blockIdx.x % (tiles * tiles_out));
    const int m0 = tile / tiles * kTile, n0 = tile % tiles * kTile;
    const int rows = left_of(p.out, m0, kTile), columns = left_of(p.in, n0, kTile);
    const int64_t first = split * p.rows_per_split;
    const int64_t last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
    A c[16] = {}, bias = 0;
    for (int64_t k0 = first; k0 < last; k0 += kDepth<M>) {
      const int depth = left_of(last, k0, kDepth<M>), padded = round_up(depth, M::kPad);
      const int ld = M::leading(kTile);
      stage<M>(left(), ld, gated(k0, m0), depth, padded, rows, kTile);
      stage_matrix<M>(right(), ld, x(k0, n0), p.x_stride, depth, padded, columns, kTile);
      __syncthreads();
      multiply<true, true>(c, depth);
      if (n0 == 0 && threadIdx.x < kTile)
        for (int k = 0; k < depth; ++k) bias += M::load(left()[M::at(k, threadIdx.x, ld)]);
      __syncthreads();
    }
    collect<true, true>(c);
    A* to = static_cast<A*>(p.result) + split * p.gradient_stride;
    write(to + static_cast<int64_t>(m0) * p.in + n0, p.in, rows, columns);
    if (n0 == 0 && threadIdx.x < rows)
      to[static_cast<int64_t>(p.out) * p.in + m0 + threadIdx.x] = bias;
  }

  FUSED_MLP_DEVICE void run() const {
    if (p.product == Product::kLayer)
      layer();
    else if (p.product == Product::kInputGradient)
      input_gradient();
    else
      weight_gradient();
  }
};

// A thread takes V neighbouring columns of a row: a 16-byte pack, or one where rows are not whole
// packs. Neighbours draw the same eight columns' bits again, which costs less than sharing them.
template <class T, int V>
FUSED_MLP_DEVICE void elements(const ElementParameters& p) {
  using A = Acc<T>;
  const int units = p.columns / V;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= p.rows * units) return;
  const int64_t row = k / units;
  const int column = static_cast<int>(k - row * units) * V;
  const int64_t at = row * p.columns + column;
  const A scale = static_cast<A>(p.scale);
  Pack<T, V> values = load_pack<V>(static_cast<const T*>(p.output) + at);
  if (p.g) {
    const auto g = load_pack<V>(static_cast<const T*>(p.g) + row * p.g_stride + column);
#pragma unroll
    for (int j = 0; j < V; ++j)
      values.at[j] = narrow<T>(widen(values.at[j]) <= A(0) ? A(0) : widen(g.at[j]) * scale);
  } else {
    philox::Group bits = {};
    if (p.threshold)
      bits = philox::draw(philox::make_stream(p.seed[0], p.seed[1], 0), row, column / 8);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A z = widen(values.at[j]);
      if (p.bias) z += widen(static_cast<const T*>(p.bias)[column + j]);
      z = z < A(0) ? A(0) : z;
      const uint32_t word = column % 8 + j;
      const uint32_t low = word & 2 ? bits.words[1] : bits.words[0];
      const uint32_t high = word & 2 ? bits.words[3] : bits.words[2];
      const uint32_t number = ((word & 4 ? high : low) >> (16 * (word & 1))) & 0xFFFFu;
      values.at[j] = narrow<T>(z * (!p.threshold || number >= p.threshold ? scale : A(0)));
    }
  }
  store_global<V>(static_cast<T*>(p.result) + at, values);
}

}  // namespace fused_mlp::cuda::gemm
